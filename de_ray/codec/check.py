"""What can be coded: refusals before encoding."""

import numpy as np

from de_ray.codec.header import MAX_DIMENSIONS, MAX_EXPONENT, MAX_NAME, level_problem
from de_ray.codec.tensor import QuantizedTensor

MAX_SYMBOL = 2**24
"""float32 holds whole numbers up to here."""


def check(tensor: QuantizedTensor) -> None:
    """Refuse a tensor that the format cannot hold.

    Raises:
        ValueError: types, levels, step, symbols, row exponents or shape are out of their range.
    """
    name, symbols, levels, step = tensor.name, tensor.symbols, tensor.levels, tensor.step
    check_name(name)
    if symbols.dtype != np.int32:
        raise ValueError(f"{name}: symbols of type {symbols.dtype}, expected int32")
    if symbols.ndim > MAX_DIMENSIONS:
        raise ValueError(f"{name}: {symbols.ndim} dimensions, expected at most {MAX_DIMENSIONS}")
    if (levels is None) == (step is None):
        raise ValueError(f"{name}: expected either levels or a step")
    least = most = MAX_SYMBOL
    if levels is not None:
        _check_levels(name, levels)
        least = int(np.count_nonzero(levels < 0))
        most = len(levels) - least
    # A step that float32 rounds would decode to other numbers than the caller's.
    elif not (np.isfinite(step) and step > 0 and np.float32(step) == step):
        raise ValueError(f"{name}: step {step}, expected a finite float32 above 0")
    if symbols.min(initial=0) < -least or symbols.max(initial=0) > most:
        raise ValueError(f"{name}: symbols {symbols.min()}..{symbols.max()}, expected {-least}..{most}")
    if tensor.row_exponents is not None:
        _check_exponents(name, tensor.row_exponents, symbols.shape)
    with np.errstate(over="ignore"):
        if not np.isfinite(tensor.dequantize()).all():
            raise ValueError(f"{name}: a value is beyond float32's range; its step, levels or row exponents are too "
                             "large")


def check_name(name: str) -> None:
    """Refuse a name that is too long."""
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"{name[:40]}...: {len(name.encode())} bytes of name, expected at most {MAX_NAME}")


def _check_levels(name: str, levels: np.ndarray) -> None:
    if levels.dtype != np.float32 or levels.ndim != 1:
        raise ValueError(f"{name}: levels of type {levels.dtype}{list(levels.shape)}, expected a float32 vector")
    if problem := level_problem(levels):
        raise ValueError(f"{name}: levels {levels}: {problem}")
    with np.errstate(over="ignore"):
        held = levels.astype(np.float16).astype(np.float32)
    if (held != levels).any():
        raise ValueError(f"{name}: levels {levels[held != levels]}, expected numbers that float16 holds exactly")


def _check_exponents(name: str, exponents: np.ndarray, shape: tuple[int, ...]) -> None:
    if exponents.dtype != np.int32 or not shape or exponents.shape != shape[:1]:
        raise ValueError(f"{name}: row exponents of type {exponents.dtype}{list(exponents.shape)}, expected int32 and "
                         f"one for each row of {list(shape)}")
    if exponents.min(initial=0) < -MAX_EXPONENT or exponents.max(initial=0) > MAX_EXPONENT:
        raise ValueError(f"{name}: row exponents {exponents.min()}..{exponents.max()}, expected "
                         f"{-MAX_EXPONENT}..{MAX_EXPONENT}")
