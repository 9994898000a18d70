"""The probability model of the format's version 1, kept so that its files stay readable; `model` has taken its place.

A symbol is a significance decision (zero or not), a sign and a magnitude. Each decision is predicted by several
adaptive counters, selected by what is decoded already; their logits are weighted by a small online-trained mixer
(Mahoney, "Adaptive weighing of context models for lossless data compression", 2005). One function does both
directions, so that encoder and decoder cannot differ: it notes the decisions of given symbols and their
probabilities, or takes the decisions from a stream.

A tensor is scanned as R rows of I inputs by K kernel positions; a column is an input at a kernel position.
"""

import numpy as np
from numba import njit

from de_ray.codec.rangecoder import decode_bit
from de_ray.codec.tables import LEAST, LOGIT_LIMIT, ONE, SQUASH, STRETCH

INPUTS = 10
"""Counters that predict a decision."""
CLASSES = 24
"""Of a density: 12 ratios to the tensor's, twice, for few and for many observations."""
MAX_BUCKET = 25
"""Bit length of the greatest magnitude, 2^24."""
TREE_BITS = 4
"""Leading mantissa bits that adapt."""
WEIGHT_ONE = 1 << 16

# Tuned on pruned LeNets; part of the format.
PRIOR_SCALE = 30
"""Hundredths: a significance counter starts as if it had seen this / density decisions."""
VALUE_PRIOR = 4
"""A value counter starts as if it had seen this many decisions."""
LIMIT = 500
"""Decisions after which a counter adapts at a constant rate."""
SHIFT = 15
"""Of the mixer's training rate; less is faster."""
WEIGHT = WEIGHT_ONE // 5
"""Initial weight of every input."""


@njit(cache=True)
def _density_class(ones, seen, prior):
    """Class of a density so far: in how many half octaves it is off the tensor's, and whether that means much."""
    observed = 256 * ones + 100
    expected = (seen * prior >> 8) + 100
    ratio = 16 * observed // expected
    c = 0
    if ratio >= 2:
        c = 1
    if ratio >= 4:
        c = 2
    if ratio >= 7:
        c = 3
    if ratio >= 10:
        c = 4
    if ratio >= 14:
        c = 5
    if ratio >= 20:
        c = 6
    if ratio >= 28:
        c = 7
    if ratio >= 40:
        c = 8
    if ratio >= 64:
        c = 9
    if ratio >= 112:
        c = 10
    if ratio >= 224:
        c = 11
    return c + 12 * (expected >= 356)


@njit(cache=True)
def _decide(bit, n, slots, chance, seen, weights, w, prior, strength, stream, state, decoding, bits, probabilities, at):
    """One decision: predict, code, learn. Returns the bit; -1 where the stream is damaged."""
    base = STRETCH[prior]
    dot = np.int64(0)
    for i in range(n):
        dot += np.int64(weights[w, i]) * (STRETCH[chance[slots[i]]] - base)
    logit = base + (dot >> 16) + (weights[w, n] >> 8)
    logit = min(max(logit, -LOGIT_LIMIT), LOGIT_LIMIT)
    p = SQUASH[logit + LOGIT_LIMIT]
    if decoding:
        bit = decode_bit(stream, state, p)
        if bit < 0:
            return bit
    else:
        bits[at] = bit
        probabilities[at] = p
    target = ONE if bit else 0
    error = target - p
    for i in range(n):
        s = slots[i]
        weights[w, i] += (error * (STRETCH[chance[s]] - base)) >> SHIFT
        chance[s] += (target - chance[s]) // (seen[s] + strength)
        chance[s] = min(max(chance[s], LEAST), ONE - LEAST)
        if seen[s] < LIMIT:
            seen[s] += 1
    weights[w, n] += error >> 8
    return bit


@njit(cache=True)
def code(symbols, rows, inputs, kernel, period, prior, decoding, stream, state, bits, probabilities):
    """Code a tensor's symbols in one direction.

    Args:
        symbols: int32 [rows * inputs * kernel]; read, or written when decoding.
        rows, inputs, kernel: R, I, K.
        period: columns of inputs after which spatial neighbours recur, such as an image's width; 0: none.
        prior: share of non-zero symbols in units of 2^-16, in [LEAST, ONE - LEAST].
        decoding: direction.
        stream, state: of the decoder; see `rangecoder.start`.
        bits, probabilities: int8 and int32 buffers for the decisions, long enough for all; unused when decoding.

    Returns:
        Number of decisions; -1 where the stream is damaged.
    """
    columns = inputs * kernel
    strength = max(2, PRIOR_SCALE * ONE // (100 * prior))
    # Regions of the table of counters, one an input.
    base_row = kernel
    base_column = base_row + rows
    base_pair = base_column + columns
    base_near = base_pair + CLASSES * CLASSES
    base_local = base_near + 64 * 3
    base_beside = base_local + 5 * 6 * kernel
    base_period = base_beside + CLASSES * CLASSES
    base_channel = base_period + CLASSES * CLASSES
    base_kernel = base_channel + CLASSES * CLASSES
    base_value = base_kernel + 16 * kernel * 3
    size = base_value + 9 + 3 * (MAX_BUCKET + 1) * 8 + 3 * 2 * (MAX_BUCKET << TREE_BITS) + 3 + columns + rows
    chance = np.full(size, prior, np.int32)
    chance[base_value:] = ONE // 2
    seen = np.zeros(size, np.int32)
    slots = np.zeros(INPUTS, np.int64)
    weights = np.full((4, INPUTS + 1), WEIGHT, np.int32)
    weights[:, INPUTS] = 0
    value_weights = np.full((2 + MAX_BUCKET * 2, 4), WEIGHT_ONE // 2, np.int32)
    value_weights[:, 3] = 0

    column_ones = np.zeros(columns, np.int32)
    channel_ones = np.zeros(inputs, np.int32)
    column_last = np.zeros(columns, np.int32)
    last = np.int32(0)
    at = 0
    for r in range(rows):
        row_ones = 0
        start = r * columns
        last = np.int32(0)
        for i in range(inputs):
            kernel_ones = 0
            for k in range(kernel):
                c = i * kernel + k
                here = start + c
                # What is around: 1 where a neighbour survives.
                left = symbols[here - kernel] != 0 if i > 0 else False
                left2 = symbols[here - 2 * kernel] != 0 if i > 1 else False
                up = symbols[here - columns] != 0 if r > 0 else False
                up2 = symbols[here - 2 * columns] != 0 if r > 1 else False
                up_right = symbols[here - columns + kernel] != 0 if r > 0 and i + 1 < inputs else False
                up_left = symbols[here - columns - kernel] != 0 if r > 0 and i > 0 else False
                local = 0
                for back in range(3, 9):
                    if i >= back and symbols[here - back * kernel] != 0:
                        local += 1
                lines = 0
                for back in range(3, 8):
                    if r >= back and symbols[here - back * columns] != 0:
                        lines += 1
                row_class = _density_class(row_ones, c, prior)
                column_class = _density_class(column_ones[c], r, prior)
                beside, beside_seen = 0, 0
                if i > 0:
                    beside += column_ones[c - kernel]
                    beside_seen += r + 1
                if i + 1 < inputs:
                    beside += column_ones[c + kernel]
                    beside_seen += r
                beside_class = _density_class(beside, beside_seen, prior)
                far, far_seen = 0, 0
                if period:
                    if i >= period:
                        far += column_ones[c - period * kernel]
                        far_seen += r + 1
                    if i + period < inputs:
                        far += column_ones[c + period * kernel]
                        far_seen += r
                far_class = _density_class(far, far_seen, prior)
                channel_class = _density_class(channel_ones[i], r * kernel + k, prior)
                slots[0] = k
                slots[1] = base_row + r
                slots[2] = base_column + c
                slots[3] = base_pair + row_class * CLASSES + column_class
                slots[4] = base_near + (left + 2 * left2 + 4 * up + 8 * up2 + 16 * up_right + 32 * up_left) * 3 + min(
                    2, kernel_ones)
                slots[5] = base_local + (min(local, 4) * 6 + lines) * kernel + k
                slots[6] = base_beside + beside_class * CLASSES + row_class
                slots[7] = base_period + far_class * CLASSES + beside_class
                slots[8] = base_channel + channel_class * CLASSES + row_class
                around = min(kernel_ones, 3) * 4 + up * 2 + left
                slots[9] = base_kernel + around * kernel * 3 + k * 3 + min(2, row_ones)
                symbol = symbols[here] if not decoding else np.int32(0)
                bit = _decide(np.int64(symbol != 0), INPUTS, slots, chance, seen, weights, min(row_ones, 3), prior,
                              strength, stream, state, decoding, bits, probabilities, at)
                if bit < 0:
                    return -1
                at += 1
                if bit:
                    # Sign: of the last survivor in the column and in the row.
                    sign_column = 1 + (column_last[c] > 0) - (column_last[c] < 0)
                    sign_row = 1 + (last > 0) - (last < 0)
                    slots[0] = base_value + sign_column * 3 + sign_row
                    slots[1] = size - columns - rows + c
                    slots[2] = size - rows + r
                    negative = _decide(np.int64(symbol < 0), 3, slots, chance, seen, value_weights, 0, ONE // 2,
                                       VALUE_PRIOR, stream, state, decoding, bits, probabilities, at)
                    if negative < 0:
                        return -1
                    at += 1
                    # Magnitude: its bit length in unary, then its mantissa from the top.
                    magnitude = np.int64(abs(symbol))
                    near_row, near_column = 0, 0
                    rest = np.int64(abs(last))
                    while rest:
                        near_row += 1
                        rest >>= 1
                    rest = np.int64(abs(column_last[c]))
                    while rest:
                        near_column += 1
                        rest >>= 1
                    buckets = base_value + 9
                    length = 1
                    while length < MAX_BUCKET:
                        slots[0] = buckets + length * 8 + negative
                        slots[1] = buckets + (MAX_BUCKET + 1 + length) * 8 + min(near_row, 7)
                        slots[2] = buckets + (2 * (MAX_BUCKET + 1) + length) * 8 + min(near_column, 7)
                        more = _decide(np.int64(magnitude >> length != 0), 3, slots, chance, seen, value_weights,
                                       1 + length, ONE // 2, VALUE_PRIOR, stream, state, decoding, bits, probabilities,
                                       at)
                        if more < 0:
                            return -1
                        at += 1
                        if not more:
                            break
                        length += 1
                    mantissas = buckets + 3 * (MAX_BUCKET + 1) * 8
                    value = np.int64(1)
                    node = 1
                    for place in range(length - 2, -1, -1):
                        if length - 2 - place < TREE_BITS:
                            slots[0] = mantissas + (length << TREE_BITS) + node
                            slots[1] = mantissas + ((MAX_BUCKET + length) << TREE_BITS) + node if negative else slots[0]
                            slots[2] = slots[0]
                        else:
                            slots[0] = size - columns - rows - 1
                            slots[1] = slots[0]
                            slots[2] = slots[0]
                        digit = _decide((magnitude >> place) & 1, 3, slots, chance, seen, value_weights,
                                        1 + MAX_BUCKET + length, ONE // 2, VALUE_PRIOR, stream, state, decoding, bits,
                                        probabilities, at)
                        if digit < 0:
                            return -1
                        at += 1
                        value = value * 2 + digit
                        node = node * 2 + digit
                    symbol = np.int32(-value if negative else value)
                    if decoding:
                        symbols[here] = symbol
                    row_ones += 1
                    column_ones[c] += 1
                    channel_ones[i] += 1
                    kernel_ones += 1
                    column_last[c] = symbol
                    last = symbol
    return at
