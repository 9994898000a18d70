"""Genomes of many individuals as arrays, and the candidates that they stand for."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numba import njit

from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.evolution.space import SearchSpace


class Genomes(NamedTuple):
    """K genomes of two levels: how many zeros each layer takes, and which survivors those are.

    Positions are counted as in `Field`: over all layers' survivors that may be zeroed, or zeroed parameters that may
    come back.
    """

    mix: np.ndarray
    """float32 [K, C], weights of the criteria, summing to 1."""
    quotas: np.ndarray
    """int64 [K, L], net zeros a layer."""
    members: np.ndarray
    """int32 [K, W], ascending positions of survivors to zero; a layer has its quota and as many as return to it. What
    follows them means nothing, one place at least."""
    returned: np.ndarray
    """int64 [K, L], parameters that come back to a layer."""
    revived: np.ndarray
    """int32 [K, V], their ascending positions."""

    @classmethod
    def empty(cls, count: int, space: SearchSpace, revivals: float) -> Self:
        """Room for genomes of which at most a share `revivals` of a layer's survivors comes back."""
        field = space.field
        layers, most = len(field.room), most_revived(field.room, np.diff(field.dead_starts), revivals)
        zeros = int(field.fixed.sum()) + field.free_total
        return cls(np.empty((count, len(field.alive)), np.float32), np.empty((count, layers), np.int64),
                   np.empty((count, zeros + most + 1), np.int32), np.empty((count, layers), np.int64),
                   np.empty((count, most), np.int32))

    @property
    def count(self) -> int:
        """K."""
        return len(self.mix)

    def take(self, rows: Sequence[int] | np.ndarray | slice) -> Self:
        """Some genomes, as they are numbered."""
        return type(self)(*(part[rows] for part in self))

    def joined(self, others: Self) -> Self:
        """These genomes, and others after them."""
        return type(self)(*(np.concatenate(parts) for parts in zip(self, others, strict=True)))

    def put(self, genomes: Self) -> None:
        """Become these."""
        for part, new in zip(self, genomes, strict=True):
            part[:] = new

    def candidates(self, space: SearchSpace) -> list[Candidate]:
        """The zeroing sets of each genome, of layers that change alone."""
        return self.cut(*self.flat(space))

    def flat(self, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
        """Members int64 [K, W] and revived int64 [K, V] as flat indices of their layers' weights."""
        returned = self.returned.sum(1)
        return (_flat(space.alive_indices, self.members, self.quotas.sum(1) + returned),
                _flat(space.dead_indices, self.revived, returned))

    def cut(self, zero: np.ndarray, revive: np.ndarray) -> list[Candidate]:
        """Cut flat indices into zeroing sets; see `flat`."""
        zeros, revivals = (self.quotas + self.returned).tolist(), self.returned.tolist()
        found = []
        for row in range(self.count):
            sets, begin, back = [], 0, 0
            for layer, (more, returned) in enumerate(zip(zeros[row], revivals[row], strict=True)):
                if more:  # at least as many as return
                    sets.append(ZeroingSet(layer, zero[row, begin:begin + more], revive[row, back:back + returned]))
                    begin, back = begin + more, back + returned
            found.append(tuple(sets))
        return found

    def sums(self, alive: np.ndarray, dead: np.ndarray) -> np.ndarray:
        """Costs of each genome's zeros less those of what it brings back, float64 [K].

        Args:
            alive: float32 [N], by position.
            dead: float32 [M], by position.
        """
        return _sums(self, alive, dead)


@njit(nogil=True, cache=True)
def _flat(positions, places, counts):  # pragma: no cover - compiled
    """What the first counts[k] places of each row stand for, int64 [K, W]; what comes after them does not matter."""
    found = np.empty(places.shape, np.int64)
    for row in range(len(places)):
        for i in range(counts[row]):
            found[row, i] = positions[places[row, i]]
    return found


def most_revived(room: np.ndarray, dead: np.ndarray, revivals: float) -> int:
    """Parameters that may come back to all layers together.

    Args:
        room: int64 [L], survivors.
        dead: int64 [L], zeroed parameters that may come back.
        revivals: share of the survivors, in [0, 1].
    """
    return int(np.minimum(np.ceil(revivals * room), dead).sum())


@njit(nogil=True, cache=True)
def _sums(genomes, alive, dead):  # pragma: no cover - compiled
    sums = np.zeros(len(genomes.mix), np.float64)
    for row in range(len(sums)):
        members = back = 0
        for layer in range(genomes.quotas.shape[1]):
            members += genomes.quotas[row, layer] + genomes.returned[row, layer]
            back += genomes.returned[row, layer]
        for i in range(members):
            sums[row] += alive[genomes.members[row, i]]
        for i in range(back):
            sums[row] -= dead[genomes.revived[row, i]]
    return sums
