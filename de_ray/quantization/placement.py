"""Place a layer's levels at a width, ready for the file: float16-representable levels and float32 thresholds."""

import math

import numpy as np

from de_ray.checks import require, require_choice
from de_ray.quantization.atoms import Atoms, make_atoms
from de_ray.quantization.ecsq import ecsq_of_atoms
from de_ray.quantization.levels import lloyd_max_levels, nearest_error, uniform_levels

PLACEMENTS = ("ecsq", "lloyd", "uniform")
LARGEST = float(np.finfo(np.float16).max)


def rate_slope(values: np.ndarray, bits: int, rate_weight: float, weights: np.ndarray | None = None) -> float:
    """The squared error that a bit is worth at a width: rate_weight * 2 ln 2 * D_b.

    D_b is the error per survivor of Lloyd-Max levels at that width. At high resolution the distortion-rate curve of a
    scalar quantizer is D(R) = c 2^(-2R), hence -dD/dR = 2 ln 2 D; a Lagrangian D + slope R is least where the curve's
    slope is -slope, so that this choice asks for about the distortion of b-bit Lloyd-Max levels, at the least rate.

    Args:
        values: float32 [n], survivors.
        bits: width, in 1..8.
        rate_weight: >= 0; 1 is the curve's own slope.
        weights: [n], >= 0; None: all 1.
    """
    atoms = make_atoms(values, weights)
    return _slope(atoms, lloyd_max_levels(atoms, 2**bits), rate_weight)


def place(values: np.ndarray, bits: int, placement: str = "ecsq", rate_weight: float = 1.0,
          weights: np.ndarray | None = None, zeros: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Levels for the survivors of a layer.

    Uniform and Lloyd-Max thresholds lie midway between neighbours, zero among them: a survivor nearer to zero than to
    any level becomes zero. ECSQ's thresholds weigh bits too (see `ecsq`). Levels that coincide in float16 are merged.

    Args:
        values: float32 [n], survivors, divided by their row scales where there are any.
        bits: width, in 1..8: at most 2^bits levels besides zero.
        placement: ecsq, lloyd or uniform.
        rate_weight: of ecsq, see `rate_slope`.
        weights: [n], >= 0, such as the divergence's curvature; None: all 1.
        zeros: number of the layer's weights that are zero already; matters to ecsq's rates.

    Returns:
        levels float32 [L], ascending, non-zero, each a float16 number; boundaries float32 [L], ascending: value i of
        the L + 1 sorted values (zero and the levels) holds for boundaries[i - 1] < x <= boundaries[i]. L = 0 for no
        values.

    Raises:
        ValueError: a value is not finite or beyond float16's range, or an argument is out of its range.
    """
    require(1 <= bits <= 8, "bits", bits, "a whole number in 1..8")
    require_choice("quantization.placement", placement, PLACEMENTS)
    require(rate_weight >= 0, "quantization.rate_weight", rate_weight, "0 or more")
    atoms = make_atoms(values, weights)
    greatest = np.abs(atoms.values).max(initial=0.0)
    if greatest > LARGEST:
        raise ValueError(f"values of up to {greatest:g}: expected at most {LARGEST:g}, the largest level that the file "
                         "can hold; divide by a scale first (see scales.layer_exponents)")
    if placement == "uniform":
        return _storable(*_nearest(uniform_levels(atoms, 2**bits)))
    lloyd = lloyd_max_levels(atoms, 2**bits)
    if placement == "lloyd":
        return _storable(*_nearest(lloyd))
    quantizer = ecsq_of_atoms(atoms, 2**bits, _slope(atoms, lloyd, rate_weight), zeros, lloyd=lloyd)
    return _storable(quantizer.levels, quantizer.boundaries)


def _slope(atoms: Atoms, lloyd: np.ndarray, rate_weight: float) -> float:
    if not len(atoms.values):
        return 0.0
    return rate_weight * 2 * math.log(2) * nearest_error(atoms, lloyd) / atoms.total


def _nearest(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels without zero, and the middles between them with zero."""
    table = np.union1d(levels, [0.0])
    return table[table != 0], ((table[1:] + table[:-1]) / 2).astype(np.float32)


def _storable(levels: np.ndarray, boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round levels to float16, and join the intervals of those that coincide with each other or with zero."""
    table = np.sort(np.append(levels, 0.0)).astype(np.float16).astype(np.float32)
    distinct = table[1:] != table[:-1]
    table = np.unique(table)
    return table[table != 0], boundaries[distinct]
