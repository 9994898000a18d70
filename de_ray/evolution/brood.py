"""Candidates of a generation that are bred while the first of them are evaluated already."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

from de_ray.evolution.candidate import Candidate, blocks
from de_ray.evolution.genomes import Genomes
from de_ray.evolution.space import SearchSpace

KEPT = 2**26
"""Bytes of indices up to which a brood keeps its candidates."""


class Brood(Sequence[Candidate]):
    """Candidates of genomes, most of which are yet to be bred, block by block.

    From the first look on they are bred in the background, in order, on as many cores as there are. A single block is
    bred by who looks. Candidates are kept where they are small, since to make many anew takes the driver's time. Where
    they are large, genomes alone are, and each candidate is made when it is read.

    Args:
        genomes: K of them, the first `ready` as they are to be.
        space: which their positions are of.
        ready: genomes that are there already, in [0, K].
        write: breeds the children from one number to another, which follow those, into the genomes given.
    """

    def __init__(self, genomes: Genomes, space: SearchSpace, ready: int,
                 write: Callable[[int, int, Genomes], None]) -> None:
        self._genomes, self._space, self._ready, self._write = genomes, space, ready, write
        self._small = 8 * space.budget.total * genomes.count <= KEPT
        self._candidates = [] if self._small else genomes.candidates(space)
        self._there = 0
        """Candidates that can be read."""
        self._bred = self._breed()

    def __len__(self) -> int:
        return self._genomes.count

    def __getitem__(self, key: int | slice) -> Candidate | list[Candidate]:
        if isinstance(key, int) and 0 <= key < self._there:
            return self._candidates[key]
        rows = range(len(self))[key]
        last = rows if isinstance(rows, int) else max(rows, default=-1)
        while self._there <= last:
            genomes, *flat = next(self._bred)
            self._there += genomes.count
            if self._small:
                self._candidates += genomes.cut(*flat)
            if self._there == len(self):
                self._bred.close()  # it knows of this brood: both would wait for the collector of garbage
        return self._candidates[key]

    def part(self, rows: Sequence[int]) -> "Part":
        """Some of these candidates, which are bred no sooner than they are looked at."""
        return Part(self, rows)

    @property
    def genomes(self) -> Genomes:
        """All genomes, bred now if they were not."""
        self[-1:]
        return self._genomes

    def _breed(self) -> Iterator[tuple]:
        """Blocks of genomes, in order, and, of small ones, what they stand for; see `Genomes.flat`."""
        parts = list(blocks(len(self)))
        if len(parts) == 1:
            yield self._block(parts[0])
            return
        with ThreadPoolExecutor(cpu_count()) as threads:
            yield from threads.map(self._block, parts)

    def _block(self, part: range) -> tuple:
        begin, end = max(part.start, self._ready), max(part.stop, self._ready)
        if begin < end:
            self._write(begin - self._ready, end - self._ready, self._genomes.take(slice(begin, end)))
        genomes = self._genomes.take(slice(part.start, part.stop))
        return genomes, *(genomes.flat(self._space) if self._small else ())


class Part(Sequence[Candidate]):
    """Candidates of some rows of a brood; see `Brood.part`."""

    def __init__(self, brood: Brood, rows: Sequence[int]) -> None:
        self._brood, self._rows = brood, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | slice) -> Candidate | list[Candidate]:
        rows = self._rows[key]
        return self._brood[rows] if isinstance(rows, int) else [self._brood[row] for row in rows]
