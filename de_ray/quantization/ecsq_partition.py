"""The best partition for entropy-constrained quantization, by dynamic programming.

With ideal rates a level's share of the cost depends on its own interval alone: sum w (x - centroid)^2 - slope n log2(n
/ total). The sum over intervals is what dynamic programming minimises. Unlike plain squared error it breaks the
quadrangle inequality (n log n is convex), so that every pair of ends has to be tried: O(A^2) a level, for A atoms.
"""

import numpy as np

from de_ray.quantization.atoms import Atoms, merge

PARTITION_ATOMS = 512
"""Distinct values up to which the partition is the global optimum."""


def best_partition(atoms: Atoms, count: int, slope: float, zeros: int,
                   allow_zero: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values and bits of the partition of least cost; more than `PARTITION_ATOMS` atoms are merged first.

    Args:
        atoms: at least one.
        count: greatest number of levels besides zero, >= 1.
        slope: squared error that a bit is worth, >= 0.
        zeros: number of weights that are zero already.
        allow_zero: one interval around zero may go to zero; levels then serve values of their own sign alone.

    Returns:
        table float64 [T], ascending: zero (if it is allowed and used) and the centroids; bits float64 [T].
    """
    atoms = merge(atoms, PARTITION_ATOMS)
    n = len(atoms.values)
    split = int(np.searchsorted(atoms.values, 0.0)) if allow_zero else n
    cell, zero_cell, prefix = _costs(atoms, slope, zeros)
    if allow_zero:
        cell[:split, split + 1:] = np.inf  # no level serves both signs
    # Cost of the first j atoms, by j: before the zero interval, and behind it (which may be empty).
    before = np.full(n + 1, np.inf)
    before[0] = 0.0
    entered, behind = np.zeros((count + 1, n + 1), int), np.full((count + 1, n + 1), np.inf)
    starts = np.zeros((2, count + 1, n + 1), int)  # of the last cell, before and behind zero
    from_zero = np.zeros((count + 1, n + 1), bool)
    best = np.full(count + 1, np.inf)
    for k in range(count + 1):
        if k:
            through = before[:, None] + cell  # [start, end]
            starts[0, k] = np.argmin(through, axis=0)
            before = np.take_along_axis(through, starts[0, k][None], 0)[0]
        if not allow_zero:
            best[k] = before[n]
            continue
        through = before[:split + 1, None] + zero_cell[:split + 1]
        entered[k] = np.argmin(through, axis=0)
        behind[k] = np.take_along_axis(through, entered[k][None], 0)[0]
        behind[k, :split] = np.inf
        from_zero[k] = True
        if k:
            through = behind[k - 1, :, None] + cell
            starts[1, k] = np.argmin(through, axis=0)
            longer = np.take_along_axis(through, starts[1, k][None], 0)[0]
            from_zero[k] = behind[k] <= longer
            behind[k] = np.minimum(behind[k], longer)
        best[k] = behind[k, n]
    cells, zero_cells, k, end = [], [], int(np.argmin(best)), n
    while allow_zero and not from_zero[k, end]:
        cells.append((starts[1, k, end], end))
        k, end = k - 1, starts[1, k, end]
    if allow_zero:
        zero_cells, end = [(entered[k, end], end)], entered[k, end]
    while k:
        cells.append((starts[0, k, end], end))
        k, end = k - 1, starts[0, k, end]
    return _table(cells, zero_cells, prefix, zeros)


def _costs(atoms: Atoms, slope: float, zeros: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Costs of atoms i..j-1 as a level's interval and as zero's, both [A + 1, A + 1], and prefix sums of n, w, w x."""
    x, w = atoms.values, atoms.weights
    terms = (atoms.counts, w, w * x, w * x * x)
    n, mass, first, second = (np.concatenate([[0.0], np.cumsum(term)]) for term in terms)
    number, total = n - n[:, None], n[-1] + zeros
    upper = np.arange(len(n)) > np.arange(len(n))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = second - second[:, None] - (first - first[:, None]) ** 2 / (mass - mass[:, None])
        cell = np.where(upper, np.maximum(error, 0.0) - slope * number * np.log2(number / total), np.inf)
        joined = np.where(number + zeros > 0, (number + zeros) * np.log2((number + zeros) / total), 0.0)
    zero_cell = np.where(upper | np.eye(len(n), dtype=bool), second - second[:, None] - slope * joined, np.inf)
    return cell, zero_cell, [n, mass, first]


def _table(cells: list[tuple[int, int]], zero_cells: list[tuple[int, int]], prefix: list[np.ndarray],
           zeros: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and bits of intervals, in order; zero's is left out when nothing is zero."""
    n, mass, first = prefix
    total = n[-1] + zeros
    rows = [((first[j] - first[i]) / (mass[j] - mass[i]), n[j] - n[i]) for i, j in cells]
    rows += [(0.0, n[j] - n[i] + zeros) for i, j in zero_cells if n[j] - n[i] + zeros > 0]
    table, counts = np.array(sorted(rows)).T
    return table, -np.log2(counts / total)
