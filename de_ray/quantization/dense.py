"""Large tensors that stay dense, embeddings most of all, in whole multiples of a step of their own.

Biases are so few that their bytes hardly count, and share a fine step (`biases`). A table of embeddings may be most of
a file: its step is as coarse as its share of the tolerance allows, and what is refitted later makes up for it.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from de_ray.codec import coded_bytes
from de_ray.codec.tensor import QuantizedTensor
from de_ray.quantization.biases import quantize_dense

LARGE = 2**16
"""Numbers, at least, of a tensor with a step of its own."""
RUNGS = 28
"""Of the ladder of steps: twice a tensor's root mean square, and each rung by the square root of two finer. The last
one is 2^-12.5 of it."""

Coded = Callable[[], QuantizedTensor]
"""A tensor at one rung."""


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether a tensor that stays dense is given a step of its own."""
    return len(shape) > 1 and int(np.prod(shape)) >= LARGE


def quantize_large(tensors: Mapping[str, np.ndarray], measure: Callable[[dict[str, np.ndarray]], float], base: float,
                   allowed: float, room: float = math.inf) -> dict[str, QuantizedTensor]:
    """Quantize tensors one after the other, the largest first, each by the coarsest step within its limit.

    A tensor's limit is what it and those before it may add to the divergence together, in proportion to their numbers:
    what one of them leaves serves the next ones. The divergence is taken to rise with the step, and bytes to fall.

    Args:
        tensors: float32 by state-dict key.
        measure: puts values by name in these tensors' place, and tells the divergence then; non-finite for failures.
        base: the divergence before.
        allowed: what all of them may add to it.
        room: bytes a number, at most; it goes before the limit.

    Returns:
        The tensors in coded form, by name, their values put in place. Those that no step is fine enough for are left
        out, and have the values that they had.
    """
    total, found, done = sum(values.size for values in tensors.values()), {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].size):
        values = tensors[name]
        done += values.size
        limit = base + allowed * done / total
        ladder = [partial(quantize_dense, name, values, step) for step in _steps(values)]

        def within(coded: Coded, name: str = name, limit: float = limit) -> bool:
            return measure({name: coded().dequantize()}) <= limit  # False for NaN

        def spacious(coded: Coded, most: float = room * values.size) -> bool:
            return coded_bytes(coded()) > most

        rung = bisect_left(ladder, True, key=within)
        if room < math.inf:
            rung = max(0, bisect_left(ladder[:rung + 1], True, key=spacious) - 1)
        if rung < len(ladder):
            found[name] = ladder[rung]()
        measure({name: found[name].dequantize() if name in found else values})
    return found


def _steps(values: np.ndarray) -> np.ndarray:
    """[RUNGS], descending; of a tensor of zeros any will do."""
    root = np.sqrt(np.mean(np.square(values, dtype=np.float64))) or 1.0
    return root * 2 ** (1 - np.arange(RUNGS) / 2)
