"""What each width of each layer costs; light, since it travels to the processes of trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from de_ray.quantization.choice import LevelChoice


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
            raise ValueError(f"widths {tuple(widths)}: expected one of {self.widths} for each of {len(self.layers)} "
                             "layers")
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
