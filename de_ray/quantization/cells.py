"""Steps of dynamic programming over cells of sorted atoms, compiled."""

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, error_model="numpy")  # no check of each division
def one_more_cell(best, k, mass, first, second):  # pragma: no cover - compiled
    """From k to k + 1 cells of least squared error. The best split moves monotonically with the right end.

    Args:
        best: float64 [n + 1], least error of the first j atoms in k cells.
        k: cells so far, >= 1.
        mass, first, second: float64 [n + 1], prefix sums of w, w x and w x^2.

    Returns:
        The same for k + 1 cells, and int32 [n + 1], the start of each optimum's last cell.
    """
    n = len(best) - 1
    value, split = np.full(n + 1, np.inf), np.zeros(n + 1, np.int32)
    count = n - k  # k + 1 cells need at least so many atoms
    stride = 1
    while stride < count:
        stride *= 2
    while stride:
        # Every second multiple of the stride; the ones between are known, and bound the split from both sides.
        for at in range(stride - 1, count, 2 * stride):
            end = at + k + 1
            low = split[end - stride] if at >= stride else k
            high = min(split[end + stride], end - 1) if at + stride < count else end - 1
            for start in range(low, high + 1):
                moment = first[end] - first[start]
                cost = best[start] + (second[end] - second[start] - moment * moment / (mass[end] - mass[start]))
                if cost < value[end]:
                    value[end], split[end] = cost, start
        stride //= 2
    return value, split


@njit(nogil=True, cache=True, error_model="numpy")
def interval_costs(number, mass, first, second, zeros, slope):  # pragma: no cover - compiled
    """Lagrangian costs of atoms i..j-1 as a level's interval, and as zero's, with ideal rates.

    Args:
        number, mass, first, second: float64 [n + 1], prefix sums of counts, w, w x and w x^2.
        zeros: float64, weights that are zero already.
        slope: float64, squared error that a bit is worth.

    Returns:
        Both float64 [n + 1, n + 1], infinite where i > j; no level has an empty interval.
    """
    n = len(number)
    cell, zero_cell, total = np.full((n, n), np.inf), np.full((n, n), np.inf), number[-1] + zeros
    for i in range(n):
        zero_cell[i, i] = -slope * (zeros * math.log2(zeros / total) if zeros > 0 else 0.0)
        for j in range(i + 1, n):
            count, moment, square = number[j] - number[i], first[j] - first[i], second[j] - second[i]
            error = max(square - moment**2 / (mass[j] - mass[i]), 0.0)
            cell[i, j] = error - slope * count * math.log2(count / total)
            zero_cell[i, j] = square - slope * ((count + zeros) * math.log2((count + zeros) / total))
    return cell, zero_cell


@njit(nogil=True, cache=True)
def last_cells(before, cell):  # pragma: no cover - compiled
    """The least of before[i] + cell[i, j] by j, and the first i that has it.

    Args:
        before: float64 [m], infinite where there is no way so far.
        cell: float64 [n, n], n >= m, infinite where i > j.

    Returns:
        float64 [n], int64 [n]; 0 where all are infinite.
    """
    value, start = np.full(len(cell), np.inf), np.zeros(len(cell), np.int64)
    for i in range(len(before)):
        if before[i] < np.inf:
            for j in range(i, len(cell)):
                cost = before[i] + cell[i, j]
                if cost < value[j]:
                    value[j], start[j] = cost, i
    return value, start


@njit(nogil=True, cache=True)
def ordered(x, w, n, table, bits, slope):  # pragma: no cover - compiled
    """Split sorted atoms into one interval (it may be empty) for each value of the table, at least cost.

    Args:
        x, w, n: float64 [A], atoms' values, weights and counts.
        table, bits: float64 [T], values in ascending order and what each costs.
        slope: float64, squared error that a bit is worth.

    Returns:
        int64 [A], indices into the table.
    """
    atoms, values = len(x), len(table)
    starts = np.zeros((values, atoms + 1), np.int32)
    best = np.empty(atoms + 1)  # least cost of the first a atoms with the first values alone
    for t in range(values):
        total, least, at = 0.0, np.inf, 0
        for a in range(atoms + 1):
            if a:
                total += w[a - 1] * (x[a - 1] - table[t])**2 + slope * bits[t] * n[a - 1]
            if t == 0:
                best[a] = total
                continue
            gain = best[a] - total
            if gain <= least:
                least, at = gain, a
            starts[t, a] = at
            best[a] = total + least
    member, end = np.zeros(atoms, np.int64), atoms
    for t in range(values - 1, 0, -1):
        member[starts[t, end]:end] = t
        end = starts[t, end]
    return member
