"""Large tensors that stay dense, embeddings most of all, in whole multiples of steps of their own.

Biases are so few that their bytes hardly count, and have a fine step (`biases`). Tables of embeddings may be most of a
file: their steps are as coarse as their share of the tolerance allows, and what is refitted later makes up for it.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping

import numpy as np

from de_ray.codec import coded_bytes
from de_ray.codec.tensor import QuantizedTensor
from de_ray.problem.base import Problem
from de_ray.problem.layers import layer_weights
from de_ray.quantization.biases import quantize_dense

LARGE = 2**16
"""Numbers, at least, of such a tensor."""
RUNGS = 28
"""Of the ladder of steps: twice a tensor's root mean square, and each rung by the square root of two finer. The last
one is 2^-12.5 of it."""


LEAST_STEP = 2.0**-23
"""Of a tensor's greatest magnitude: multiples of smaller steps may leave 24 bits."""


def large_tensors(problem: Problem) -> dict[str, int]:
    """State-dict keys of a teacher's parameters that are such tensors, and how many numbers each has.

    Layers that `include` and `exclude` leave out are none: who leaves them out wants them as they are.
    """
    layers = layer_weights(problem.teacher) | problem.left_out | {layer.parameter for layer in problem.layers}
    return {name: p.numel() for name, p in problem.teacher.named_parameters()
            if name not in layers and p.ndim > 1 and p.numel() >= LARGE and p.is_floating_point()}


def quantize_large(tensors: Mapping[str, np.ndarray], measure: Callable[[dict[str, np.ndarray]], float], limit: float,
                   room: float = math.inf) -> dict[str, QuantizedTensor]:
    """Quantize tensors by the coarsest rung whose measured divergence stays within a limit, one for all of them.

    The divergence is taken to rise with the step, and bytes to fall, so that a few measurements do.

    Args:
        tensors: float32 by state-dict key.
        measure: divergence of the student with the given values in these tensors' place; non-finite for failures.
        limit: greatest divergence allowed.
        room: bytes, at most; it goes before the limit.

    Returns:
        The tensors in coded form, by name; none when no rung is fine enough.
    """
    roots = {name: float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) or 1.0  # of zeros any step will do
             for name, values in tensors.items()}

    finest = {name: LEAST_STEP * float(np.abs(values).max(initial=0)) for name, values in tensors.items()}

    def coded(rung: int) -> dict[str, QuantizedTensor]:
        return {name: quantize_dense(name, values, max(roots[name] * 2 ** (1 - rung / 2), finest[name]))
                for name, values in tensors.items()}

    def fine(rung: int) -> bool:
        return measure({name: one.dequantize() for name, one in coded(rung).items()}) <= limit  # False for NaN

    def large(rung: int) -> bool:
        return sum(map(coded_bytes, coded(rung).values())) > room

    rung = bisect_left(range(RUNGS), True, key=fine)
    if room < math.inf:
        rung = max(0, bisect_left(range(rung + 1), True, key=large) - 1)
    return coded(rung) if rung < RUNGS else {}
