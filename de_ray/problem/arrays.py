"""Inputs of custom problems: arrays as tensors, checked."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from de_ray.checks import require

Array = np.ndarray | Tensor
Given = Array | tuple[Array, ...] | Mapping[str, Array]
"""Inputs [N, ...] of a network as users have them: of one argument, or of several by position or by name."""


def load_inputs(path: str, key: str) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    """Read an `.npy` file of inputs [N, ...], or an `.npz` file of several arguments; see `checked`.

    Args:
        path: of the file. Pickled objects inside it are refused.
        key: the configuration key, for messages.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a file of numbers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{key}={path!r}: no such file")
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                found = _called(dict(found.items()))
    except Exception as error:  # noqa: BLE001 - of a damaged archive, whatever NumPy and zlib make of it
        raise ValueError(f"{key}={path!r}: neither an .npy nor an .npz file of numbers, as numpy.save and numpy.savez "
                         f"write them: {error}") from error
    return checked(found, f"{key}={path!r}")


def _called(arrays: dict[str, np.ndarray]) -> Given:
    """Arrays of an archive, by position where `numpy.savez` was given no names for them."""
    unnamed = [f"arr_{place}" for place in range(len(arrays))]
    if sorted(arrays) != sorted(unnamed):
        return arrays
    return arrays["arr_0"] if len(arrays) == 1 else tuple(arrays[name] for name in unnamed)


def checked(given: Given, key: str) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    """Copies of inputs on the CPU, as `as_inputs` has them, or those of several arguments.

    Of several arguments, boolean ones stay what they are: they are masks.

    Args:
        given: the inputs.
        key: what they are called in messages.

    Raises:
        ValueError: as `as_inputs`; for no arguments, names that are none, or different numbers of samples.
    """
    if not isinstance(given, tuple | Mapping):
        return as_inputs(given, key)
    places = dict(enumerate(given)) if isinstance(given, tuple) else dict(given)
    if not places:
        raise ValueError(f"{key} is empty: expected at least one argument")
    if isinstance(given, Mapping) and not all(isinstance(place, str) for place in places):
        raise ValueError(f"{key} has {list(places)}: expected names of arguments")
    found = {place: as_inputs(value, f"{key}[{place!r}]", masks=True) for place, value in places.items()}
    counts = {place: len(value) for place, value in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{key} has {counts} samples: expected as many in each argument")
    return tuple(found.values()) if isinstance(given, tuple) else found


def as_inputs(array: Array, key: str, masks: bool = False) -> Tensor:
    """A copy of inputs [N, ...] as a tensor on the CPU.

    Floating-point, boolean and uint8 values (pixels, not rescaled) become float32; other whole numbers, such as token
    indices, become int64.

    Args:
        array: the inputs.
        key: what they are called in messages.
        masks: leave boolean values what they are.

    Raises:
        ValueError: for other types, no samples, or values that are not finite.
    """
    if isinstance(array, Tensor):
        require(array.layout == torch.strided, key, array.layout, "a dense tensor, as .to_dense() makes it")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy knows no bfloat16
    require(isinstance(array, np.ndarray), key, type(array).__name__,
            "one array or tensor of inputs [N, ...]; those of several arguments in a tuple, or in a dict by name")
    if masks and array.dtype == np.bool_:
        inputs = torch.from_numpy(array.copy())
    elif array.dtype.kind == "f" or array.dtype in (np.bool_, np.uint8):
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
