"""Integer tables of the probability model.

Probabilities are 16-bit numbers, p / 65536. Mixing happens on logits, ln(p / (1 - p)), in units of 1/256. Whatever a
decoder adapts must come out the same everywhere, so the tables are made with `decimal`, whose functions round
correctly on every machine, and are integers from then on.
"""

from decimal import ROUND_HALF_EVEN, Context, Decimal

import numpy as np

PROBABILITY_BITS = 16
ONE = 1 << PROBABILITY_BITS
LEAST = 16
"""Probabilities stay in [LEAST, ONE - LEAST]: a symbol costs at least 0.00035 bits, which bounds what a file can
say."""
LOGIT_UNIT = 256
LOGIT_LIMIT = 8 * LOGIT_UNIT + LOGIT_UNIT // 2
"""Logits are clamped to +- this; beyond it probabilities are outside their bounds anyway."""


def _squash() -> np.ndarray:
    """int32 [2 LOGIT_LIMIT + 1]: logit + LOGIT_LIMIT -> probability."""
    # The caller's own context must not matter: neither to any of these operations nor as the default of this one.
    context = Context(prec=20, rounding=ROUND_HALF_EVEN)
    values = []
    for logit in range(-LOGIT_LIMIT, LOGIT_LIMIT + 1):
        odds = context.exp(context.divide(Decimal(-logit), Decimal(LOGIT_UNIT)))
        probability = context.divide(Decimal(ONE), context.add(odds, Decimal(1)))
        values.append(int(probability.to_integral_value(ROUND_HALF_EVEN)))
    return np.clip(np.array(values, np.int32), LEAST, ONE - LEAST)


def _stretch(squash: np.ndarray) -> np.ndarray:
    """int32 [ONE + 1]: probability -> the least logit whose probability is not below it."""
    positions = np.searchsorted(squash, np.arange(ONE + 1))
    return np.minimum(positions, 2 * LOGIT_LIMIT).astype(np.int32) - LOGIT_LIMIT


SQUASH = _squash()
STRETCH = _stretch(SQUASH)
