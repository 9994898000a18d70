"""Biases and other small dense tensors, in whole multiples of a step."""

import logging
from collections.abc import Callable, Mapping

import numpy as np

from de_ray.codec.tensor import QuantizedTensor

log = logging.getLogger(__name__)

FINEST = 20
"""Of the ladder: a step of 2^-20 of a tensor's greatest magnitude is about float32's own rounding of sums of such
values."""


def quantize_dense(name: str, values: np.ndarray, step: float) -> QuantizedTensor:
    """Round a tensor to whole multiples of a step.

    Args:
        name: state-dict key.
        values: float32, of any shape.
        step: above 0.

    Raises:
        ValueError: the step is not above 0, or so small that a multiple leaves 24 bits; a value is not finite.
    """
    step = np.float32(step)
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step={step} of {name}: expected a finite number above 0")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinity; the student has diverged")
    multiples = np.rint(np.asarray(values, np.float64) / np.float64(step))
    # float32 holds whole numbers up to 2^24 exactly, and decoding multiplies in float32.
    if np.abs(multiples).max(initial=0.0) > 2**24:
        raise ValueError(f"step={step} of {name}: expected at least {np.abs(values).max() / 2**24:g}, 2^-24 of its "
                         "greatest value")
    return QuantizedTensor(name, multiples.astype(np.int32), step=step)


def relative_steps(tensors: Mapping[str, np.ndarray], rung: int) -> dict[str, float]:
    """The step of each tensor at a rung of the ladder: 2^-rung of its greatest magnitude, 1 for tensors of zeros."""
    greatest = {name: float(np.abs(values).max(initial=0.0)) for name, values in tensors.items()}
    return {name: float(np.float32(top * 2.0**-rung)) or 1.0 for name, top in greatest.items()}


def quantize_biases(tensors: Mapping[str, np.ndarray], measure: Callable[[dict[str, np.ndarray]], float],
                    limit: float) -> dict[str, QuantizedTensor]:
    """Quantize tensors by the coarsest common relative step whose measured divergence stays within a limit.

    The ladder halves the step from rung to rung: 1, 1/2, ... 2^-20 of each tensor's greatest magnitude.

    Args:
        tensors: float32 by state-dict key.
        measure: divergence of the student with the given values in these tensors' place; non-finite for failures.
        limit: greatest divergence allowed.

    Returns:
        The tensors in coded form, by name. When no step is within the limit, those of the finest (and a warning is
        logged): the limit must have been passed before, since that step is about float32's own rounding.
    """
    if not tensors:
        return {}
    for rung in range(FINEST + 1):
        steps = relative_steps(tensors, rung)
        quantized = {name: quantize_dense(name, values, steps[name]) for name, values in tensors.items()}
        divergence = measure({name: tensor.dequantize() for name, tensor in quantized.items()})
        if np.isfinite(divergence) and divergence <= limit:
            return quantized
    log.warning("no step of biases keeps the divergence within %g; the finest one gives %g", limit, divergence)
    return quantized
