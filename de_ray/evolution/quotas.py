"""How many zeros each layer takes, compiled."""

import numpy as np
from numba import njit

from de_ray.evolution.operators import TINY


@njit(nogil=True, cache=True)
def _greatest(values):  # pragma: no cover - compiled
    """The first position of the greatest value."""
    found = 0
    for i in range(1, len(values)):
        if values[i] > values[found]:
            found = i
    return found


@njit(nogil=True, cache=True)
def spread(weights, room, budget):  # pragma: no cover - compiled
    """Whole numbers in [0, room] that sum to `budget`, proportional to `weights` as far as the room allows.

    Args:
        weights: float64 [L], > 0.
        room: int64 [L], >= 0.
        budget: in [0, sum of room].

    Returns:
        int64 [L].
    """
    # Water-filling: layers that would overflow are filled and the others share what is left.
    layers = len(weights)
    full = np.zeros(layers, np.bool_)
    share = np.empty(layers, np.float64)
    while True:
        left, total = float(budget), 0.0
        for layer in range(layers):
            if full[layer]:
                left -= room[layer]
            else:
                total += weights[layer]
        over = False
        for layer in range(layers):
            share[layer] = room[layer] if full[layer] else left * (weights[layer] / max(total, TINY))
            if share[layer] > room[layer]:
                full[layer] = over = True
        if not over:
            break
    counts, missing = np.empty(layers, np.int64), budget
    for layer in range(layers):
        counts[layer] = min(int(np.floor(share[layer])), room[layer])
        missing -= counts[layer]
        share[layer] -= counts[layer]
    # Largest remainders get the units that rounding down left over; what there is no room for goes where there is most.
    for _ in range(min(missing, layers)):
        largest = _greatest(share)
        share[largest] = -1.0
        if counts[largest] < room[largest]:
            counts[largest] += 1
            missing -= 1
    while missing > 0:
        for layer in range(layers):
            share[layer] = room[layer] - counts[layer]
        widest = _greatest(share)
        more = min(missing, room[widest] - counts[widest])
        counts[widest] += more
        missing -= more
    return counts


@njit(nogil=True, cache=True)
def move(field, log_shift, quotas):  # pragma: no cover - compiled
    """Move quota between the free layers, budget kept: a layer's survivors are multiplied by exp(log_shift)."""
    layers, total = len(quotas), 0
    room, reach, weights = np.zeros(layers, np.int64), np.zeros(layers, np.int64), np.full(layers, TINY)
    for layer in range(layers):
        if field.is_free[layer]:
            room[layer] = field.room[layer]
            reach[layer] = field.alive_starts[layer + 1] - field.alive_starts[layer]
            weights[layer] = max((room[layer] - quotas[layer]) * np.exp(log_shift[layer]), TINY)
            total += room[layer]
    survivors, beyond = spread(weights, room, total - field.free_total), np.int64(0)
    for layer in range(layers):
        if field.is_free[layer]:
            wanted = room[layer] - survivors[layer]
            quotas[layer] = min(wanted, reach[layer])
            beyond += wanted - quotas[layer]
            reach[layer] -= quotas[layer]
        weights[layer] = reach[layer] + TINY
    if beyond > 0:  # what is out of a layer's reach goes to the others, by the reach that they have left
        more = spread(weights, reach, beyond)
        for layer in range(layers):
            quotas[layer] += more[layer]
