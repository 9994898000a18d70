"""What a cycle's search may choose from: survivors, their saliencies and the budget of zeros."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from de_ray.evolution.operators import TINY, smallest, spread

CONTENDERS = 8
"""Zeroed parameters that may come back, by each criterion, for each one that can."""
REACH = 2
"""Survivors that may be zeroed, by each criterion, for each one that the criterion's plain set zeroes."""
LEAST_REACH = 64
"""The same for layers of which plain sets take next to nothing."""


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
        revivals: at most this share of a layer's survivors comes back in a candidate, in [0, 1].

    Raises:
        ValueError: the budget asks for more zeros than there are survivors.
    """

    def __init__(self, saliency: Mapping[str, Sequence[np.ndarray]], masks: Sequence[np.ndarray],
                 budget: Budget, revivals: float = 1.0) -> None:
        self.criteria = tuple(saliency)
        self.budget = budget
        self.sizes = np.array([len(mask) for mask in masks], np.int64)
        self.room = np.array([int(mask.sum()) for mask in masks], np.int64)
        """int64 [L]: survivors."""
        self._free = np.flatnonzero(~budget.bound)
        self._free_room = self.room[self._free]
        self._free_survivors = int(self._free_room.sum()) - budget.free_total
        if self._free_survivors < 0 or (budget.fixed > self.room).any():
            raise ValueError(f"{budget.free_total} zeros asked for over all layers and {budget.fixed.tolist()} in "
                             f"bound ones, expected at most the {self._free_room.sum()} and {self.room.tolist()} "
                             "survivors; lower evolution.sparsity")
        positions = [np.flatnonzero(mask) for mask in masks]
        logs = self._standardized(saliency, positions)
        plain = [self.quotas([log[i] for log, i in zip(of, positions, strict=True)]) for of in logs]
        reach = np.minimum(self.room, REACH * np.max(plain, axis=0) + LEAST_REACH)
        self.alive = [i[_union(smallest(log[layer][i], int(reach[layer])) for log in logs)]
                      for layer, i in enumerate(positions)]
        """Survivors that may be zeroed: those that any criterion counts among its least. Children are bred from these
        alone, so that what a child costs depends on how much a cycle zeroes, not on the size of the network."""
        self.dead = [self._returnable([log[layer] for log in logs], ~mask,
                                      round(CONTENDERS * revivals * self.room[layer]))
                     for layer, mask in enumerate(masks)]
        """Zeroed parameters that may come back."""
        self.capacity = np.array([len(alive) for alive in self.alive], np.int64)
        self._free_capacity = self.capacity[self._free]
        self._alive_scores = [np.stack([of[layer][i] for of in logs]) for layer, i in enumerate(self.alive)]  # [C, n]
        self._dead_scores = [np.stack([of[layer][i] for of in logs]) for layer, i in enumerate(self.dead)]

    def _standardized(self, saliency: Mapping[str, Sequence[np.ndarray]], positions: Sequence[np.ndarray]) -> list:
        """Logarithms in units of each criterion's own spread over the survivors, so that criteria can be mixed."""
        found = []
        for criterion in self.criteria:
            logs = [np.log(s + np.float32(TINY)) for s in saliency[criterion]]
            everyone = np.concatenate([log[i] for log, i in zip(logs, positions, strict=True)])
            center, scale = float(np.median(everyone)), float(np.std(everyone)) or 1.0
            found.append([(log - center) / scale for log in logs])
        return found

    @staticmethod
    def _returnable(scores: Sequence[np.ndarray], dead: np.ndarray, count: int) -> np.ndarray:
        """The most salient zeroed parameters by any criterion, ascending; the others are hopeless."""
        positions = np.flatnonzero(dead)
        if count == 0 or count >= len(positions):
            return positions[:count]
        return positions[_union(smallest(-score[positions], count) for score in scores)]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sizes)

    def alive_keys(self, mix: np.ndarray, layer: int) -> np.ndarray:
        """Mixed log saliency [capacity] of those survivors of a layer that may be zeroed.

        Args:
            mix: float [C], the criteria's weights.
            layer: index.
        """
        return mix.astype(np.float32) @ self._alive_scores[layer]

    def dead_keys(self, mix: np.ndarray, layer: int) -> np.ndarray:
        """Mixed log saliency of a layer's zeroed parameters that may come back; see `alive_keys`."""
        return mix.astype(np.float32) @ self._dead_scores[layer]

    def quotas(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Zeros a layer, int64 [L]: the bound layers' own, the others' as one threshold over all their keys puts them.

        Args:
            keys: float of each layer; see `alive_keys`.
        """
        quotas = self.budget.fixed.copy()
        if len(self._free):
            everyone = np.concatenate([keys[layer] for layer in self._free])
            owner = np.repeat(self._free, [len(keys[layer]) for layer in self._free])
            quotas += np.bincount(owner[smallest(everyone, self.budget.free_total)], minlength=self.layers)
        return quotas

    def shift_quotas(self, quotas: np.ndarray, log_shift: np.ndarray) -> np.ndarray:
        """Move quota between the free layers, budget kept: a layer's survivors are multiplied by exp(log_shift).

        Args:
            quotas: int64 [L].
            log_shift: float [L].
        """
        if not len(self._free):
            return quotas.copy()
        room, capacity = self._free_room, self._free_capacity
        survivors = np.maximum((room - quotas[self._free]) * np.exp(log_shift[self._free]), TINY)
        wanted = room - spread(survivors, room, self._free_survivors)
        within = np.minimum(wanted, capacity)
        beyond = int((wanted - within).sum())
        if beyond:  # what is out of a layer's reach goes to the others, by the reach that they have left
            left = capacity - within
            within += spread(left + TINY, left, beyond)
        shifted = quotas.copy()
        shifted[self._free] = within
        return shifted


def _union(sets: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(list(sets)))
