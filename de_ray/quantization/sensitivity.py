"""What each width of each layer costs in bytes and in divergence, one layer at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from de_ray.config import QuantizationConfig
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.choose import Price, choose, choose_exponents


class Evaluator(Protocol):
    """What quantization needs of a pool."""

    batches: int
    """Number of calibration batches."""

    def evaluate(self, candidates: Sequence[tuple], batches: Sequence[int]) -> np.ndarray:
        """Mean divergence of each candidate over the named batches, float64 [K], non-finite for failures."""
        ...


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """For each layer and width: levels, bytes and the divergence when that layer alone is quantized."""

    layers: tuple[str, ...]
    """Names."""
    widths: tuple[int, ...]
    """Ascending."""
    choices: tuple[tuple[LevelChoice, ...], ...]
    """By layer, then by width."""
    bytes: np.ndarray
    """int64 [layers, widths], coded payload."""
    divergence: np.ndarray
    """float64 [layers, widths]; non-finite where evaluation failed."""
    base: float
    """Divergence of the student before quantization."""

    def columns(self, widths: Sequence[int]) -> list[int]:
        """Index of each layer's width into `widths`.

        Raises:
            ValueError: a width is not in the table, or there is not one for each layer.
        """
        if len(widths) != len(self.layers) or not set(widths) <= set(self.widths):
            raise ValueError(f"widths {tuple(widths)}: expected one of {self.widths} for each of {len(self.layers)} layers")
        return [self.widths.index(width) for width in widths]

    def candidate(self, widths: Sequence[int]) -> tuple[LevelChoice, ...]:
        """The level choices of an assignment, one a layer, for a pool."""
        return tuple(row[c] for row, c in zip(self.choices, self.columns(widths), strict=True))

    def payload(self, widths: Sequence[int]) -> int:
        """Coded bytes of an assignment's layers."""
        return int(sum(row[c] for row, c in zip(self.bytes, self.columns(widths), strict=True)))

    def predicted(self, widths: Sequence[int]) -> float:
        """Divergence of an assignment if the layers' rises just add up."""
        rises = self.divergence - self.base
        return float(self.base + sum(row[c] for row, c in zip(rises, self.columns(widths), strict=True)))


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
    if price is None:
        from de_ray.codec import coded_bytes

        price = coded_bytes
    widths = (config.bits,) if config.bits else tuple(range(config.min_bits, config.max_bits + 1))
    choices, sizes = [], np.zeros((len(weights), len(widths)), np.int64)
    for l, weight in enumerate(weights):
        importance = None if curvature is None else curvature[l]
        exponents = choose_exponents(weight, widths[len(widths) // 2], config, price, importance)
        choices.append(tuple(choose(l, weight, bits, config, importance, exponents) for bits in widths))
        sizes[l] = [price(choice.to_tensor(f"{layers[l]}.weight", weight)) for choice in choices[-1]]
    candidates = [(), *((choice,) for row in choices for choice in row)]
    fitness = pool.evaluate(candidates, range(pool.batches))
    return SensitivityTable(tuple(layers), widths, tuple(choices), sizes,
                            fitness[1:].reshape(len(weights), len(widths)), float(fitness[0]))
