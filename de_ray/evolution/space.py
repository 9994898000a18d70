"""What a cycle's search may choose from: survivors, their saliencies and the budget of zeros."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
LAST = np.iinfo(np.int32).max
"""Weights of a layer up to which indices take four bytes."""


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
        scales, plain = zip(*(self._surveyed(saliency[criterion], masks) for criterion in self.criteria), strict=True)
        reach = np.minimum(self.room, REACH * np.max(plain, axis=0) + LEAST_REACH).tolist()
        back = [round(CONTENDERS * revivals * room) for room in self.room.tolist()]
        alive, dead = [], []
        for layer, mask in enumerate(masks):
            of = [(saliency[criterion][layer], scale) for criterion, scale in zip(self.criteria, scales, strict=True)]
            alive.append(_union((_logs(s[mask], scale) for s, scale in of), mask, reach[layer]))
            dead.append(_returnable((-_logs(s[~mask], scale) for s, scale in of), ~mask, back[layer]))
        self.alive_indices = np.concatenate(alive)
        """int32 [N], int64 where a layer is huge: survivors that may be zeroed, as flat indices of their layers'
        weights, by position as `Field` counts them. They are those that any criterion counts among its least. Children
        are bred from these alone, so that what a child costs depends on how much a cycle zeroes, not on the size of
        the network."""
        self.dead_indices = np.concatenate(dead)
        """The same [M] of zeroed parameters that may come back."""
        starts = _starts(alive), _starts(dead)
        del alive, dead
        self.field = Field(self._scores(saliency, scales, self.alive_indices, starts[0]),
                           self._scores(saliency, scales, self.dead_indices, starts[1]), *starts, self.room,
                           budget.fixed.astype(np.int64), ~budget.bound, budget.free_total)

    def gathered(self, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Values [layer.size] a layer, float32, by position: [N] of the alive, [M] of the dead."""
        found = []
        for indices, starts in ((self.alive_indices, self.field.alive_starts),
                                (self.dead_indices, self.field.dead_starts)):
            found.append(np.empty(len(indices), np.float32))
            for layer, here in enumerate(_slices(starts)):
                found[-1][here] = values[layer][indices[here]]
        return tuple(found)

    def _scores(self, saliency: Mapping[str, Sequence[np.ndarray]], scales: Sequence["Scale"], indices: np.ndarray,
                starts: np.ndarray) -> np.ndarray:
        """Log saliencies by position, float32 [C, n], finite whatever saliencies were."""
        found = np.empty((len(scales), len(indices)), np.float32)
        for row, criterion, scale in zip(found, self.criteria, scales, strict=True):
            for layer, here in enumerate(_slices(starts)):
                row[here] = _logs(saliency[criterion][layer][indices[here]], scale)
            np.nan_to_num(row, copy=False)
            np.clip(row, -HUGE, HUGE, out=row)
        return found

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.sizes)

    def _surveyed(self, saliency: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple["Scale", np.ndarray]:
        """A criterion's scale, and the zeros that its plain set takes of each layer: int64 [L]."""
        starts = np.cumsum([0, *self.room])
        logs = np.empty(starts[-1], np.float32)
        for here, of, mask in zip(_slices(starts), saliency, masks, strict=True):
            logs[here] = of[mask]
        logs += np.float32(TINY)
        np.log(logs, out=logs)
        scale = float(np.median(logs)), float(np.std(logs)) or 1.0
        logs -= scale[0]
        logs /= scale[1]
        return scale, self._quotas([logs[here] for here in _slices(starts)])

    def _quotas(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Zeros a layer, int64 [L]: the bound layers' own, the others' as one threshold over all their keys puts them.

        Args:
            keys: float of each layer, of its survivors.
        """
        quotas = self.budget.fixed.copy()
        if len(self._free):
            chosen = smallest(np.concatenate([keys[layer] for layer in self._free]), self.budget.free_total)
            ends = np.cumsum([len(keys[layer]) for layer in self._free])
            quotas[self._free] += np.diff(np.searchsorted(chosen, ends), prepend=0)
        return quotas


Scale = tuple[float, float]
"""Median and standard deviation of a criterion's log saliencies over the survivors."""


def _logs(saliency: np.ndarray, scale: Scale) -> np.ndarray:
    """Logarithms in units of their criterion's own spread over the survivors, so that criteria can be mixed.

    Where they are needed they are taken again: to keep those of all criteria would take as much memory as saliencies
    do, and time to read it.
    """
    logs = saliency + np.float32(TINY)
    np.log(logs, out=logs)
    logs -= scale[0]
    logs /= scale[1]
    return logs


def _returnable(keys: Iterable[np.ndarray], dead: np.ndarray, count: int) -> np.ndarray:
    """The most salient zeroed parameters by any criterion, ascending; the others are hopeless."""
    if count == 0:
        return np.empty(0, np.int32)
    return _union(keys, dead, count)


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Where each part starts in their concatenation, and where the last one ends: int64 [L + 1]."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _slices(starts: np.ndarray) -> list[slice]:
    """Of each part in their concatenation; see `_starts`."""
    return [slice(*pair) for pair in pairwise(starts.tolist())]


def _union(keys: Iterable[np.ndarray], among: np.ndarray, count: int) -> np.ndarray:
    """Flat indices, ascending, of those that are among the `count` least by any of their keys.

    Args:
        keys: float [n] by criterion, of the n positions that are True in `among`.
        among: bool [layer.size].
        count: >= 0; all of them where there are no more.
    """
    indices = np.flatnonzero(among).astype(np.int32 if len(among) <= LAST else np.int64)
    if count >= len(indices):
        return indices
    chosen = np.zeros(len(indices), bool)
    for of in keys:
        chosen[smallest(of, count)] = True
    return indices[chosen]
