"""The refit of levels: what it leaves, and what it says where it fails."""

import logging

import pytest
import torch
from torch import nn

from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.pipeline import run
from de_ray.problem.custom import problem_from_model
from de_ray.quantization.choose import choose
from de_ray.quantization.refit import refit_levels
from de_ray.refit.objective import Objective
from de_ray.student import Student
from tests.networks import mlp_problem


def config(learning_rate, backoff=True):
    return Config(evolution=EvolutionConfig(sparsity=0.5, cycles=1, population=4, generations=1),
                  pool=PoolConfig(kind="serial"), refit=RefitConfig(steps=2, final_steps=2, batch=16, backoff=backoff),
                  quantization=QuantizationConfig(bits=4, refit_steps=20, learning_rate=learning_rate))


def test_a_refit_of_levels_that_diverges_says_what_to_lower():
    with pytest.raises(FloatingPointError, match="lower quantization.learning_rate"):
        run(mlp_problem(), config(1e30, backoff=False))


@pytest.mark.parametrize("rate", [10.0, 1e30])
def test_a_refit_of_levels_that_does_harm_is_left_out(rate):
    harmless, placed = (run(mlp_problem(), config(value)) for value in (rate, 1e-12))
    assert harmless.report["decoded_equals_student"]
    assert (harmless.report["divergence"]["held_out"]
            == pytest.approx(placed.report["divergence"]["held_out"], rel=1e-3))


def test_a_refit_of_levels_that_does_harm_at_first_is_taken_again_at_a_smaller_rate(caplog):
    with caplog.at_level(logging.INFO):
        found = run(mlp_problem(), config(1.0))
    placed = run(mlp_problem(), config(1e-12))
    assert "undid a refit of levels" in caplog.text
    assert found.report["divergence"]["calibration"] < 0.9 * placed.report["divergence"]["calibration"]


def test_levels_are_refitted_in_parts_as_in_one():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 8_000), nn.ReLU(), nn.Linear(8_000, 3))  # 32 kB a sample
    problem = problem_from_model(wide, torch.randn(60, 8), divergence="mse")
    found = []
    for memory_mb in (1, 4096):
        student = Student(problem.teacher, problem.layers)
        choices = [choose(index, weight.detach().numpy(), 2, QuantizationConfig(placement="lloyd"))
                   for index, weight in enumerate(student.weights)]
        objective = Objective(problem, RefitConfig(batch=48, memory_mb=memory_mb), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        assert len(list(objective.parts(student.module.requires_grad_(), generator))) == (2 if memory_mb == 1 else 1)
        student.module.requires_grad_(False)
        refit_levels(objective, student, choices, 20, 1e-3, True, generator)
        found.append(student.module(problem.inputs))
    placed = problem.teacher(problem.inputs)
    assert (found[0] - found[1]).square().mean() < 1e-4 * (found[1] - placed).square().mean()


def test_weights_beyond_float16_are_refitted_at_their_rows_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e7)
        model[0].bias.mul_(1e7)
        model[2].weight.mul_(1e-7)
    result = run(problem_from_model(model, torch.randn(100, 8)), config(1e-4))
    assert result.report["decoded_equals_student"]
    assert float(result.model[0].weight.abs().max()) > 1e6
