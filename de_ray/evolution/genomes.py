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
    """uint8 [K, N / 8 rounded up], bits: whether the survivor at each position is zeroed, a byte's lowest bit first. A
    layer has as many members as its quota and what returns to it."""
    returned: np.ndarray
    """int64 [K, L], parameters that come back to a layer."""
    revived: np.ndarray
    """int32 [K, V], their ascending positions."""

    @classmethod
    def empty(cls, count: int, space: SearchSpace, revivals: float) -> Self:
        """Room for genomes of which at most a share `revivals` of a layer's survivors comes back."""
        field = space.field
        layers, most = len(field.room), most_revived(field.room, np.diff(field.dead_starts), revivals)
        return cls(np.empty((count, len(field.alive)), np.float32), np.empty((count, layers), np.int64),
                   np.empty((count, -(-field.alive.shape[1] // 8)), np.uint8), np.empty((count, layers), np.int64),
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

    def candidate(self, space: SearchSpace, row: int) -> Candidate:
        """The zeroing sets of a genome, of layers that change alone."""
        sets, back = [], 0
        for layer, (quota, returned) in enumerate(zip(self.quotas[row].tolist(), self.returned[row].tolist(),
                                                      strict=True)):
            if quota + returned:  # at least as many as return
                sets.append(BredSet(layer, space, self.members[row], quota + returned,
                                    self.revived[row, back:back + returned]))
                back += returned
        return tuple(sets)

    def flat(self, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
        """Members int64 [K, W] and revived int64 [K, V] of each genome as flat indices of their layers' weights.

        What comes after a row's own means nothing.
        """
        returned = self.returned.sum(1)
        zeros = self.quotas.sum(1) + returned
        return (_all_members(self.members, zeros.max(initial=0), space.alive_indices),
                _all_revived(self.revived, returned, space.dead_indices))

    def cut(self, zero: np.ndarray, revive: np.ndarray) -> list[Candidate]:
        """All candidates, as `candidate` would make them one by one, of flat indices; see `flat`."""
        zeros, revivals = (self.quotas + self.returned).tolist(), self.returned.tolist()
        found = []
        for row in range(self.count):
            sets, begin, back = [], 0, 0
            for layer, (more, returned) in enumerate(zip(zeros[row], revivals[row], strict=True)):
                if more:
                    sets.append(ZeroingSet(layer, zero[row, begin:begin + more], revive[row, back:back + returned]))
                    begin, back = begin + more, back + returned
            found.append(tuple(sets))
        return found

    def candidates(self, space: SearchSpace) -> Sequence[Candidate]:
        """See `candidate`; each is made anew whenever it is read, so that nobody need keep them."""
        return Candidates(self, space)

    def sums(self, alive: np.ndarray, dead: np.ndarray) -> np.ndarray:
        """Costs of each genome's zeros less those of what it brings back, float64 [K].

        Args:
            alive: float32 [N], by position.
            dead: float32 [M], by position.
        """
        return _sums(self, alive, dead)


class Candidates(Sequence[Candidate]):
    """The candidates of genomes; see `Genomes.candidates`."""

    def __init__(self, genomes: Genomes, space: SearchSpace) -> None:
        self._genomes, self._space = genomes, space

    def __len__(self) -> int:
        return self._genomes.count

    def __getitem__(self, key: int | slice) -> Candidate | list[Candidate]:
        rows = range(len(self))[key]
        if isinstance(rows, int):
            return self._genomes.candidate(self._space, rows)
        return [self._genomes.candidate(self._space, row) for row in rows]


class BredSet(ZeroingSet):
    """A zeroing set of a genome, whose indices are looked up when they are first asked for.

    Of a large layer they take megabytes, and who hands out a generation's candidates holds all of them, where those
    under evaluation are a few.

    Args:
        layer: see `ZeroingSet`.
        space: which positions are of.
        members: bits of a genome; see `Genomes`.
        count: members in the layer.
        back: int32 [r], positions of what returns to the layer.
    """

    __slots__ = ("_back", "_count", "_members", "_space")

    def __init__(self, layer: int, space: SearchSpace, members: np.ndarray, count: int, back: np.ndarray) -> None:
        put = object.__setattr__  # the class is frozen
        put(self, "layer", layer)
        put(self, "_space", space)
        put(self, "_members", members)
        put(self, "_count", count)
        put(self, "_back", back)

    def __getattr__(self, name: str) -> np.ndarray:
        """What is not there yet: zero and revive, which are from then on."""
        if name == "zero":
            starts = self._space.field.alive_starts
            found = _members_in(self._members, starts[self.layer], starts[self.layer + 1], self._count,
                                self._space.alive_indices)
        elif name == "revive":
            found = self._space.dead_indices[self._back].astype(np.int64)
        else:
            raise AttributeError(name)
        object.__setattr__(self, name, found)
        return found


@njit(nogil=True, cache=True)
def _members_in(bits, begin, end, count, indices):  # pragma: no cover - compiled
    """What the members from position `begin` to `end` stand for, int64 [count]."""
    found, members = np.empty(count + 1, np.int64), 0
    for i in range(begin, end):
        found[members] = indices[i]
        members += (bits[i >> 3] >> (i & 7)) & 1
    return found[:count]


@njit(nogil=True, cache=True)
def _all_members(bits, width, indices):  # pragma: no cover - compiled
    """What the members of each row stand for, int64 [K, width + 1]."""
    found = np.empty((len(bits), width + 1), np.int64)
    for row in range(len(bits)):
        members = 0
        for i in range(len(indices)):
            found[row, members] = indices[i]
            members += (bits[row, i >> 3] >> (i & 7)) & 1
    return found


@njit(nogil=True, cache=True)
def _all_revived(places, counts, indices):  # pragma: no cover - compiled
    """What the first counts[k] places of each row stand for, int64 [K, V]."""
    found = np.empty(places.shape, np.int64)
    for row in range(len(places)):
        for i in range(counts[row]):
            found[row, i] = indices[places[row, i]]
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
    sums, costs = np.zeros(len(genomes.mix), np.float64), np.zeros(2, np.float32)  # costs: of one that stays, and goes
    for row in range(len(sums)):
        bits, total, back = genomes.members[row], 0.0, 0
        for i in range(len(alive)):
            costs[1] = alive[i]
            total += costs[(bits[i >> 3] >> (i & 7)) & 1]
        for layer in range(genomes.quotas.shape[1]):
            back += genomes.returned[row, layer]
        for i in range(back):
            total -= dead[genomes.revived[row, i]]
        sums[row] = total
    return sums
