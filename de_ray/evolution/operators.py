"""The operators of the search on one layer's sets, as pure functions of index arrays.

A key is a log saliency, perturbed or not; the least keys are zeroed. With Gumbel noise, times a temperature, taken from
the keys, the k least are a sample without replacement from softmax(-log saliency / temperature): Gumbel top-k
(Kool et al., arXiv:1903.06059).
"""

import numpy as np

TINY = 1e-30
"""Keeps the logarithm of a zero saliency finite."""


def smallest(keys: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k smallest keys, ascending; ties go to the lower position.

    Args:
        keys: [n].
        k: in [0, n].
    """
    if k <= 0:
        return np.empty(0, np.int64)
    if k >= len(keys):
        return np.arange(len(keys))
    part = keys.copy()
    part.partition(k - 1)
    threshold = part[k - 1]
    chosen = (keys <= threshold).nonzero()[0]
    if len(chosen) > k:
        below = (keys < threshold).nonzero()[0]
        ties = (keys == threshold).nonzero()[0][:k - len(below)]
        chosen = _join(below, ties)
    return chosen


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sorted union of disjoint sets."""
    return np.sort(np.concatenate([first, second]))


def _without(members: np.ndarray, n: int) -> np.ndarray:
    """Positions of range(n) that are no members, ascending."""
    outside = np.ones(n, bool)
    outside[members] = False
    return outside.nonzero()[0]


def resize(members: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """A set of k that shares as much with `members` as it can: the least keys enter, the greatest leave.

    Args:
        members: sorted positions, a subset of range(n).
        keys: [n].
        k: in [0, n].

    Returns:
        int64 [k], sorted.
    """
    if k <= len(members):
        return members[smallest(keys[members], k)]
    others = _without(members, len(keys))
    return _join(members, others[smallest(keys[others], k - len(members))])


BAND = 8
"""Draws are made among as many times more keys than are drawn, the smallest."""


def draw(keys: np.ndarray, count: int, temperature: float, rng: np.random.Generator | None) -> np.ndarray:
    """Positions of `count` small keys, ascending: Gumbel top-k among the smallest.

    Args:
        keys: [n].
        count: in [0, n].
        temperature: 0 takes the very smallest.
        rng: needed at a temperature above 0.
    """
    if temperature == 0 or count == 0:
        return smallest(keys, count)
    band = smallest(keys, BAND * count)
    near = keys[band]
    return band[smallest(near - temperature * rng.gumbel(size=len(near)), count)]


def swap(members: np.ndarray, keys: np.ndarray, count: int, temperature: float = 0.0,
         rng: np.random.Generator | None = None) -> np.ndarray:
    """Exchange members of great key for non-members of little key.

    Args:
        members: sorted positions, a subset of range(n).
        keys: [n].
        count: of members to exchange, >= 0; fewer where there are fewer.
        temperature: of the draw; 0 exchanges the very greatest for the very least.
        rng: of the draw; needed at a temperature above 0.
    """
    count = min(count, len(members), len(keys) - len(members))
    if count == 0:
        return members
    others = _without(members, len(keys))
    leavers = members[draw(-keys[members], count, temperature, rng)]
    entrants = others[draw(keys[others], count, temperature, rng)]
    inside = np.zeros(len(keys), bool)
    inside[members] = inside[entrants] = True
    inside[leavers] = False
    return inside.nonzero()[0]


def cross(first: np.ndarray, second: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """The parents' intersection, filled from the rest of their union, and beyond it only where that is too small."""
    in_first, in_second = (np.zeros(len(keys), bool) for _ in range(2))
    in_first[first] = in_second[second] = True
    child = (in_first & in_second).nonzero()[0]
    if len(child) >= k:
        return resize(child, keys, k)
    rest = (in_first ^ in_second).nonzero()[0]
    child = _join(child, rest[smallest(keys[rest], k - len(child))])
    return resize(child, keys, k)


def spread(weights: np.ndarray, room: np.ndarray, budget: int) -> np.ndarray:
    """Whole numbers in [0, room] that sum to `budget`, proportional to `weights` as far as the room allows.

    Args:
        weights: float [L], > 0.
        room: int [L], >= 0.
        budget: in [0, sum of room].

    Returns:
        int64 [L].
    """
    # Water-filling: layers that would overflow are filled and the others share what is left.
    share = budget * weights / max(weights.sum(), TINY)
    full = share > room
    while full.any():
        left = budget - int(room[full].sum())
        share = np.where(full, room, left * weights / max(weights[~full].sum(), TINY))
        over = ~full & (share > room)
        if not over.any():
            break
        full |= over
    counts = np.minimum(np.floor(share), room).astype(np.int64)
    missing = budget - int(counts.sum())
    if missing == 0:
        return counts
    # Largest remainders get the units that rounding down left over.
    for layer in np.argsort(-(share - counts), kind="stable")[:missing]:
        counts[layer] += counts[layer] < room[layer]
    missing = budget - int(counts.sum())
    for layer in np.argsort(-(room - counts), kind="stable") if missing else ():
        more = min(missing, int(room[layer] - counts[layer]))
        counts[layer] += more
        missing -= more
    return counts
