"""Directed evolution of one cycle's zeroing sets, as ask/tell: who evaluates is somebody else's business.

After Franca-Neto, arXiv:2206.05859, with proposals drawn by saliency. Candidates are raced (successive halving,
Jamieson & Talwalkar, arXiv:1502.07943): a generation is screened on a few calibration batches, fresh in each
generation and the same for all of its candidates, and only the better half sees every batch of breeding. Large
generations are raced in heats, so that finalists of one keep replicas busy while the next is bred. The least of
many measurements flatters its candidate, so the last choice, between the elite and every criterion's plain set, is made
on batches that breeding has not seen. Before all that, a surrogate may choose among more children than are evaluated;
it is asked as long as it ranked the first generation, which it had no part in choosing, as its evaluation did.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evolution.breeding import Rates, plain, vary
from de_ray.evolution.brood import Brood
from de_ray.evolution.candidate import Candidate, ZeroingSet, blocks
from de_ray.evolution.genomes import Genomes
from de_ray.evolution.request import Request
from de_ray.evolution.space import SearchSpace
from de_ray.evolution.surrogate import Estimate, rank_correlation

LEAST_CORRELATION = 0.3
"""Rank correlation with evaluation below which a surrogate is not asked."""
HEAT = 1024
"""Entrants that are raced among themselves, at least, where there are as many."""


@dataclass(frozen=True)
class Population:
    """P individuals and what is known of them."""

    genomes: Genomes
    fitness: np.ndarray
    """float64 [P], mean divergence on the batches that each was last evaluated on."""
    full: np.ndarray
    """bool [P], whether those were all batches of breeding."""

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [P], rows: those that saw all batches first, lower divergence first."""
        return np.lexsort((self.fitness, ~self.full))


Answer = tuple[Request, np.ndarray]
"""A request, and fitness float64 [K] of its candidates."""


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
            search.tell(request, pool.evaluate(request.candidates, request.batches, request.screening))
        best, fitness = search.best()

    Several requests may be open at a time and be answered in any order, which makes no difference to what is found:
    `ask` until it returns None, `tell` an answer, and so on until the search is `over`.
    """

    def __init__(self, space: SearchSpace, config: EvolutionConfig, batches: int, rng: np.random.Generator,
                 estimate: Estimate | None = None) -> None:
        self._space, self._config, self._rng = space, config, rng
        self._rates = Rates(float(config.quota_sigma), float(config.swap), float(config.regrow),
                            float(config.temperature))
        self._estimated = None if estimate is None else _of_genomes(estimate, space)
        self.correlation: float | None = None
        """Of the estimate's ranks with those by evaluation, over the first generation; None before, or without one."""
        confirming = min(batches - 1, round(config.confirm * batches))
        self._breeding = list(range(batches - confirming))
        self._confirming = list(range(batches - confirming, batches)) or self._breeding
        self._screened = max(1, round(config.screen * len(self._breeding)))
        self.saved_evaluations = 0
        """Evaluations on all breeding batches that racing spared."""
        self._best: tuple[Candidate, float] | None = None
        self._asked: deque[Request] = deque()
        self.over = False
        """Whether nothing is to be evaluated any more."""
        self._steps = self._search()
        self._step(None)

    def ask(self) -> Request | None:
        """What to evaluate next; None as long as nothing is, but for what was asked before and is not answered."""
        return self._asked.popleft() if self._asked else None

    def tell(self, request: Request, fitness: np.ndarray) -> None:
        """Fitness float [K] of a request's candidates; non-finite puts a candidate out."""
        self._step((request, np.where(np.isfinite(fitness), fitness, np.inf)))

    def _step(self, answer: tuple[Request, np.ndarray] | None) -> None:
        try:
            self._steps.send(answer)
        except StopIteration:
            self.over = True

    def best(self) -> tuple[Candidate, float]:
        """The best candidate and its mean divergence over the confirming batches (NaN where none was evaluated).

        Raises:
            FloatingPointError: every candidate's divergence was non-finite.
        """
        if self._best is None:
            return _settled(self._plain().candidate(self._space, 0)), np.nan
        if not np.isfinite(self._best[1]):
            raise FloatingPointError("the divergence of every candidate is NaN or infinite")
        return self._best

    def _search(self) -> Generator[None, Answer, None]:
        if self._config.generations == 0:
            return
        pure = self._plain()
        brood = self._first(pure)
        fitness, full = yield from self._race(brood, spared=pure.count)
        population = Population(brood.genomes, fitness, full)
        for _ in range(self._config.generations - 1):
            elite = population.order[:self._config.elite]
            genomes = self._room(self._config.population)
            genomes.take(slice(len(elite))).put(population.genomes.take(elite))
            brood = self._children(population, genomes.take(slice(len(elite), None)))
            fitness, full = yield from self._race(brood, spared=0)
            population = Population(genomes, np.concatenate([population.fitness[elite], fitness]),
                                    np.concatenate([population.full[elite], full]))
        finalists = population.genomes.take(population.order[:self._config.elite]).joined(pure)
        candidates = finalists.candidates(self._space)
        self._asked.append(Request(candidates, self._confirming))
        _, fitness = yield
        best = int(np.argmin(fitness))
        self._best = _settled(candidates[best]), float(fitness[best])

    def _race(self, brood: Brood, spared: int) -> Generator[None, Answer, tuple[np.ndarray, np.ndarray]]:
        """Evaluate entrants, the first `spared` of them on all breeding batches whatever screening says.

        Returns:
            See `Population`: fitness float64 [K] and full bool [K].
        """
        fitness, full = np.full(len(brood), np.inf), np.zeros(len(brood), bool)
        first = fitness  # by the first evaluation of each
        if self._screened < len(self._breeding) and len(brood) > spared + 1:
            first = fitness.copy()
            some = sorted(self._rng.choice(len(self._breeding), self._screened, replace=False).tolist())
            out = {Request(brood.part(heat), some, screening=True): np.array(heat) for heat in blocks(len(brood), HEAT)}
        else:
            out = {Request(brood, self._breeding): np.arange(len(brood))}
        self._asked.extend(out)
        while out:
            request, answer = yield
            rows = out.pop(request)
            fitness[rows] = answer
            if request.screening:
                first[rows] = answer
                rows = self._finalists(rows, answer, spared)
                request = Request(brood.part(rows.tolist()), self._breeding)
                out[request] = rows
                self._asked.append(request)
            else:
                full[rows] = True
        brood[-1:]  # who answers without a look at a candidate leaves it to be bred here
        self._judge(brood, first)
        return fitness, full

    def _finalists(self, rows: np.ndarray, screened: np.ndarray, spared: int) -> np.ndarray:
        """The better half of a heat's rows, and those below `spared`."""
        through = rows < spared
        others = rows[~through]
        count = (len(others) + 1) // 2
        self.saved_evaluations += len(others) - count
        return np.concatenate([rows[through], others[np.argsort(screened[~through], kind="stable")[:count]]])

    # Proposals.

    def _room(self, count: int) -> Genomes:
        return Genomes.empty(count, self._space, self._config.regrow)

    def _plain(self, mixes: np.ndarray | None = None) -> Genomes:
        """The plain top-k sets of mixes of criteria [K, C]; of each criterion if there is none given."""
        mixes = np.eye(len(self._space.criteria)) if mixes is None else mixes
        genomes = self._room(len(mixes))
        genomes.mix[:] = mixes
        plain(self._space.field, genomes)
        return genomes

    def _first(self, pure: Genomes) -> Brood:
        """Every criterion's plain top-k, then variations of random mixes."""
        mixed = max(0, self._config.population - pure.count)
        mixes, seed = self._rng.dirichlet(np.ones(pure.count), mixed), self._seed()
        genomes = self._room(pure.count + mixed)
        genomes.take(slice(pure.count)).put(pure)

        def write(begin: int, end: int, children: Genomes) -> None:
            alone = np.repeat(np.arange(end - begin)[:, None], 2, 1)
            vary(self._space.field, self._rates, self._plain(mixes[begin:end]), alone, np.ones(end - begin), seed,
                 begin, children)

        return Brood(genomes, self._space, pure.count, write)

    # Variation.

    def _children(self, population: Population, genomes: Genomes) -> Brood:
        """Children to evaluate: of each block's those of the least estimate, in the order in which they were bred."""
        screened = self._estimated is not None and (self.correlation or 0.0) >= LEAST_CORRELATION
        times = self._config.oversample if screened else 1
        (pairs, shares), seed = self._pairs(population, times * genomes.count), self._seed()

        def write(begin: int, end: int, children: Genomes) -> None:
            bred = self._room(times * (end - begin)) if times > 1 else children
            some = slice(times * begin, times * end)
            vary(self._space.field, self._rates, population.genomes, pairs[some], shares[some], seed, some.start, bred)
            if times > 1:
                least = np.argsort(self._estimated(bred), kind="stable")[:end - begin]
                children.put(bred.take(np.sort(least)))

        return Brood(genomes, self._space, 0, write)

    def _seed(self) -> int:
        return int(self._rng.integers(2**63))

    def _pairs(self, population: Population, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Parents' rows int64 [K, 2], by tournament, and the first ones' shares float64 [K]; see `vary`."""
        rng, config = self._rng, self._config
        # The best of a few drawn at random: the lowest place wins.
        places = rng.integers(len(population.order), size=(count, 2, config.tournament)).min(2)
        alone = rng.random(count) >= config.crossover
        places[alone, 1] = places[alone, 0]
        return population.order[places], rng.random(count)

    def _judge(self, brood: Brood, fitness: np.ndarray) -> None:
        """Compare the estimate with the first evaluation that there is."""
        if self._estimated is not None and self.correlation is None:
            self.correlation = rank_correlation(self._estimated(brood.genomes), fitness)


def _of_genomes(estimate: Estimate, space: SearchSpace) -> Callable[[Genomes], np.ndarray]:
    """An estimate of genomes. Of one with costs, those of the space's positions are all that is kept."""
    if not hasattr(estimate, "costs"):
        return lambda genomes: estimate(genomes.candidates(space))
    alive, dead = space.gathered(estimate.costs)
    return lambda genomes: genomes.sums(alive, dead)


def _settled(candidate: Candidate) -> Candidate:
    """The same without the space and the generation that it is of, which would be in memory as long as it is."""
    return tuple(ZeroingSet(one.layer, one.zero.copy(), one.revive.copy()) for one in candidate)
