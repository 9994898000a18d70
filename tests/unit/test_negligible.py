"""What of a divergence does not matter."""

import logging

import pytest
import torch
from torch import nn

import de_ray
from de_ray.config import Config, EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.negligible import constant_divergence, with_negligible
from de_ray.problem.custom import problem_from_model

INPUTS = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
SHORT = {"evolution": EvolutionConfig(cycles=2, generations=0, criteria=["fisher"]), "progress": False,
         "refit": RefitConfig(steps=40, final_steps=40), "quantization": QuantizationConfig(refit_steps=10, trials=6)}


class Scaled(nn.Module):
    """One function in several units."""

    def __init__(self, unit: float, classes: int = 60) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.unit = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, classes)), unit

    def forward(self, x: torch.Tensor) -> dict:
        return {"scores": self.unit * self.body(x), "index": torch.arange(len(x))}


def of(unit: float, divergence: str = "mse", inputs: torch.Tensor = INPUTS) -> float:
    problem = problem_from_model(Scaled(unit), inputs, divergence=divergence)
    return with_negligible(problem, Config()).quantization.negligible


def test_it_follows_the_unit_of_small_outputs_and_large_ones_keep_it():
    problem = problem_from_model(Scaled(0.1), INPUTS, divergence="mse")
    outputs = problem.teacher(problem.calibration)["scores"]
    assert constant_divergence(problem, problem.calibration) == pytest.approx(
        float(outputs.var(0, unbiased=False).mean()), rel=1e-4)
    assert of(1e-3) == pytest.approx(1e-4 * of(0.1), rel=1e-3) and of(0.1) < 1e-3
    assert of(100.0) == of(100.0, "kl") == 1e-3
    assert of(0.1, inputs=INPUTS[:2]) == 1e-3  # of one calibration input, any output is constant


def test_outputs_in_small_units_lose_no_more_than_in_large_ones():
    small, large = (de_ray.compress(Scaled(unit), INPUTS, divergence="mse", sparsity=0.1, bits=None, **SHORT)
                    for unit in (1e-3, 1.0))
    error = [result.report["decoded"]["relative_error"] for result in (small, large)]
    assert error[0] < 1.5 * error[1]
    assert len(small.data) > 0.8 * len(large.data)


def test_probabilities_are_no_logits():
    class Likely(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)["scores"].softmax(1)

    with pytest.raises(ValueError, match="of probabilities, which add up to 1 over dimension 1, and kl takes logits"):
        problem_from_model(Likely(1.0), INPUTS)
    problem_from_model(Likely(1.0), INPUTS, divergence="mse")
    problem_from_model(nn.Sequential(Likely(1.0), Logarithm()), INPUTS)


class Logarithm(nn.Module):
    """Of probabilities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def test_a_file_that_is_far_from_its_model_is_told_of(caplog):
    caplog.set_level(logging.WARNING)
    de_ray.compress(Scaled(1.0), INPUTS, divergence="mse", sparsity=0.1, **SHORT)
    assert "far from the model" not in caplog.text
    de_ray.compress(Scaled(1.0), INPUTS, divergence="mse", sparsity=0.95, **SHORT)
    assert "far from the model's: relative error 0." in caplog.text
    caplog.clear()
    de_ray.compress(Scaled(1.0), INPUTS, sparsity=0.95, **SHORT)
    assert "% of the largest scores are others" in caplog.text
