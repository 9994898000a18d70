"""Level placement by uniform cells and by Lloyd-Max.

Lloyd-Max levels (Lloyd 1982, Max 1960) are the centroids of a partition of the line that minimises squared error.
Iterating assignments and centroids finds a local minimum only; in one dimension dynamic programming finds the global
one (Bruce 1965), in O(k n log n) since the best split moves monotonically with the right end (divide and conquer; cf.
Groenlund et al., arXiv:1701.07204).
"""

from collections.abc import Callable

import numpy as np

from de_ray.quantization.atoms import Atoms, make_atoms


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
    prefix = [np.concatenate([[0.0], np.cumsum(term)]) for term in (w, w * x, w * x * x)]

    def error(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Weighted squared error of atoms i..j-1 about their centroid."""
        mass, first, second = (p[j] - p[i] for p in prefix)
        return second - first * first / mass

    ends = np.arange(1, n + 1)
    best = np.concatenate([[0.0], error(np.zeros(n, int), ends)])  # [n + 1], by number of atoms covered
    splits = np.zeros((count, n + 1), np.int32)
    for k in range(1, count):
        best, splits[k] = _one_more_cell(best, k, n, error)
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


def _one_more_cell(best: np.ndarray, k: int, n: int,
                   error: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """From k to k + 1 cells.

    Args:
        best: [n + 1], least error of the first j atoms in k cells.
        k: cells so far.
        n: atoms.
        error: error of a cell from its first atom and its end.

    Returns:
        The same for k + 1 cells, and the start of each optimum's last cell; both [n + 1].
    """
    ends = np.arange(k + 1, n + 1)  # k + 1 cells need at least so many atoms
    value, split = np.empty(len(ends)), np.empty(len(ends), int)
    stride = 1 << (len(ends) - 1).bit_length()
    while stride:
        # Every second multiple of the stride; the ones between are known, and bound the split from both sides.
        at = np.arange(stride - 1, len(ends), 2 * stride)
        if len(at):
            end = ends[at]
            low = np.where(at >= stride, split[at - stride], k)
            known = at + stride < len(ends)
            high = np.minimum(np.where(known, split[np.where(known, at + stride, at)], n), end - 1)
            length = high - low + 1
            first = np.concatenate([[0], np.cumsum(length)[:-1]])
            start = np.arange(length.sum()) - np.repeat(first - low, length)
            cost = best[start] + error(start, np.repeat(end, length))
            value[at] = np.minimum.reduceat(cost, first)
            hits = np.flatnonzero(cost == np.repeat(value[at], length))
            split[at] = start[hits[np.searchsorted(hits, first)]]
        stride //= 2
    filler = np.full(k + 1, np.inf)
    return np.concatenate([filler, value]), np.concatenate([np.zeros(k + 1, int), split])


def _centroids(atoms: Atoms, cuts: np.ndarray) -> np.ndarray:
    """Weighted means of the cells that start at atom 0 and at each cut; empty cells are left out."""
    starts = np.unique(np.concatenate([[0], cuts]))
    starts = starts[starts < len(atoms.values)]
    return np.add.reduceat(atoms.weights * atoms.values, starts) / np.add.reduceat(atoms.weights, starts)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"{count} levels: expected at least 1")
