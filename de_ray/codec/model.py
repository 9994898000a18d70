"""The probability model of a tensor's symbols: adaptive contexts, logistically mixed, in integers throughout.

A symbol is a significance decision (zero or not), a sign and a magnitude. Each decision is predicted by several
adaptive counters, selected by what is decoded already, and mixed (see `mixer`). One function does both directions, so
that encoder and decoder cannot differ: it notes the decisions of given symbols and their probabilities, or takes the
decisions from a stream.

A tensor is scanned as R rows of I inputs by K kernel positions; a column is an input at a kernel position. Contexts of
"how dense is this column" are the logits of the counters themselves, in quarter units: they know how much they have
seen, and cost no division.
"""

import numpy as np
from numba import njit

from de_ray.codec.mixer import COUNTER_SHIFT, LIMIT, SHIFT, WEIGHT_ONE, decide, learn, logit_of, mixed, settle
from de_ray.codec.tables import LOGIT_LIMIT, ONE, SQUASH, STRETCH

INPUTS = 9
"""Counters that predict a significance decision."""
VALUE_INPUTS = 6
"""Counters that predict a sign or a rung of a magnitude."""
STEPS = 32
"""Classes of a logit relative to the tensor's own."""
MAX_BUCKET = 25
"""Bit length of the greatest magnitude, 2^24."""
TREE_BITS = 4
"""Leading mantissa bits that adapt."""
MAX_UNARY = 16
"""Greatest magnitude of tensors whose magnitudes are coded in unary."""
RUNGS = MAX_BUCKET + 1
"""Steps of a magnitude, the sign being step 0."""

# Tuned on YOLOv3-tiny and LeNets, pruned and quantized; part of the format.
PRIOR_SCALE = 100
"""Hundredths: a significance counter starts as if it had seen this / density decisions."""
FAST = 5
"""Of a column's fast counter: it moves by 2^-FAST of its error."""
WEIGHT = WEIGHT_ONE // 4
"""Initial weight of a significance counter; of a value counter: WEIGHT_ONE over 3."""
VALUE_SEEN = 2
"""A value counter starts as if it had seen this many decisions."""
VALUE_SHIFT = 14
"""Of the training rate for signs and magnitudes."""


@njit(cache=True)
def _class(logit):
    """0..STEPS - 1: a relative logit in quarters."""
    return min(max((logit >> 6) + STEPS // 2, 0), STEPS - 1)


@njit(cache=True)
def _capped(value, most):
    """The magnitude of a value, at most `most`."""
    return min(abs(np.int64(value)), most)


@njit(cache=True)
def _side(value):
    """0, 1 or 2: negative, zero, positive."""
    return 1 + np.int64(value > 0) - np.int64(value < 0)


@njit(cache=True)
def _bit_length(value):
    length = 0
    while value:
        length += 1
        value >>= 1
    return length


@njit(nogil=True, cache=True)
def code(symbols, rows, inputs, kernel, width, period, unary, prior, decoding, stream, state, bits, probabilities):
    """Code a tensor's symbols in one direction.

    Args:
        symbols: int32 [rows * inputs * kernel]; read, or written when decoding.
        rows, inputs, kernel: R, I, K.
        width: kernel positions of a line of the kernel, >= 1.
        period: columns of inputs after which spatial neighbours recur, such as an image's width; 0: none. Only of use
            where K = 1.
        unary: whether magnitudes are coded in unary; else their bit lengths are, and then the bits.
        prior: share of non-zero symbols in units of 2^-16, in [LEAST, ONE - LEAST].
        decoding: direction.
        stream, state: of the decoder; see `rangecoder.start`.
        bits, probabilities: int8 and int32 buffers for the decisions, long enough for all; unused when decoding.

    Returns:
        Number of decisions; -1 where the stream is damaged.
    """
    columns = inputs * kernel
    base = np.int64(STRETCH[prior])
    # Counters of significance, a region an input.
    near_size = max(81 * kernel, 16 * 16)
    fast = columns
    channel = fast + columns
    row = channel + inputs
    near = row + rows * kernel
    shape = near + near_size
    pair = shape + max(512 * kernel, 16 * 16)
    history = pair + STEPS * 16
    around = history + 256 * 4
    size = around + max(STEPS * 16 * 3, 64 * 9)
    chance = np.full(size, prior << COUNTER_SHIFT, np.int32)
    started = min(LIMIT - 1, max(1, PRIOR_SCALE * ONE // (100 * min(prior, ONE - prior))))
    seen = np.full(size, started, np.int16)
    weights = np.full((4 * kernel if kernel > 1 else 4, INPUTS), WEIGHT, np.int32)
    slots, logits = np.zeros(INPUTS, np.int64), np.zeros(INPUTS, np.int32)
    # Counters of signs and magnitudes: regions of RUNGS rungs, rung 0 being the sign.
    of_logit = 0
    of_row = of_logit + RUNGS * 64
    of_last = of_row + RUNGS * 64
    of_place = of_last + RUNGS * 256
    of_channel = of_place + RUNGS * 6 * kernel
    of_column = of_channel + RUNGS * 64
    mantissa = of_column + 4 * columns
    value_size = mantissa + 3 * (MAX_BUCKET << TREE_BITS) + 1
    value_chance = np.full(value_size, ONE << COUNTER_SHIFT >> 1, np.int32)
    value_seen = np.full(value_size, VALUE_SEEN, np.int16)
    value_weights = np.full((RUNGS + MAX_BUCKET, VALUE_INPUTS), WEIGHT_ONE // 3, np.int32)
    # Not as constants: `decide` would be compiled anew for each.
    value_inputs, bit_inputs, value_shift = np.int64(VALUE_INPUTS), np.int64(3), np.int64(VALUE_SHIFT)
    sign_rung = np.int64(0)

    column_bits = np.zeros(columns, np.int32)
    column_last = np.zeros(columns, np.int32)
    channel_mean = np.zeros(inputs, np.int32)
    at = 0
    for r in range(rows):
        row_mean, row_ones, row_bits = 0, 0, 0
        start = r * columns
        last = np.int32(0)
        for i in range(inputs):
            kernel_ones, kernel_sum, kernel_bits = 0, 0, 0
            kernel_last = np.int32(0)
            for k in range(kernel):
                c = i * kernel + k
                here = start + c
                column_logit = logit_of(chance[c]) - base
                # Neighbours in the kernel: the position before, and three in the line above.
                before = symbols[here - 1] if k % width else np.int32(0)
                above = symbols[here - width] if k >= width else np.int32(0)
                slots[0] = c
                slots[1] = fast + c
                slots[2] = channel + i
                slots[3] = row + r * kernel + k
                if kernel > 1:
                    right = symbols[here - width + 1] if k >= width and (k + 1) % width else np.int32(0)
                    left = symbols[here - width - 1] if k >= width and k % width else np.int32(0)
                    neighbours = _capped(before, 2) * 27 + _capped(above, 2) * 9 + _capped(right, 2) * 3
                    slots[4] = near + (neighbours + _capped(left, 2)) * kernel + k
                    slots[5] = shape + kernel_bits * kernel + k
                    slots[6] = pair + _class(column_logit) * 12 + min(11, kernel_sum)
                    slots[7] = history + (column_bits[c] & 255) * 4 + min(3, kernel_ones)
                    channel_class = _class(logit_of(chance[channel + i]) - base)
                    slots[8] = around + (channel_class * 16 + min(15, kernel_sum)) * 3 + (k > 0) + (k > 3)
                    w = k * 4 + min(3, kernel_ones)
                else:
                    # Adjacent columns, in an image's line and across its lines.
                    west = logit_of(chance[c - 1]) - base if c > 0 else 0
                    east = logit_of(chance[c + 1]) - base if c + 1 < columns else 0
                    slots[4] = near + (_class(west) >> 1) * 16 + (_class(east) >> 1)
                    north = logit_of(chance[c - period]) - base if period and c >= period else 0
                    south = logit_of(chance[c + period]) - base if period and c + period < columns else 0
                    slots[5] = shape + (_class(north) >> 1) * 16 + (_class(south) >> 1)
                    row_logit = logit_of(chance[row + r]) - base
                    slots[6] = pair + _class(column_logit) * 16 + (_class(row_logit) >> 1)
                    slots[7] = history + (column_bits[c] & 255) * 4 + (row_bits & 3)
                    recent = 0
                    for back in range(2, 10):
                        recent += row_bits >> back & 1
                    beside = column_bits[c + 1] & 1 if c + 1 < columns else 0
                    corner = column_bits[c - 1] >> 1 & 1 if c > 0 else 0
                    nearest = (row_bits & 3) + 4 * (column_bits[c] & 3) + 16 * beside + 32 * corner
                    slots[8] = around + nearest * 9 + recent
                    w = min(row_ones, 3)
                logit = mixed(INPUTS, slots, chance, logits, weights, w, base)
                p = SQUASH[logit + LOGIT_LIMIT]
                symbol = symbols[here] if not decoding else np.int32(0)
                bit = settle(np.int64(symbol != 0), p, stream, state, decoding, bits, probabilities, at)
                if bit < 0:
                    return -1
                at += 1
                # The fast counter has no count.
                quick = chance[fast + c]
                learn(bit, p, INPUTS, slots, chance, seen, logits, weights, w, SHIFT)
                chance[fast + c] = quick + np.int32(((np.int64(bit) << (16 + COUNTER_SHIFT)) - quick) >> FAST)
                row_bits = (row_bits << 1 | bit) & 1023
                column_bits[c] = (column_bits[c] << 1 | bit) & 255
                kernel_bits = (kernel_bits << 1 | bit) & 511
                if bit:
                    slots[0] = of_logit + _side(before) * 3 + _side(above)
                    slots[1] = of_row + min(r, 63)
                    slots[2] = of_last + _side(last) * 3 + _side(column_last[c])
                    slots[3] = of_place + _side(kernel_last) * kernel + k
                    slots[4] = of_channel
                    slots[5] = of_column + c
                    negative = decide(np.int64(symbol < 0), value_inputs, slots, value_chance, value_seen, logits,
                                      value_weights, sign_rung, value_shift, stream, state, decoding, bits,
                                      probabilities, at)
                    if negative < 0:
                        return -1
                    at += 1
                    magnitude = np.int64(abs(symbol))
                    reach = magnitude if unary else np.int64(_bit_length(magnitude))
                    certainty = min(max((logit + 2048) >> 6, 0), 63)
                    before_size = _capped(last, 15) if unary else min(_bit_length(abs(last)), 15)
                    above_size = _capped(column_last[c], 15) if unary else min(_bit_length(abs(column_last[c])), 15)
                    size = 1
                    while unary or size < MAX_BUCKET:
                        slots[0] = of_logit + size * 64 + certainty
                        slots[1] = of_row + size * 64 + min(row_mean >> 5, 63)
                        slots[2] = of_last + size * 256 + before_size * 16 + above_size
                        slots[3] = of_place + size * 6 * kernel + k * 2 + negative
                        slots[4] = of_channel + size * 64 + min(channel_mean[i] >> 5, 63)
                        slots[5] = of_column + size * columns + c if size < 4 else of_channel + size * 64 + 63
                        more = decide(np.int64(reach > size), value_inputs, slots, value_chance, value_seen, logits,
                                      value_weights, np.int64(size), value_shift, stream, state, decoding, bits,
                                      probabilities, at)
                        if more < 0:
                            return -1
                        at += 1
                        if not more:
                            break
                        size += 1
                        # A damaged stream might say "more" for ever.
                        if unary and size > MAX_UNARY:
                            return -1
                    value = np.int64(size)
                    if not unary:
                        # The bits below the leading one, from the top.
                        value = np.int64(1)
                        node = 1
                        for place in range(size - 2, -1, -1):
                            slots[:] = mantissa + 3 * (MAX_BUCKET << TREE_BITS)
                            if size - 2 - place < TREE_BITS:
                                slots[0] = mantissa + ((size - 1) << TREE_BITS) + node
                                slots[1] = slots[0] + ((1 + negative) * MAX_BUCKET << TREE_BITS)
                                slots[2] = slots[0]
                            digit = decide((magnitude >> place) & 1, bit_inputs, slots, value_chance, value_seen,
                                           logits, value_weights, RUNGS - 1 + size, value_shift, stream, state,
                                           decoding, bits, probabilities, at)
                            if digit < 0:
                                return -1
                            at += 1
                            value = value * 2 + digit
                            node = node * 2 + digit
                    symbol = np.int32(-value if negative else value)
                    if decoding:
                        symbols[here] = symbol
                    kernel_ones += 1
                    kernel_sum += min(size, 15)
                    row_ones += 1
                    row_mean += (64 * min(size, 31) - row_mean) // min(row_ones, 60)
                    channel_mean[i] += (64 * min(size, 31) - channel_mean[i]) >> 4
                    column_last[c] = symbol
                    last, kernel_last = symbol, symbol
    return at
