"""The operators of the search on one layer's sets, compiled: arrays say of each position whether it is a member.

A key is a log saliency, perturbed or not; the least keys are zeroed. With Gumbel noise, times a temperature, taken from
the keys, the k least are a sample without replacement from softmax(-log saliency / temperature): Gumbel top-k
(Kool et al., arXiv:1903.06059).
"""

import numpy as np
from numba import njit

from de_ray.evolution.draws import gumbels

TINY = 1e-30
"""Keeps the logarithm of a zero saliency finite."""
BAND = 8
"""Draws are made among as many times more keys than are drawn, the smallest."""
BINS = 256
"""Of the histogram by which a threshold is found."""
PART = 4096
"""Keys that are looked at several times before others are."""
MANY, SAMPLE, MARGIN = 2**16, 2**12, 2**7
"""Keys of which a sample is looked at first; the size of that; and by how many of its ranks, about four standard
deviations, a threshold may be off to either side."""
FEW = 24
"""Keys that are rather sorted than counted."""


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
        chosen = np.sort(np.concatenate([below, ties]))
    return chosen


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})  # so that several keys are compared at a time; there is no NaN
def _bounds(keys):  # pragma: no cover - compiled
    low = high = keys[0]
    for key in keys:
        low, high = min(low, key), max(high, key)
    return low, high


@njit(nogil=True, cache=True)
def _sort(keys):  # pragma: no cover - compiled
    """In place, by insertion: keys are few, or about equal."""
    for i in range(1, len(keys)):
        key, j = keys[i], i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


@njit(nogil=True, cache=True)
def _bin(keys, low, scale, bins):  # pragma: no cover - compiled
    """Write the bin of each key."""
    for i in range(len(keys)):
        bins[i] = np.int16((keys[i] - low) * scale)


@njit(nogil=True, cache=True)
def _threshold(keys, k):  # pragma: no cover - compiled
    """The k-th least of finite keys float32 [n], k in [1, n]; how many of its equals the k least hold, and of how many.

    Of many keys, most are passed over by what a sample of them says (Floyd & Rivest, doi:10.1145/360680.360691).
    """
    split, left = keys, k
    if len(keys) >= MANY:
        sample = keys[::len(keys) // SAMPLE].copy()
        middle = k * len(sample) // len(keys)
        low, _, _ = _counted(sample, max(middle - MARGIN, 1))
        high, _, _ = _counted(sample, min(middle + MARGIN, len(sample)))
        if middle - MARGIN < 1:
            low = np.float32(-np.inf)
        if middle + MARGIN > len(sample):
            high = np.float32(np.inf)
        between, inside, below = np.empty(len(keys) + 1, np.float32), 0, 0
        for key in keys:
            between[inside] = key
            inside += (key >= low) & (key <= high)
            below += key < low
        if below < k <= below + inside:  # else the sample was odd
            split, left = between[:inside], k - below
    return _counted(split, left)


@njit(nogil=True, cache=True)
def _counted(keys, k):  # pragma: no cover - compiled
    """`_threshold` by histograms: one tells which bin the threshold is in, and that bin's keys are counted again.

    Bins are found a part at a time, which stays in the cache. Loops write always and advance sometimes: they have no
    branch that could be mispredicted.
    """
    counts, bins = np.empty(BINS, np.int64), np.empty(min(len(keys), PART), np.int16)
    split, left = keys, k  # keys of which `left` are among the k least
    while len(split) > FEW:
        low, high = _bounds(split)
        if high - low < TINY:
            break
        scale = np.float32(BINS - 1) / (high - low)
        counts[:] = 0
        for start in range(0, len(split), PART):
            part = split[start:start + PART]
            _bin(part, low, scale, bins)
            for i in range(len(part)):
                counts[bins[i]] += 1
        at = 0
        while counts[at] < left:
            left -= counts[at]
            at += 1
        narrower, inside = np.empty(counts[at] + 1, np.float32), 0
        for start in range(0, len(split), PART):
            part = split[start:start + PART]
            _bin(part, low, scale, bins)
            for i in range(len(part)):
                narrower[inside] = part[i]
                inside += bins[i] == at
        split = narrower[:inside]
    few = split.copy()
    _sort(few)
    threshold, ties, equals = few[left - 1], left, 0
    for key in split:
        ties -= key < threshold
        equals += key == threshold
    return threshold, ties, equals


@njit(nogil=True, cache=True)
def _least(keys, k):  # pragma: no cover - compiled
    """Positions of the k least of finite keys float32 [n], ascending int32, k in [0, n]; ties go to the lower one."""
    if k == 0 or k == len(keys):
        return np.arange(k).astype(np.int32)
    threshold, ties, _ = _threshold(keys, k)
    chosen, found = np.empty(k + 1, np.int32), 0
    for i in range(len(keys)):
        chosen[found] = i
        tie = keys[i] == threshold
        found += (keys[i] < threshold) | (tie & (ties > 0))
        ties -= tie
    return chosen[:k]


@njit(nogil=True, cache=True)
def _gather(state, which, keys, sign, count):  # pragma: no cover - compiled
    """Positions whose state is `which`, ascending int32 [count], and `sign` times their keys, float32 [count]."""
    places, values, found = np.empty(count + 1, np.int32), np.empty(count + 1, np.float32), 0
    for i in range(len(state)):
        places[found], values[found] = i, sign * keys[i]
        found += state[i] == which
    return places[:count], values[:count]


@njit(nogil=True, cache=True)
def _keys_of(tiers, which, keys, count):  # pragma: no cover - compiled
    """Keys of the positions in a tier, float32 [count]."""
    values, found = np.empty(count + 1, np.float32), 0
    for i in range(len(tiers)):
        values[found] = keys[i]
        found += tiers[i] == which
    return values[:count]


@njit(nogil=True, cache=True)
def fill(tiers, keys, k):  # pragma: no cover - compiled
    """Choose k positions: all of a higher tier before any of a lower one, the least keys of the tier that splits.

    To resize a set, its members are in tier 2 and others in tier 0; to cross two, their intersection is in tier 2 and
    the rest of their union in tier 1.

    Args:
        tiers: uint8 [n] of 0, 1 and 2; in the end 1 where chosen and 0 elsewhere.
        keys: float32 [n].
        k: in [0, n].
    """
    twos = ones = 0
    for tier in tiers:
        twos += tier == 2
        ones += tier == 1
    if k <= twos:
        split, held, need = np.uint8(2), twos, k
    elif k <= twos + ones:
        split, held, need = np.uint8(1), ones, k - twos
    else:
        split, held, need = np.uint8(0), len(tiers) - twos - ones, k - twos - ones
    if need == held:  # the tier is taken as a whole
        for i in range(len(tiers)):
            tiers[i] = tiers[i] >= split
        return
    if need == 0:
        for i in range(len(tiers)):
            tiers[i] = tiers[i] > split
        return
    threshold, ties, equals = _threshold(_keys_of(tiers, split, keys, np.int64(held)), need)
    if ties == equals:  # nothing to count on the way, so that several positions are settled at a time
        for i in range(len(tiers)):
            tiers[i] = (tiers[i] > split) | ((tiers[i] == split) & (keys[i] <= threshold))
        return
    for i in range(len(tiers)):
        among = tiers[i] == split
        tie = among & (keys[i] == threshold)
        tiers[i] = (tiers[i] > split) | (among & (keys[i] < threshold)) | (tie & (ties > 0))
        ties -= tie


@njit(nogil=True, cache=True)
def draw(values, count, temperature, state):  # pragma: no cover - compiled
    """Positions of `count` values, ascending: Gumbel top-k among the smallest.

    Args:
        values: float32 [n], keys.
        count: in [0, n].
        temperature: 0 takes the very smallest.
        state: stream of the draws; untouched at a temperature of 0.
    """
    if temperature > 0:
        band = _least(values, min(len(values), BAND * count))
        noisy = gumbels(state, len(band))
        for i in range(len(band)):
            noisy[i] = values[band[i]] - np.float32(temperature) * noisy[i]
        chosen = _least(noisy, count)
        for i in range(count):
            chosen[i] = band[chosen[i]]
    else:
        chosen = _least(values, count)
    return chosen


@njit(nogil=True, cache=True)
def swap(inside, keys, count, temperature, state):  # pragma: no cover - compiled
    """Exchange members of great key for non-members of little key.

    Args:
        inside: uint8 [n], 1 for members and 0 for others; changed in place.
        keys: float32 [n].
        count: of members to exchange, >= 0; fewer where there are fewer.
        temperature: of the draw; 0 exchanges the very greatest for the very least.
        state: stream of the draws.
    """
    members = 0
    for one in inside:
        members += one
    others = len(inside) - members
    count = min(count, members, others)
    if count == 0:
        return
    ours, values = _gather(inside, np.uint8(1), keys, np.float32(-1), np.int64(members))
    leavers = draw(values, count, temperature, state)
    theirs, values = _gather(inside, np.uint8(0), keys, np.float32(1), np.int64(others))
    entrants = draw(values, count, temperature, state)
    for i in range(count):
        inside[ours[leavers[i]]], inside[theirs[entrants[i]]] = 0, 1
