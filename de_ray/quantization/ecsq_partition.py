"""The best partition for entropy-constrained quantization, by dynamic programming.

With ideal rates a level's share of the cost depends on its own interval alone: sum w (x - centroid)^2 - slope n log2(n
/ total). The sum over intervals is what dynamic programming minimises. Unlike plain squared error it breaks the
quadrangle inequality (n log n is convex), so that every pair of ends has to be tried: O(A^2) a level, for A atoms.
"""

import numpy as np

from de_ray.quantization.atoms import Atoms, merge
from de_ray.quantization.cells import interval_costs, last_cells

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
    x, w = atoms.values, atoms.weights
    number, mass, first, second = (np.concatenate([[0.0], np.cumsum(term)])
                                   for term in (atoms.counts, w, w * x, w * x * x))
    cell, zero_cell = interval_costs(number, mass, first, second, float(zeros), float(slope))
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
            before, starts[0, k] = last_cells(before, cell)
        if not allow_zero:
            best[k] = before[n]
            continue
        behind[k], entered[k] = last_cells(before[:split + 1], zero_cell)
        behind[k, :split] = np.inf
        from_zero[k] = True
        if k:
            longer, starts[1, k] = last_cells(behind[k - 1], cell)
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
    return _table(cells, zero_cells, number, mass, first, zeros)


def _table(cells: list[tuple[int, int]], zero_cells: list[tuple[int, int]], n: np.ndarray, mass: np.ndarray,
           first: np.ndarray, zeros: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids and bits of intervals, in order; zero's is left out when nothing is zero.

    Args:
        cells, zero_cells: intervals, as first atom and end.
        n, mass, first: float64 [A + 1], prefix sums of counts, w and w x.
        zeros: number of weights that are zero already.
    """
    total = n[-1] + zeros
    rows = [((first[j] - first[i]) / (mass[j] - mass[i]), n[j] - n[i]) for i, j in cells]
    rows += [(0.0, n[j] - n[i] + zeros) for i, j in zero_cells if n[j] - n[i] + zeros > 0]
    table, counts = np.array(sorted(rows)).T
    return table, -np.log2(counts / total)
