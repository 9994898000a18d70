"""What a cycle's search may choose from: survivors, their saliencies and the budget of zeros."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from de_ray.evolution.operators import TINY, smallest

CONTENDERS = 8
"""Zeroed parameters that may come back, by each criterion, for each one that can."""
REACH = 2
"""Survivors that may be zeroed, by each criterion, for each one that the criterion's plain set zeroes."""
LEAST_REACH = 64
"""The same for layers of which plain sets take next to nothing."""

HUGE = 1e6
"""Bound of standardized log saliencies."""


@dataclass(frozen=True)
class Budget:
    """Net zeros to add in a cycle: a number for each bound layer, and one that evolution spreads over the others.

    For regrowth the same of survivors.
    """

    bound: np.ndarray
    """bool [L], True for layers that have a number of their own."""
    fixed: np.ndarray
    """int64 [L], zeros of the bound layers; 0 elsewhere."""
    free_total: int
    """Zeros over all other layers."""

    @property
    def total(self) -> int:
        """Zeros over all layers."""
        return self.free_total + int(self.fixed.sum())


class Field(NamedTuple):
    """A search space as compiled breeding reads it: layers one after the other, positions counted over all of them."""

    alive: np.ndarray
    """float32 [C, N], standardized log saliencies of the survivors that may be zeroed."""
    dead: np.ndarray
    """float32 [C, M], of the zeroed parameters that may come back."""
    alive_starts: np.ndarray
    """int64 [L + 1]: layer l has positions alive_starts[l] to alive_starts[l + 1] of N."""
    dead_starts: np.ndarray
    """int64 [L + 1], the same of M."""
    room: np.ndarray
    """int64 [L], survivors."""
    fixed: np.ndarray
    """int64 [L], zeros of the bound layers; 0 elsewhere."""
    is_free: np.ndarray
    """bool [L], layers that are not bound."""
    free_total: int
    """Zeros over those."""


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
        free_room = int(self.room[self._free].sum())
        if free_room < budget.free_total or (budget.fixed > self.room).any():
            raise ValueError(f"{budget.free_total} zeros asked for over all layers and {budget.fixed.tolist()} in "
                             f"bound ones, expected at most the {free_room} and {self.room.tolist()} survivors; lower "
                             "evolution.sparsity")
        positions = [np.flatnonzero(mask) for mask in masks]
        logs = self._standardized(saliency, positions)
        plain = [self._quotas([log[i] for log, i in zip(of, positions, strict=True)]) for of in logs]
        reach = np.minimum(self.room, REACH * np.max(plain, axis=0) + LEAST_REACH)
        self.alive = [i[_union(smallest(log[layer][i], int(reach[layer])) for log in logs)]
                      for layer, i in enumerate(positions)]
        """Survivors that may be zeroed: those that any criterion counts among its least. Children are bred from these
        alone, so that what a child costs depends on how much a cycle zeroes, not on the size of the network."""
        self.dead = [self._returnable([log[layer] for log in logs], ~mask,
                                      round(CONTENDERS * revivals * self.room[layer]))
                     for layer, mask in enumerate(masks)]
        """Zeroed parameters that may come back."""
        self.alive_indices, self.dead_indices = np.concatenate(self.alive), np.concatenate(self.dead)
        """The same of all layers, one after the other: int64 [N] and [M], by position as `Field` counts them."""
        self.field = Field(
            _scores(logs, self.alive), _scores(logs, self.dead), _starts(self.alive), _starts(self.dead), self.room,
            budget.fixed.astype(np.int64), ~budget.bound, budget.free_total)

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

    def _quotas(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Zeros a layer, int64 [L]: the bound layers' own, the others' as one threshold over all their keys puts them.

        Args:
            keys: float of each layer, of its survivors.
        """
        quotas = self.budget.fixed.copy()
        if len(self._free):
            everyone = np.concatenate([keys[layer] for layer in self._free])
            owner = np.repeat(self._free, [len(keys[layer]) for layer in self._free])
            quotas += np.bincount(owner[smallest(everyone, self.budget.free_total)], minlength=self.layers)
        return quotas


def _scores(logs: Sequence[Sequence[np.ndarray]], positions: Sequence[np.ndarray]) -> np.ndarray:
    """Log saliencies at some positions of each layer, float32 [C, n], finite whatever saliencies were."""
    found = np.concatenate([np.stack([of[layer][i] for of in logs]) for layer, i in enumerate(positions)], 1)
    return np.clip(np.nan_to_num(found), -HUGE, HUGE)


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Where each part starts in their concatenation, and where the last one ends: int64 [L + 1]."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _union(sets: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(list(sets)))
