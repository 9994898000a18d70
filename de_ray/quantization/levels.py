"""Level placement by uniform cells and by Lloyd-Max.

Lloyd-Max levels (Lloyd 1982, Max 1960) are the centroids of a partition of the line that minimises squared error.
Iterating assignments and centroids finds a local minimum only; in one dimension dynamic programming finds the global
one (Bruce 1965), in O(k n log n) since the best split moves monotonically with the right end (divide and conquer; cf.
Groenlund et al., arXiv:1701.07204).
"""

import numpy as np

from de_ray.quantization.atoms import Atoms, make_atoms
from de_ray.quantization.cells import one_more_cell


def uniform(values: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Centroids of `count` equally wide cells that span the values; cells without values get no level.

    Args:
        values: float32 [n].
        count: number of cells, >= 1.
        weights: [n], >= 0; None: all 1.

    Returns:
        float64 [L], L <= count, ascending; empty when there are no values.
    """
    return uniform_levels(make_atoms(values, weights), count)


def lloyd_max(values: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Levels of least weighted squared error, globally optimal.

    Exact for up to `atoms.MAX_ATOMS` distinct values. More are first merged into that many atoms with exact centroids
    (see `atoms.make_atoms`), and the optimum is the best partition into whole atoms.

    Args:
        values: float32 [n].
        count: number of levels, >= 1.
        weights: [n], >= 0; None: all 1.

    Returns:
        float64 [L], L = min(count, distinct values), ascending.
    """
    return lloyd_max_levels(make_atoms(values, weights), count)


def uniform_levels(atoms: Atoms, count: int) -> np.ndarray:
    """`uniform` of atoms."""
    _check_count(count)
    if not len(atoms.values):
        return np.empty(0)
    low, high = atoms.values[0], atoms.values[-1]
    inner = low + (high - low) * np.arange(1, count) / count
    return _centroids(atoms, np.searchsorted(atoms.values, inner, side="right"))


def lloyd_max_levels(atoms: Atoms, count: int) -> np.ndarray:
    """`lloyd_max` of atoms."""
    _check_count(count)
    n = len(atoms.values)
    if count >= n:
        return atoms.values.copy()
    # Prefix sums about the mean, so that squares do not cancel.
    x = atoms.values - np.average(atoms.values, weights=atoms.weights)
    w = atoms.weights
    mass, first, second = (np.concatenate([[0.0], np.cumsum(term)]) for term in (w, w * x, w * x * x))
    # [n + 1], by number of atoms covered: the error of one cell about its centroid.
    best = np.concatenate([[0.0], second[1:] - first[1:] * first[1:] / mass[1:]])
    splits = np.zeros((count, n + 1), np.int32)
    for k in range(1, count):
        best, splits[k] = one_more_cell(best, k, mass, first, second)
    cuts, end = [], n
    for k in range(count - 1, 0, -1):
        end = int(splits[k, end])
        cuts.append(end)
    return _centroids(atoms, np.array(cuts[::-1], int))


def nearest_error(atoms: Atoms, levels: np.ndarray) -> float:
    """Weighted squared error of the values when each goes to its nearest level."""
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[np.searchsorted(middles, atoms.values)]
    return float(np.sum(atoms.weights * (atoms.values - nearest) ** 2)) + atoms.scatter


def _centroids(atoms: Atoms, cuts: np.ndarray) -> np.ndarray:
    """Weighted means of the cells that start at atom 0 and at each cut; empty cells are left out."""
    starts = np.unique(np.concatenate([[0], cuts]))
    starts = starts[starts < len(atoms.values)]
    return np.add.reduceat(atoms.weights * atoms.values, starts) / np.add.reduceat(atoms.weights, starts)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"{count} levels: expected at least 1")
