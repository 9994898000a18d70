"""Scales a row, as whole exponents of 2^(1/8): what they are, and what they are worth."""

import numpy as np

from de_ray.codec.header import MAX_EXPONENT
from de_ray.codec.tensor import EIGHTH_POWERS

STEPS = 8
"""Exponents an octave."""
COMFORTABLE = (2.0**-8, 2.0**15)
"""Range of a layer's greatest magnitude in which float16 levels need no scale: below it small levels lose digits, above
it great ones overflow."""


def row_scales(exponents: np.ndarray) -> np.ndarray:
    """float32 [R], 2^(exponents / 8) with the bits that `QuantizedTensor.dequantize` multiplies by."""
    octave, eighth = np.divmod(exponents, STEPS)
    return np.ldexp(EIGHTH_POWERS[eighth], octave).astype(np.float32)


def row_exponents(weight: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Exponents that bring the survivors of each row to a root mean square of about 1.

    Args:
        weight: float32 [R, ...], zero where pruned.
        weights: of the same shape, >= 0; None: all 1.

    Returns:
        int32 [R]; a row without survivors takes its predecessor's exponent, which costs nothing to code.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    survivors = rows != 0
    mass = np.where(survivors, 1.0 if weights is None else np.asarray(weights, np.float64).reshape(rows.shape), 0.0)
    # A row whose survivors all have zero curvature counts them alike.
    mass = np.where(mass.sum(1, keepdims=True) > 0, mass, survivors)
    total = mass.sum(1)
    alive = total > 0
    if not alive.any():
        return np.zeros(len(rows), np.int32)
    mean_square = (mass * rows**2).sum(1)[alive] / total[alive]
    exponents = np.rint(STEPS / 2 * np.log2(mean_square))
    # Where weights make the mean ignore the greatest value, float16 must hold it still.
    greatest = np.abs(rows).max(1)[alive]
    exponents = np.maximum(exponents, np.ceil(STEPS * np.log2(greatest / COMFORTABLE[1])))
    exponents = np.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT).astype(np.int32)
    previous = np.maximum(np.cumsum(alive) - 1, 0)
    return exponents[previous]


def layer_exponents(weight: np.ndarray) -> np.ndarray | None:
    """One exponent for all rows when float16 levels could not hold the layer's values, else None.

    Args:
        weight: float32 [R, ...].

    Returns:
        int32 [R], all alike and whole octaves, that bring the greatest magnitude into [2, 4) (below 2^-100 to less);
        None where not needed.

    Raises:
        ValueError: a weight is not finite or 2^100 or more, beyond what the file's scales can hold.
    """
    greatest = float(np.max(np.abs(weight), initial=0.0))
    if not greatest < 2.0**(MAX_EXPONENT // STEPS):
        raise ValueError(f"a weight of magnitude {greatest:g}: expected finite ones below 2^100; the student has "
                         "diverged")
    if greatest == 0 or COMFORTABLE[0] <= greatest <= COMFORTABLE[1]:
        return None
    octave = int(np.frexp(greatest)[1]) - 2
    return np.full(len(weight), max(STEPS * octave, -MAX_EXPONENT), np.int32)
