"""Sorted, weighted atoms: the form in which level placement sees a layer's survivors."""

from dataclasses import dataclass

import numpy as np

MAX_ATOMS = 2048
"""Distinct values up to which placement is exact."""
WEIGHT_FLOOR = 1e-6
"""Least weight of a value, as a share of the mean weight: a curvature of zero leaves a level's centroid undefined."""


@dataclass(frozen=True)
class Atoms:
    """Values in ascending order, equal and (where there are many) neighbouring ones merged.

    Merging changes no centroid of a group of whole atoms, and shifts every assignment's distortion by the same
    constant.
    """

    values: np.ndarray
    """float64 [A], ascending: the weighted mean of each atom's values."""
    weights: np.ndarray
    """float64 [A], the sum of each atom's weights."""
    counts: np.ndarray
    """float64 [A], the number of values in each atom."""
    low: np.ndarray
    """float32 [A], the least value of each atom."""
    high: np.ndarray
    """float32 [A], the greatest value of each atom."""
    scatter: float
    """Weighted squared error within atoms, which no placement can avoid; 0 when nothing was merged."""

    @property
    def total(self) -> float:
        """Number of values."""
        return float(self.counts.sum())


def make_atoms(values: np.ndarray, weights: np.ndarray | None = None, limit: int = MAX_ATOMS) -> Atoms:
    """Sort and merge values.

    Up to `limit` distinct values stay as they are. More are merged into cells with exact centroids, cut both at `limit
    / 2` equal counts (resolution where values are many) and at `limit / 2` equal widths (resolution in the tails), and
    at zero.

    Args:
        values: float32 [n].
        weights: [n], >= 0, finite; None: all 1.
        limit: number of atoms, >= 2; one more where zero cuts a cell.

    Raises:
        ValueError: a value or weight is not finite, a weight is negative, or shapes differ.
    """
    values = np.asarray(values, np.float32).ravel()
    weights = _checked_weights(weights, values)
    if not np.isfinite(values).all():
        raise ValueError("values to quantize: expected finite numbers, found NaN or infinity; the student has diverged")
    distinct, member, counts = np.unique(values, return_inverse=True, return_counts=True)
    mass = np.bincount(member, weights, len(distinct))
    return merge(Atoms(distinct.astype(np.float64), mass, counts.astype(np.float64), distinct, distinct, 0.0), limit)


def merge(atoms: Atoms, limit: int) -> Atoms:
    """Merge neighbours until at most `limit` atoms are left, one more where zero cuts a cell; see `make_atoms`."""
    x, w, n = atoms.values, atoms.weights, atoms.counts
    if len(x) <= limit:
        return atoms
    by_width = np.searchsorted(x, np.linspace(x[0], x[-1], limit // 2 + 1)[:-1])
    by_count = np.searchsorted(np.cumsum(n), np.arange(limit // 2) * (n.sum() / (limit // 2)), side="right")
    starts = np.unique(np.concatenate([[0], by_width, by_count, np.searchsorted(x, [0.0])]))
    starts = starts[starts < len(x)]
    sizes = np.diff(np.append(starts, len(x)))
    mass = np.add.reduceat(w, starts)
    low, high = atoms.low[starts], atoms.high[np.append(starts[1:], len(x)) - 1]
    # Rounding must not push a mean out of its atom, or atoms might lose their order.
    mean = np.clip(np.add.reduceat(w * x, starts) / mass, low, high)
    scatter = atoms.scatter + float(np.sum(w * (x - np.repeat(mean, sizes)) ** 2))
    return Atoms(mean, mass, np.add.reduceat(n, starts), low, high, scatter)


def _checked_weights(weights: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """float64 weights of the values' shape, none below `WEIGHT_FLOOR` of their mean."""
    if weights is None:
        return np.ones(values.shape, np.float64)
    weights = np.asarray(weights, np.float64).ravel()
    if weights.shape != values.shape:
        raise ValueError(f"weights of shape {weights.shape}: expected one for each of the {len(values)} values")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights of values to quantize: expected finite numbers of 0 or more")
    mean = weights.mean() if len(weights) else 0.0
    return np.maximum(weights, WEIGHT_FLOOR * mean) if mean > 0 else np.ones(values.shape, np.float64)
