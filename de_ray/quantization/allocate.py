"""Widths that a model of adding rises finds best: warm starts for the sweep.

Shoham and Gersho 1988: for independent items, minimising bytes + mu * divergence picks each item's width by itself, and
the ladder of multipliers mu walks the lower convex hull of all assignments.
"""

from functools import partial

import numpy as np

from de_ray.quantization.goal import Goal
from de_ray.quantization.table import SensitivityTable

LADDER = 64
"""Multipliers, evenly spaced in their logarithm over the range in which any layer's width changes."""


def lagrangian(table: SensitivityTable, multiplier: float) -> tuple[int, ...]:
    """The width of each layer that minimises bytes + multiplier * divergence; the wider one on a tie."""
    divergence = np.where(np.isfinite(table.divergence), table.divergence, np.inf)
    cost = table.bytes + multiplier * divergence  # [layers, widths]
    last = len(table.widths) - 1
    return tuple(table.widths[last - int(np.argmin(row[::-1]))] for row in cost)


def allocations(table: SensitivityTable) -> list[tuple[int, ...]]:
    """Distinct assignments along the ladder of multipliers, from the fewest bytes to the least divergence."""
    exchange = []
    for sizes, divergence in zip(table.bytes, table.divergence, strict=True):
        finite = np.isfinite(divergence)
        sizes, divergence = sizes[finite], divergence[finite]
        gain, saved = np.subtract.outer(sizes, sizes), np.subtract.outer(divergence, divergence).T
        useful = (gain > 0) & (saved > 0)
        exchange.extend((gain[useful] / saved[useful]).tolist())
    if not exchange:
        return [lagrangian(table, 1.0)]
    ladder = np.geomspace(min(exchange) / 2, max(exchange) * 2, LADDER)
    return list(dict.fromkeys(lagrangian(table, multiplier) for multiplier in ladder))


def warm_starts(table: SensitivityTable, goal: Goal, count: int) -> list[tuple[int, ...]]:
    """The assignments to try first: those of the ladder and the uniform ones, nearest to the goal first.

    Args:
        table: gives the model.
        goal: what the sweep is after.
        count: how many, >= 1; fewer where there are no more.

    Returns:
        Widths by layer.
    """
    uniform = [(width,) * len(table.layers) for width in table.widths]
    return sorted(dict.fromkeys([*allocations(table), *uniform]), key=partial(goal.distance, table))[:count]
