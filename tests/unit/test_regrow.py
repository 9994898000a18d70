"""Regrowth: what comes back is what the teacher needs, as many as are missing, at zero."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from de_ray.config import RefitConfig
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.space import Budget
from de_ray.problem.custom import problem_from_model
from de_ray.problem.layers import find_layers
from de_ray.problem.measure import mean_divergence
from de_ray.refit.build import build_refit
from de_ray.refit.regrow import regrow
from de_ray.student import Student
from tests.networks import branchy_problem, mlp_problem

CONFIG = RefitConfig(batch=32, steps=30, learning_rate=1e-2)


def pruned(problem, share=0.5):
    """A student whose last weights of each layer are zeroed."""
    student = Student(problem.teacher, problem.layers)
    student.commit(tuple(ZeroingSet(i, np.arange(int(share * layer.size), layer.size))
                         for i, layer in enumerate(problem.layers)))
    return student


def grown(problem, student, bound, fixed, free):
    regrow(student, problem, CONFIG, Budget(np.array(bound), np.array(fixed), free), torch.Generator().manual_seed(0))
    return student.counts


def test_bound_layers_get_their_own_number_and_the_others_share_theirs():
    problem = branchy_problem()
    student = pruned(problem)
    before, masks = student.counts, [mask.clone() for mask in student.masks]
    last = len(before) - 1
    after = grown(problem, student, [False] * last + [True], [0] * last + [3], 40)
    assert after[last] - before[last] == 3
    assert sum(after[:last]) - sum(before[:last]) == 40
    for mask, earlier, weight in zip(student.masks, masks, student.weights, strict=True):
        assert mask[earlier].all()
        assert not weight[mask & ~earlier].any()  # they live, at zero


def test_weights_that_the_teacher_needs_come_back_rather_than_any():
    problem = mlp_problem()
    student = pruned(problem)
    torch.manual_seed(1)
    with torch.no_grad():  # half of the inputs of the first layer are silent: their weights are worth nothing
        for part in (problem.inputs, problem.calibration):
            part[:, ::2] = 0.0
    grown(problem, student, [False, False], [0, 0], 30)
    back = student.masks[0][10:]  # rows 10 and on had been zeroed
    assert back[:, 1::2].any()
    assert not back[:, ::2].any()


def test_a_refit_makes_more_of_chosen_weights_than_of_any():
    problem, found = mlp_problem(), []
    for chosen in (True, False):
        student = pruned(problem)
        count = student.survivors // 5
        if chosen:
            grown(problem, student, [False, False], [0, 0], count)
        else:
            zeros = [(layer, place) for layer, mask in enumerate(student.masks)
                     for place in (~mask).flatten().nonzero().flatten().tolist()]
            for index in np.random.default_rng(0).permutation(len(zeros))[:count]:
                layer, place = zeros[index]
                student.masks[layer].view(-1)[place] = True
        build_refit(student, problem, CONFIG).after_cycle(torch.Generator().manual_seed(0))
        found.append(mean_divergence(problem, student.module, problem.calibration))
    assert found[0] < 0.9 * found[1]


class HalfUsed(nn.Module):
    """A network one of whose layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_is_never_called_gets_nothing_back_before_the_others():
    torch.manual_seed(0)
    problem = problem_from_model(HalfUsed(), torch.randn(64, 6), divergence="mse")
    problem = replace(problem, layers=find_layers(problem.teacher))  # presets do not look for what is never called
    student = pruned(problem)
    assert grown(problem, student, [False, False], [0, 0], 20) == [44, 24]
