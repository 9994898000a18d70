"""Candidates of a generation that are bred while the first of them are evaluated already."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np

from de_ray.evolution.candidate import Candidate, blocks
from de_ray.evolution.genomes import Genomes
from de_ray.evolution.space import SearchSpace


class Brood(Sequence[Candidate]):
    """Candidates of genomes, most of which are yet to be bred, block by block.

    From the first look on they are bred in the background, in order, on as many cores as there are. A single block is
    bred by who looks.

    Args:
        genomes: K of them, the first `ready` as they are to be.
        space: which their positions are of.
        ready: genomes that are there already, in [0, K].
        write: breeds the children from one number to another, which follow those, into the genomes given.
    """

    def __init__(self, genomes: Genomes, space: SearchSpace, ready: int,
                 write: Callable[[int, int, Genomes], None]) -> None:
        self._genomes, self._space, self._ready, self._write = genomes, space, ready, write
        self._candidates: list[Candidate] = []
        self._bred = self._breed()

    def __len__(self) -> int:
        return self._genomes.count

    def __getitem__(self, key: int | slice) -> Candidate | list[Candidate]:
        found = self._candidates
        if isinstance(key, int) and 0 <= key < len(found):
            return found[key]
        last = max(range(len(self))[key], default=-1) if isinstance(key, slice) else range(len(self))[key]
        while len(found) <= last:
            genomes, zero, revive = next(self._bred)
            found += genomes.cut(zero, revive)
        return found[key]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self[:])

    def part(self, rows: range) -> "Part":
        """Some of these candidates, of consecutive rows, which are bred no sooner than they are looked at."""
        return Part(self, rows)

    @property
    def genomes(self) -> Genomes:
        """All genomes, bred now if they were not."""
        self[:]
        return self._genomes

    def _breed(self) -> Iterator[tuple[Genomes, np.ndarray, np.ndarray]]:
        """Blocks of genomes, in order, and what they stand for; see `Genomes.flat`."""
        parts = list(blocks(len(self)))
        if len(parts) == 1:
            yield self._block(parts[0])
            return
        with ThreadPoolExecutor(cpu_count()) as threads:
            yield from threads.map(self._block, parts)

    def _block(self, part: range) -> tuple[Genomes, np.ndarray, np.ndarray]:
        begin, end = max(part.start, self._ready), max(part.stop, self._ready)
        if begin < end:
            self._write(begin - self._ready, end - self._ready, self._genomes.take(slice(begin, end)))
        genomes = self._genomes.take(slice(part.start, part.stop))
        return genomes, *genomes.flat(self._space)


class Part(Sequence[Candidate]):
    """Consecutive candidates of a brood; see `Brood.part`."""

    def __init__(self, brood: Brood, rows: range) -> None:
        self._brood, self._rows = brood, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | slice) -> Candidate | list[Candidate]:
        rows = self._rows[key]
        return self._brood[rows] if isinstance(rows, int) else self._brood[rows.start:rows.stop:rows.step]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self[:])
