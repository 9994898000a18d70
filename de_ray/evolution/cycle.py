"""One cycle of evolution up to its commit: saliencies, proposals, breeding; the evaluator is passed in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.curvature import SaliencyInputs
from de_ray.evolution.rate import RateModel
from de_ray.evolution.request import Dispatch
from de_ray.evolution.saliency import saliencies
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import build_surrogate

UNEVEN = 2
"""How much harder than the average row a cycle's zeros may hit one whose weights' order still has to be known."""
LEAST_PRICE = 0.5
"""Bits. Where nearly all weights survive, one more zero may even cost; it is still to be zeroed some time."""


@dataclass(frozen=True)
class Bred:
    """What a cycle's search found."""

    candidate: Candidate
    divergence: float
    """Mean over the batches of the last choice; NaN for a baseline, which evaluates nothing."""
    saved_evaluations: int
    """Evaluations on all batches that racing spared."""
    correlation: float | None
    """Of the surrogate's ranks with those by evaluation; None without a surrogate."""


def breed(given: SaliencyInputs, budget: Budget, config: EvolutionConfig, dispatch: Dispatch, batches: int,
          rng: np.random.Generator, rate: RateModel | None = None) -> Bred:
    """Find the zeroing sets of a cycle.

    Args:
        given: the student and the inputs of its saliencies.
        budget: zeros to add.
        config: criteria and operators.
        dispatch: has candidates' mean divergence measured on replicas of the student.
        batches: number of calibration batches.
        rng: source of the search's draws.
        rate: what a candidate's file takes; needed where `config.rate_weight` is not 0.
    """
    search = _prepared(given, budget, config, batches, rng, rate)
    while not search.over:
        for request in iter(search.ask, None):
            dispatch.submit(request)
        request, divergence = dispatch.next()
        if config.rate_weight:
            divergence = divergence * [_price(candidate, config, rate) for candidate in request.candidates]
        search.tell(request, divergence)
    candidate, fitness = search.best()
    return Bred(candidate, fitness / _price(candidate, config, rate), search.saved_evaluations, search.correlation)


def _prepared(given: SaliencyInputs, budget: Budget, config: EvolutionConfig, batches: int, rng: np.random.Generator,
              rate: RateModel | None) -> DirectedSearch:
    """A cycle's search, which knows what it needs of the saliencies: they are not in memory any more; see `breed`."""
    masks = [mask.flatten().cpu().numpy() for mask in given.student.masks]
    given = replace(given, reach=_reach(budget, masks))
    known = scores = saliencies(config.criteria, given)
    if config.rate_weight:
        scores = {criterion: [_by_the_bit(s, prices, config) for s, prices in zip(of, rate.prices, strict=True)]
                  for criterion, of in scores.items()}
    estimate = None
    # Estimates know nothing of bytes: where those weigh, they would choose against the fitness.
    if config.oversample > 1 and config.generations > 1 and not config.rate_weight:
        estimate = build_surrogate(config.surrogate, given, known)
    space = SearchSpace(scores, masks, budget, config.regrow)
    del known, scores  # before the search takes its own memory
    return DirectedSearch(space, config, batches, rng, estimate)


def _reach(budget: Budget, masks: Sequence[np.ndarray]) -> float:
    """See `SaliencyInputs.reach`."""
    return min(1.0, max(UNEVEN * budget.total, 1) / max(1, sum(int(mask.sum()) for mask in masks)))


def _by_the_bit(saliency: np.ndarray, prices: np.ndarray, config: EvolutionConfig) -> np.ndarray:
    """Saliency by the bits that zeroing saves: a threshold on it is the set of least divergence + multiplier x bits."""
    return saliency / np.maximum(prices, LEAST_PRICE) ** np.float32(min(config.rate_weight, 1.0))


def _price(candidate: Candidate, config: EvolutionConfig, rate: RateModel | None) -> float:
    """The factor by which a candidate's bytes weigh in its fitness.

    log divergence + weight x log bytes is the Lagrangian of a rate-distortion trade whose multiplier follows the
    student: as it is pruned its divergence grows by orders of magnitude, and a constant one would soon mean nothing.
    """
    if config.rate_weight == 0:
        return 1.0
    return (rate.after(candidate) / rate.bits(rate.survivors)) ** config.rate_weight
