"""Entropy-constrained scalar quantization: levels and thresholds of least distortion + slope x rate.

Chou, Lookabaugh, Gray, "Entropy-constrained vector quantization" (1989), in one dimension: assignments by Lagrangian
cost, centroids and rates by turns, each optimal given the others, so that the cost never rises. Assignments are the
optimal *ordered* ones (each level takes an interval), by dynamic programming over levels, since weighted values have no
thresholds in closed form. It starts at the best partition of at most 512 atoms (see `ecsq_partition`), which is the
global optimum already where a layer has no more distinct values, and at Lloyd-Max levels, which are the better start
when levels are nearly as many as those atoms.
"""

from dataclasses import dataclass

import numpy as np

from de_ray.quantization.atoms import Atoms, make_atoms
from de_ray.quantization.cells import ordered
from de_ray.quantization.ecsq_partition import best_partition
from de_ray.quantization.levels import lloyd_max_levels

MAX_ITERATIONS = 200
TOLERANCE = 1e-6
"""Relative fall of the cost below which iteration ends."""


@dataclass(frozen=True)
class Quantizer:
    """Levels and the thresholds between them."""

    levels: np.ndarray
    """float64 [L], ascending; zero is not among them."""
    boundaries: np.ndarray
    """float32 [L], thresholds between the L + 1 sorted values that zero and the levels make: value i holds for
    boundaries[i - 1] < x <= boundaries[i]."""
    costs: np.ndarray
    """float64 [iterations], Lagrangian cost after each update."""


def ecsq(values: np.ndarray, count: int, slope: float, weights: np.ndarray | None = None, zeros: int = 0,
         allow_zero: bool = True) -> Quantizer:
    """Minimise sum w (x - q)^2 + slope * bits, where a level's bits are -log2 of its share.

    Shares are those of the layer's whole alphabet, zero and the levels, `zeros` included: at 90 % sparsity a survivor
    that becomes zero saves its place in the mask, more than 3 bits. With `allow_zero` a level serves values of its own
    sign alone. The result is the global optimum for up to `ecsq_partition.PARTITION_ATOMS` distinct values, and close
    to it for more, which are merged into atoms first (see `atoms.make_atoms`). Levels that nothing uses are dropped.

    Args:
        values: float32 [n], the survivors.
        count: number of levels besides zero, >= 1.
        slope: squared error (weighted) that a bit is worth, >= 0.
        weights: [n], >= 0; None: all 1.
        zeros: number of weights that are zero already.
        allow_zero: a survivor may become zero.
    """
    return ecsq_of_atoms(make_atoms(values, weights), count, slope, zeros, allow_zero)


def ecsq_of_atoms(atoms: Atoms, count: int, slope: float, zeros: int = 0, allow_zero: bool = True,
                  lloyd: np.ndarray | None = None) -> Quantizer:
    """`ecsq` of atoms; `lloyd` are their Lloyd-Max levels of that number, where they are known."""
    if not slope >= 0:
        raise ValueError(f"slope={slope}: expected a number of 0 or more")
    if not len(atoms.values):
        return Quantizer(np.empty(0), np.empty(0, np.float32), np.zeros(1))
    starts = [best_partition(atoms, count, slope, zeros, allow_zero)]
    if lloyd is None:
        lloyd = lloyd_max_levels(atoms, count)
    table = np.union1d(lloyd, [0.0]) if allow_zero else lloyd
    starts.append((table, np.zeros(len(table))))  # equal bits: assigned to the nearest value
    return min((_descend(atoms, *start, slope, zeros, allow_zero) for start in starts), key=lambda q: q.costs[-1])


def _descend(atoms: Atoms, table: np.ndarray, bits: np.ndarray, slope: float, zeros: int,
             allow_zero: bool) -> Quantizer:
    """Iterate from given values (zero and levels) and bits until the cost stays."""
    member = _assign(atoms, table, bits, slope, allow_zero)
    costs: list[float] = []
    while True:
        table, bits, member, cost = _update(atoms, table, member, slope, zeros, allow_zero)
        costs.append(cost)
        if len(costs) == MAX_ITERATIONS or (len(costs) > 1 and costs[-2] - cost <= TOLERANCE * abs(cost)):
            break
        member = _assign(atoms, table, bits, slope, allow_zero)
    return Quantizer(table[table != 0], _boundaries(atoms, table, member), np.array(costs))


def _update(atoms: Atoms, table: np.ndarray, member: np.ndarray, slope: float, zeros: int,
            allow_zero: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Centroids and bits of the values in use, for given assignments.

    Returns:
        table [T], bits [T], member [A] (into the new table), the Lagrangian cost.
    """
    zero_row = (table == 0) & allow_zero
    counts = np.bincount(member, atoms.counts, len(table)) + zeros * zero_row
    used = counts > 0
    mass = np.bincount(member, atoms.weights, len(table))[used]
    moment = np.bincount(member, atoms.weights * atoms.values, len(table))[used]
    counts, zero_row, member = counts[used], zero_row[used], (np.cumsum(used) - 1)[member]
    table = np.where(zero_row, 0.0, moment / np.where(zero_row, 1.0, mass))
    total = atoms.total + zeros
    bits = -np.log2(counts / total)
    rate = float(counts @ bits)
    if zeros and not allow_zero:
        rate -= zeros * np.log2(zeros / total)
    error = float(np.sum(atoms.weights * (atoms.values - table[member]) ** 2)) + atoms.scatter
    return table, bits, member, error + slope * rate


def _assign(atoms: Atoms, table: np.ndarray, bits: np.ndarray, slope: float, allow_zero: bool) -> np.ndarray:
    """The ordered assignment of least cost: for each atom its index into `table`, int [A]."""
    x, w, n, slope = atoms.values, atoms.weights, atoms.counts, float(slope)
    if not allow_zero:
        return ordered(x, w, n, table, bits, slope)
    split = int(np.searchsorted(atoms.values, 0.0))
    below, above = int(np.searchsorted(table, 0.0)), int(np.searchsorted(table, 0.0, side="right"))
    parts = []
    if split:
        parts.append(ordered(x[:split], w[:split], n[:split], table[:above], bits[:above], slope))
    if split < len(atoms.values):
        parts.append(below + ordered(x[split:], w[split:], n[split:], table[below:], bits[below:], slope))
    return np.concatenate(parts)


def _boundaries(atoms: Atoms, table: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Thresholds that reproduce the assignment: the middle of two neighbours, moved to where the assignment changes.

    A value of the table is a level or zero; zero is inserted with an empty interval where the table lacks it.
    """
    if 0.0 not in table:
        at = int(np.searchsorted(table, 0.0))
        table, member = np.insert(table, at, 0.0), member + (member >= at)
    ends = np.searchsorted(member, np.arange(len(table) - 1), side="right")  # [L], atoms up to each threshold
    low = np.concatenate([[-np.inf], atoms.high]).astype(np.float32)[ends]
    # One float below the next atom, which lies above the threshold.
    high = np.nextafter(np.concatenate([atoms.low, [np.inf]]).astype(np.float32)[ends], np.float32(-np.inf))
    return np.clip(((table[1:] + table[:-1]) / 2).astype(np.float32), low, high)
