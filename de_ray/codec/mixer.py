"""Counters and their logistic mixing.

Source: Mahoney, "Adaptive weighing of context models for lossless data compression", 2005.

A counter holds a 22-bit probability and how many decisions it has seen; it moves by 1 / (seen + 1.5) of its error. A
mixer adds weighted logits of several counters, relative to a base, and learns its weights online. Integers throughout.
"""

import numpy as np
from numba import njit

from de_ray.codec.rangecoder import decode_bit
from de_ray.codec.tables import LOGIT_LIMIT, ONE, SQUASH, STRETCH

COUNTER_SHIFT = 6
"""Counters have so many bits more than probabilities."""
WEIGHT_ONE = 1 << 16
LIMIT = 1000
"""Decisions after which a counter adapts at a constant rate."""
SHIFT = 15
"""Of the training rate for significance; less is faster."""
RATES = np.array([(2 << 16) // (2 * seen + 3) for seen in range(LIMIT + 1)], np.int32)
_STRETCH = STRETCH.astype(np.int16)  # half the cache


@njit(cache=True)
def logit_of(chance):
    """The logit of a counter's probability, in units of 1/256."""
    return np.int64(_STRETCH[chance >> COUNTER_SHIFT])


@njit(cache=True, inline="always")
def mixed(n, slots, chance, logits, weights, w, base):
    """The logit of a decision; notes the inputs' logits relative to the base, for `learn`."""
    dot = np.int64(0)
    for i in range(n):
        logits[i] = logit_of(chance[slots[i]]) - base
        dot += np.int64(weights[w, i]) * np.int64(logits[i])
    return min(max(base + (dot >> 16), -LOGIT_LIMIT), LOGIT_LIMIT)


@njit(cache=True, inline="always")
def settle(bit, p, stream, state, decoding, bits, probabilities, at):
    """Code a decision of probability p: note it, or take it from the stream. Returns it; -1 where that is damaged."""
    if decoding:
        return decode_bit(stream, state, p)
    bits[at] = bit
    probabilities[at] = p
    return bit


@njit(cache=True, inline="always")
def learn(bit, p, n, slots, chance, seen, logits, weights, w, shift):
    """Move the counters and the weights towards a decision."""
    error = (ONE if bit else 0) - np.int64(p)
    target = np.int64(bit) << (16 + COUNTER_SHIFT)
    half = np.int64(1) << (shift - 1)
    for i in range(n):
        s = slots[i]
        weights[w, i] += np.int32((error * np.int64(logits[i]) + half) >> shift)
        chance[s] += np.int32(((target - chance[s]) * np.int64(RATES[seen[s]])) >> 16)
        if seen[s] < LIMIT:
            seen[s] += np.int16(1)


@njit(cache=True)
def decide(bit, n, slots, chance, seen, logits, weights, w, shift, stream, state, decoding, bits, probabilities, at):
    """A whole decision whose base is one half. Returns the bit; -1 where the stream is damaged."""
    p = SQUASH[mixed(n, slots, chance, logits, weights, w, 0) + LOGIT_LIMIT]
    bit = settle(bit, p, stream, state, decoding, bits, probabilities, at)
    if bit >= 0:
        learn(bit, p, n, slots, chance, seen, logits, weights, w, shift)
    return bit
