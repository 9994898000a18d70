"""Inputs of custom problems: arrays as tensors, checked."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from de_ray.checks import require


def load_inputs(path: str, key: str) -> Tensor:
    """Read an `.npy` file of inputs [N, ...]; see `as_inputs`.

    Args:
        path: of the file. Pickled objects inside it are refused.
        key: the configuration key, for messages.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not an `.npy` file of numbers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{key}={path!r}: no such file")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{key}={path!r}: not an .npy file of numbers, as numpy.save writes it: {error}") from error
    require(isinstance(array, np.ndarray), key, path, "one array in an .npy file, not an archive")
    return as_inputs(array, f"{key}={path!r}")


def as_inputs(array: np.ndarray | Tensor, key: str) -> Tensor:
    """A copy of inputs [N, ...] as a tensor on the CPU.

    Floating-point, boolean and uint8 values (pixels, not rescaled) become float32; other whole numbers, such as token
    indices, become int64.

    Args:
        array: the inputs.
        key: what they are called in messages.

    Raises:
        ValueError: for other types, no samples, or values that are not finite.
    """
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy knows no bfloat16
    require(isinstance(array, np.ndarray), key, type(array).__name__,
            "one array or tensor of inputs [N, ...]; a module around the network may divide it into several")
    if array.dtype.kind == "f" or array.dtype in (np.bool_, np.uint8):
        with np.errstate(over="ignore"):  # reported below, with the sample
            inputs = torch.from_numpy(array.astype(np.float32))
    elif array.dtype.kind in "iu":
        inputs = torch.from_numpy(array.astype(np.int64))
    else:
        raise ValueError(f"{key}: its type is {array.dtype}; expected floating-point or whole numbers")
    if inputs.ndim == 0 or inputs.numel() == 0:
        raise ValueError(f"{key}: its shape is {list(inputs.shape)}; expected [N, ...] with at least one sample")
    finite = inputs.reshape(len(inputs), -1).isfinite().all(1)  # [N]
    if not finite.all():
        first = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"{key}: holds NaN, infinite values or ones beyond float32, in {int((~finite).sum())} of "
                         f"{len(inputs)} samples; the first is sample {first}")
    return inputs
