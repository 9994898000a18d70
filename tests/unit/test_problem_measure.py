"""The mean divergence of modules."""

import copy

import pytest
import torch
from torch import nn

from de_ray.problem import measure
from de_ray.problem.measure import Yardstick, mean_divergence
from tests.networks import branchy_problem


def changed(module: nn.Module, seed: int) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.head.weight.add_(torch.randn(other.head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return other


@pytest.mark.parametrize(("keep", "further"), [(measure.KEPT_BYTES, 0), (16 * 7 * 4, 2), (0, 3)])
def test_a_teachers_outputs_are_kept_where_there_is_room_and_change_nothing(keep, further, monkeypatch):
    problem = branchy_problem(samples=60)
    monkeypatch.setattr(measure, "BATCH", 16)  # 48 inputs in three passes
    students = [changed(problem.teacher, seed) for seed in range(3)]
    expected = [mean_divergence(problem, student, problem.calibration) for student in students]
    assert len(set(expected)) == 3
    passes = []
    problem.teacher.register_forward_hook(lambda *_: passes.append(1))
    yardstick = Yardstick(problem, problem.calibration, keep)
    assert [yardstick(student) for student in students] == expected
    assert len(passes) == 3 + 2 * further
