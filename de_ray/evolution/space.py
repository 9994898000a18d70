"""What a cycle's search may choose from: survivors, their saliencies and the budget of zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from de_ray.evolution.operators import TINY, smallest, spread


@dataclass(frozen=True)
class Budget:
    """Net zeros to add in a cycle: a number for each bound layer, and one that evolution spreads over the others."""

    bound: np.ndarray
    """bool [L], True for layers that have a number of their own."""
    fixed: np.ndarray
    """int64 [L], zeros of the bound layers; 0 elsewhere."""
    free_total: int
    """Zeros over all other layers."""


class SearchSpace:
    """Survivors and zeroed parameters of each layer, with comparable scores.

    Args:
        saliency: criterion -> a float32 array [layer.size] a layer, >= 0.
        masks: a bool array [layer.size] a layer, True for survivors.
        budget: zeros to add.

    Raises:
        ValueError: the budget asks for more zeros than there are survivors.
    """

    def __init__(self, saliency: Mapping[str, Sequence[np.ndarray]], masks: Sequence[np.ndarray],
                 budget: Budget) -> None:
        self.criteria = tuple(saliency)
        self.alive = [np.flatnonzero(mask) for mask in masks]
        self.dead = [np.flatnonzero(~mask) for mask in masks]
        self.sizes = np.array([len(mask) for mask in masks], np.int64)
        self.room = np.array([len(alive) for alive in self.alive], np.int64)
        self.budget = budget
        free_room = int(self.room[~budget.bound].sum())
        if budget.free_total > free_room or (budget.fixed > self.room).any():
            raise ValueError(f"{budget.free_total} zeros asked for over all layers and {budget.fixed.tolist()} in "
                             f"bound ones, expected at most the {free_room} and {self.room.tolist()} survivors; "
                             "lower evolution.sparsity")
        # Logarithms in units of each criterion's own spread, so that criteria can be mixed.
        self._alive_scores, self._dead_scores = [], []
        for criterion in self.criteria:
            logs = [np.log(s + np.float32(TINY)) for s in saliency[criterion]]
            everyone = np.concatenate([log[alive] for log, alive in zip(logs, self.alive, strict=True)])
            center, scale = float(np.median(everyone)), float(np.std(everyone)) or 1.0
            self._alive_scores.append([(log[i] - center) / scale for log, i in zip(logs, self.alive, strict=True)])
            self._dead_scores.append([(log[i] - center) / scale for log, i in zip(logs, self.dead, strict=True)])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sizes)

    def alive_keys(self, mix: np.ndarray, layer: int) -> np.ndarray:
        """Mixed log saliency [survivors] of a layer's survivors.

        Args:
            mix: float [C], the criteria's weights.
            layer: index.
        """
        return sum(m * scores[layer] for m, scores in zip(mix, self._alive_scores, strict=True) if m)

    def dead_keys(self, mix: np.ndarray, layer: int) -> np.ndarray:
        """Mixed log saliency [zeroed] of a layer's zeroed parameters; see `alive_keys`."""
        return sum(m * scores[layer] for m, scores in zip(mix, self._dead_scores, strict=True) if m)

    def quotas(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Zeros a layer, int64 [L]: the bound layers' own, the others' as one threshold over all their keys puts them.

        Args:
            keys: float [survivors] of each layer; see `alive_keys`.
        """
        free = np.flatnonzero(~self.budget.bound)
        quotas = self.budget.fixed.copy()
        if len(free):
            everyone = np.concatenate([keys[layer] for layer in free])
            owner = np.repeat(free, self.room[free])
            quotas += np.bincount(owner[smallest(everyone, self.budget.free_total)], minlength=self.layers)
        return quotas

    def shift_quotas(self, quotas: np.ndarray, log_shift: np.ndarray) -> np.ndarray:
        """Move quota between the free layers, budget kept: a layer's survivors are multiplied by exp(log_shift).

        Args:
            quotas: int64 [L].
            log_shift: float [L].
        """
        free = ~self.budget.bound
        shifted = quotas.copy()
        if free.any():
            room = self.room[free]
            survivors = np.maximum((room - quotas[free]) * np.exp(log_shift[free]), TINY)
            shifted[free] = room - spread(survivors, room, int(room.sum()) - self.budget.free_total)
        return shifted
