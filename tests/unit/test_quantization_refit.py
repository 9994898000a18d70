"""The refit of levels: what it leaves, and what it says where it fails."""

import pytest
import torch
from torch import nn

from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.pipeline import run
from de_ray.problem.custom import problem_from_model
from tests.networks import mlp_problem


def config(learning_rate):
    return Config(evolution=EvolutionConfig(sparsity=0.5, cycles=1, population=4, generations=1),
                  pool=PoolConfig(kind="serial"), refit=RefitConfig(steps=2, final_steps=2, batch=16),
                  quantization=QuantizationConfig(bits=4, refit_steps=20, learning_rate=learning_rate))


def test_a_refit_of_levels_that_diverges_says_what_to_lower():
    with pytest.raises(FloatingPointError, match="lower quantization.learning_rate"):
        run(mlp_problem(), config(1e30))


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
