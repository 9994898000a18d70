"""Directed evolution of one cycle's zeroing sets, as ask/tell: who evaluates is somebody else's business.

After Franca-Neto, arXiv:2206.05859, with proposals drawn by saliency. Candidates are raced (successive halving,
Jamieson & Talwalkar, arXiv:1502.07943): a generation is screened on a few calibration batches, fresh in each
generation and the same for all of its candidates, and only the better half sees every batch of breeding. The least of
many measurements flatters its candidate, so the last choice, between the elite and every criterion's plain set, is made
on batches that breeding has not seen. Before all that, a surrogate may choose among more children than are evaluated;
it is asked as long as it ranked the first generation, which it had no part in choosing, as its evaluation did.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.evolution.operators import cross, draw, resize, smallest, swap
from de_ray.evolution.space import SearchSpace
from de_ray.evolution.surrogate import Estimate, rank_correlation

LEAST_CORRELATION = 0.3
"""Rank correlation with evaluation below which a surrogate is not asked."""


@dataclass(frozen=True)
class Individual:
    """A genome of two levels: how many zeros each layer takes, and which survivors those are."""

    mix: np.ndarray
    """float [C], weights of the criteria, summing to 1."""
    quotas: np.ndarray
    """int64 [L], net zeros a layer."""
    members: tuple[np.ndarray, ...]
    """Sorted positions among each layer's survivors; quota + number of revived ones."""
    revived: tuple[np.ndarray, ...]
    """Sorted positions among each layer's zeroed parameters."""
    fitness: float = np.inf
    """Mean divergence on the batches that it was last evaluated on."""
    full: bool = False
    """Whether those were all batches of breeding."""

    @property
    def rank_key(self) -> tuple[bool, float]:
        """Sorts individuals: those that saw all batches first, lower divergence first."""
        return (not self.full, self.fitness)


@dataclass(frozen=True)
class Request:
    """Candidates to be evaluated on calibration batches."""

    candidates: list[Candidate]
    batches: list[int]
    screening: bool = False
    """Whether the answers only decide who is evaluated again: lower precision will do."""


class DirectedSearch:
    """The search of one cycle.

    Args:
        space: survivors, saliencies and budget.
        config: operators' rates and the population.
        batches: number of calibration batches.
        rng: source of every draw.
        estimate: chooses among `config.oversample` times the children that are evaluated; None: children are evaluated
            as they are bred.

    Example:
        while (request := search.ask()) is not None:
            search.tell(pool.evaluate(request.candidates, request.batches, request.screening))
        best, fitness = search.best()
    """

    def __init__(self, space: SearchSpace, config: EvolutionConfig, batches: int, rng: np.random.Generator,
                 estimate: Estimate | None = None) -> None:
        self._space, self._config, self._rng, self._estimate = space, config, rng, estimate
        self.correlation: float | None = None
        """Of the estimate's ranks with those by evaluation, over the first generation; None before, or without one."""
        confirming = min(batches - 1, round(config.confirm * batches))
        self._breeding = list(range(batches - confirming))
        self._confirming = list(range(batches - confirming, batches)) or self._breeding
        self._screened = max(1, round(config.screen * len(self._breeding)))
        self.saved_evaluations = 0
        """Evaluations on all breeding batches that racing spared."""
        self._best: Individual | None = None
        self._steps = self._search()
        self._request: Request | None = next(self._steps, None)

    def ask(self) -> Request | None:
        """What to evaluate next; None when the search is over."""
        return self._request

    def tell(self, fitness: np.ndarray) -> None:
        """Fitness float [K] of the request's candidates; non-finite puts a candidate out."""
        try:
            self._request = self._steps.send(np.where(np.isfinite(fitness), fitness, np.inf))
        except StopIteration:
            self._request = None

    def best(self) -> tuple[Candidate, float]:
        """The best candidate and its mean divergence over the confirming batches (NaN where none was evaluated).

        Raises:
            FloatingPointError: every candidate's divergence was non-finite.
        """
        if self._best is None:
            return self._candidate(self._plain(self._pure(0))), np.nan
        if not np.isfinite(self._best.fitness):
            raise FloatingPointError("the divergence of every candidate is NaN or infinite")
        return self._candidate(self._best), self._best.fitness

    def _search(self) -> Generator[Request, np.ndarray, None]:
        if self._config.generations == 0:
            return
        first = self._first_population()
        plain = first[:len(self._space.criteria)]
        population = yield from self._race(first, spared=len(plain))
        for _ in range(self._config.generations - 1):
            elite = population[:self._config.elite]
            children = self._children(population, self._config.population - len(elite))
            raced = yield from self._race(children, spared=0)
            population = sorted([*elite, *raced], key=lambda one: one.rank_key)
        finalists = yield from self._evaluate([*population[:self._config.elite], *plain], self._confirming)
        self._best = min(finalists, key=lambda one: one.fitness)

    def _race(self, entrants: list[Individual], spared: int) -> Generator[Request, np.ndarray, list[Individual]]:
        """Evaluate entrants, the first `spared` of them on all breeding batches whatever screening says; best first."""
        if self._screened < len(self._breeding) and len(entrants) > spared + 1:
            some = sorted(self._rng.choice(len(self._breeding), self._screened, replace=False).tolist())
            entrants = yield from self._evaluate(entrants, some, screening=True)
            self._judge(entrants)
            rest = sorted(entrants[spared:], key=lambda one: one.fitness)
            finalists = (len(rest) + 1) // 2
            self.saved_evaluations += len(rest) - finalists
            entrants, out = entrants[:spared] + rest[:finalists], rest[finalists:]
        else:
            out = []
        entrants = yield from self._evaluate(entrants, self._breeding)
        self._judge(entrants)
        return sorted([*entrants, *out], key=lambda one: one.rank_key)

    def _evaluate(self, ones: Sequence[Individual],
                  batches: list[int], screening: bool = False) -> Generator[Request, np.ndarray, list[Individual]]:
        fitness = yield Request([self._candidate(one) for one in ones], batches, screening)
        full = batches == self._breeding
        return [replace(one, fitness=float(f), full=full) for one, f in zip(ones, fitness, strict=True)]

    # Proposals.

    def _pure(self, criterion: int) -> np.ndarray:
        return np.eye(len(self._space.criteria))[criterion]

    def _keys(self, mix: np.ndarray) -> list[np.ndarray]:
        return [self._space.alive_keys(mix, layer) for layer in range(self._space.layers)]

    def _plain(self, mix: np.ndarray) -> Individual:
        """The plain top-k set of a mix of criteria."""
        keys = self._keys(mix)
        quotas = self._space.quotas(keys)
        members = tuple(smallest(k, int(q)) for k, q in zip(keys, quotas, strict=True))
        return Individual(mix, quotas, members, tuple(np.empty(0, np.int64) for _ in members))

    def _first_population(self) -> list[Individual]:
        """Every criterion's plain top-k, then variations of random mixes."""
        count = len(self._space.criteria)
        plain = [self._plain(self._pure(c)) for c in range(count)]
        mixes = self._rng.dirichlet(np.ones(count), max(0, self._config.population - count))
        return plain + [self._mutate(self._plain(mix)) for mix in mixes]

    # Variation.

    def _children(self, population: list[Individual], count: int) -> list[Individual]:
        """Children to evaluate: those of the least estimate, in the order in which they were bred."""
        if self._estimate is None or self.correlation is None or self.correlation < LEAST_CORRELATION:
            return [self._child(population) for _ in range(count)]
        bred = [self._child(population) for _ in range(self._config.oversample * count)]
        return [bred[i] for i in smallest(self._estimated(bred), count)]

    def _judge(self, entrants: list[Individual]) -> None:
        """Compare the estimate with the first evaluation that there is."""
        if self._estimate is not None and self.correlation is None:
            self.correlation = rank_correlation(self._estimated(entrants), np.array([one.fitness for one in entrants]))

    def _estimated(self, ones: Sequence[Individual]) -> np.ndarray:
        return self._estimate([self._candidate(one) for one in ones])

    def _child(self, population: list[Individual]) -> Individual:
        first = self._tournament(population)
        if self._rng.random() < self._config.crossover:
            return self._mutate(self._cross(first, self._tournament(population)))
        return self._mutate(first)

    def _tournament(self, population: list[Individual]) -> Individual:
        """The best of a few drawn at random; the population is sorted, so the lowest place wins."""
        return population[int(self._rng.integers(len(population), size=self._config.tournament).min())]

    def _cross(self, first: Individual, second: Individual) -> Individual:
        share = self._rng.random()
        mix = share * first.mix + (1 - share) * second.mix
        survivors = [np.log(np.maximum(self._space.room - one.quotas, 0.5)) for one in (first, second)]
        quotas = self._space.shift_quotas(first.quotas, (1 - share) * (survivors[1] - survivors[0]))
        keys = self._keys(mix)
        members = tuple(cross(a, b, k, int(q)) for a, b, k, q in
                        zip(first.members, second.members, keys, quotas, strict=True))
        return Individual(mix, quotas, members, tuple(np.empty(0, np.int64) for _ in members))

    def _mutate(self, one: Individual) -> Individual:
        """Move quota between layers, then exchange members, then bring zeroed parameters back."""
        space, config, rng = self._space, self._config, self._rng
        quotas = space.shift_quotas(one.quotas, config.quota_sigma * rng.standard_normal(space.layers))
        temperature = config.temperature * rng.random()
        members, revived = [], []
        for layer, quota in enumerate(quotas):
            keys = space.alive_keys(one.mix, layer)
            back = self._regrow(one.mix, layer, int(space.room[layer] - quota), int(space.capacity[layer] - quota))
            chosen = resize(one.members[layer], keys, int(quota) + len(back))
            members.append(swap(chosen, keys, round(config.swap * rng.random() * len(chosen)), temperature, rng))
            revived.append(back)
        return Individual(one.mix, quotas, tuple(members), tuple(revived))

    def _regrow(self, mix: np.ndarray, layer: int, survivors: int, room: int) -> np.ndarray:
        """Positions of the zeroed parameters that a mutation brings back, the most salient first; at most `room`."""
        dead = self._space.dead[layer]
        count = min(round(self._config.regrow * self._rng.random() * survivors), len(dead), room)
        if count == 0:
            return np.empty(0, np.int64)
        return draw(-self._space.dead_keys(mix, layer), count, self._config.temperature, self._rng)

    def _candidate(self, one: Individual) -> Candidate:
        space = self._space
        return tuple(ZeroingSet(layer, space.alive[layer][m], space.dead[layer][r])
                     for layer, (m, r) in enumerate(zip(one.members, one.revived, strict=True)) if len(m) or len(r))
