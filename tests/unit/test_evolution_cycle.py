"""One cycle of evolution up to its commit."""

import weakref

import numpy as np
import pytest
import torch

from de_ray.config import EvolutionConfig
from de_ray.evolution import cycle
from de_ray.evolution.curvature import SaliencyInputs
from de_ray.evolution.space import Budget
from de_ray.student import Student
from tests.networks import branchy_problem


class Answers:
    """A dispatch that answers with random fitness, and tells somebody of each."""

    def __init__(self, told):
        self._told, self._requests, self._rng = told, [], np.random.default_rng(0)

    def submit(self, request):
        self._requests.append(request)

    def next(self):
        self._told()
        request = self._requests.pop()
        return request, self._rng.random(len(request.candidates))


@pytest.mark.parametrize("surrogate", ["fisher", "kronecker"])
def test_saliencies_are_not_in_memory_while_candidates_are_evaluated(monkeypatch, surrogate):
    problem, taken, answered = branchy_problem(), [], []
    saliencies = cycle.saliencies

    def watched(*arguments):
        found = saliencies(*arguments)
        taken.extend(weakref.ref(scores) for of in found.values() for scores in of)
        return found

    def told():
        answered.append(len(taken))
        assert not any(scores() is not None for scores in taken)

    monkeypatch.setattr(cycle, "saliencies", watched)
    student = Student(problem.teacher, problem.layers)
    layers = len(problem.layers)
    given = SaliencyInputs(student, problem, problem.inputs, 4, torch.Generator().manual_seed(0))
    config = EvolutionConfig(criteria=["fisher", "magnitude"], surrogate=surrogate)
    budget = Budget(np.zeros(layers, bool), np.zeros(layers, np.int64), 40)
    found = cycle.breed(given, budget, config, Answers(told), 4, np.random.default_rng(0))
    assert sum(len(one.zero) - len(one.revive) for one in found.candidate) == 40
    assert len(answered) > 3 and min(answered) == 2 * layers
