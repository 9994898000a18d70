"""One cycle of evolution up to its commit: saliencies, proposals, breeding; the evaluator is passed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.saliency import SaliencyInputs, saliencies
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace

Evaluate = Callable[[Sequence[Candidate], Sequence[int], bool], np.ndarray]
"""(candidates, batches, screening) -> float64 [K] mean divergence, in the candidates' order."""


@dataclass(frozen=True)
class Bred:
    """What a cycle's search found."""

    candidate: Candidate
    divergence: float
    """Mean over all calibration batches; NaN for a baseline, which evaluates nothing."""
    saved_evaluations: int
    """Evaluations on all batches that racing spared."""


def breed(given: SaliencyInputs, budget: Budget, config: EvolutionConfig, evaluate: Evaluate, batches: int,
          rng: np.random.Generator) -> Bred:
    """Find the zeroing sets of a cycle.

    Args:
        given: the student and the inputs of its saliencies.
        budget: zeros to add.
        config: criteria and operators.
        evaluate: measures candidates on replicas of the student.
        batches: number of calibration batches.
        rng: source of the search's draws.
    """
    masks = [mask.flatten().cpu().numpy() for mask in given.student.masks]
    scores = saliencies(config.criteria, given)
    search = DirectedSearch(SearchSpace(scores, masks, budget, config.regrow), config, batches, rng)
    while (request := search.ask()) is not None:
        search.tell(evaluate(request.candidates, request.batches, request.screening))
    candidate, divergence = search.best()
    return Bred(candidate, divergence, search.saved_evaluations)
