"""Measure what each width of each layer costs in bytes and in divergence, one layer at a time."""

from collections.abc import Sequence

import numpy as np

from de_ray.config import QuantizationConfig
from de_ray.device import mapped
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.choose import Placements, Price
from de_ray.quantization.table import Evaluator, SensitivityTable


def sensitivity(weights: Sequence[np.ndarray], layers: Sequence[str], pool: Evaluator, config: QuantizationConfig,
                curvature: Sequence[np.ndarray] | None = None, price: Price | None = None) -> SensitivityTable:
    """Quantize each layer at each width, and evaluate all of them in one call over all calibration batches.

    Whether a layer has row scales is decided once, at its middle width.

    Args:
        weights: of the student that the pool's replicas hold: float32 [R, ...] a layer, zero where pruned.
        layers: names, in the same order.
        pool: evaluates the candidates.
        config: a fixed `bits` makes a table of that width alone, else it spans min_bits..max_bits.
        curvature: of the weights' shapes, >= 0: the divergence's diagonal curvature; None: all weights alike.
        price: coded bytes of a tensor; None: the codec's.
    """
    choices, sizes = choices_at(weights, config, curvature, price)
    candidates = [(), *((choice,) for row in choices for choice in row)]
    fitness = pool.evaluate(candidates, range(pool.batches))
    return SensitivityTable(tuple(layers), _widths(config), choices, sizes, fitness[1:].reshape(sizes.shape),
                            float(fitness[0]))


def unmeasured(weights: Sequence[np.ndarray], layers: Sequence[str], config: QuantizationConfig,
               curvature: Sequence[np.ndarray]) -> SensitivityTable:
    """The same without divergences, which nobody asks for where `bits` is fixed: NaN."""
    choices, sizes = choices_at(weights, config, curvature)
    return SensitivityTable(tuple(layers), _widths(config), choices, sizes, np.full(sizes.shape, np.nan), np.nan)


def choices_at(weights: Sequence[np.ndarray], config: QuantizationConfig,
               curvature: Sequence[np.ndarray] | None = None,
               price: Price | None = None) -> tuple[tuple[tuple[LevelChoice, ...], ...], np.ndarray]:
    """Quantize each layer at each width, without evaluating anything; see `sensitivity` for the arguments.

    Returns:
        Choices by layer, then by width; their coded bytes, int64 [layers, widths].
    """
    if price is None:
        from de_ray.codec import coded_bytes

        price = coded_bytes
    widths = _widths(config)

    def placed(layer: int) -> tuple[tuple[LevelChoice, ...], list[int]]:
        placements = Placements(layer, weights[layer], config, price, None if curvature is None else curvature[layer])
        exponents = placements.exponents(widths[len(widths) // 2])
        row, sizes = zip(*(placements.at(bits, exponents) for bits in widths), strict=True)
        return row, list(sizes)

    found = list(mapped(placed, range(len(weights))))
    return tuple(row for row, _ in found), np.array([sizes for _, sizes in found], np.int64).reshape(-1, len(widths))


def _widths(config: QuantizationConfig) -> tuple[int, ...]:
    return (config.bits,) if config.bits else tuple(range(config.min_bits, config.max_bits + 1))
