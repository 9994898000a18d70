"""Matrices in buffers that a network multiplies its values with."""

import copy

import pytest
import torch
from torch import nn

import de_ray
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.problem.custom import problem_from_model
from de_ray.problem.packing import take_arguments

INPUTS = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
SHORT = {"evolution": EvolutionConfig(cycles=2, generations=0, criteria=["fisher"]), "progress": False,
         "refit": RefitConfig(steps=20, final_steps=20), "quantization": QuantizationConfig(refit_steps=5)}


class Translated(nn.Module):
    """As networks translated from ONNX are: one matrix is a parameter, the other has two names; a table beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 40)
        self.register_buffer("matrix", torch.randn(40, 30) / 6)
        self.again = nn.Module()
        self.again.register_buffer("matrix", self.matrix)
        self.register_buffer("table", torch.randn(1, 30))
        self.register_buffer("places", torch.randn(12, 12))
        self.register_buffer("passing", torch.randn(30, 30), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu() @ self.matrix + self.table + self.places.sum()
        return (x.relu() @ self.again.matrix.T)[:, :30] @ self.passing


def test_they_are_zeroed_counted_and_loaded_into_buffers_again(tmp_path):
    model = Translated()
    problem = problem_from_model(model, INPUTS, divergence="mse")
    assert [layer.parameter for layer in problem.layers] == ["matrix", "first.weight"]
    assert dict(problem.teacher.named_buffers()).keys() == {"table", "places", "passing"}
    assert problem.teacher.matrix is problem.teacher.again.matrix
    assert isinstance(model.matrix, torch.Tensor) and not isinstance(model.matrix, nn.Parameter)

    result = de_ray.compress(model, INPUTS, divergence="mse", sparsity=0.5, **SHORT)
    state = de_ray.load(result.save(tmp_path / "student.der"))
    assert state.keys() == model.state_dict().keys()
    assert 0.3 < (state["matrix"] == 0).float().mean() < 0.7
    assert result.report["parameters"] == 12 * 40 + 40 + 40 * 30
    loaded = de_ray.load(tmp_path / "student.der", model=copy.deepcopy(model))
    assert "matrix" in dict(loaded.named_buffers())
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), take_arguments(result.model)(INPUTS))


def test_a_network_that_assigns_them_keeps_its_buffers():
    class Assigns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(12, 40)
            self.register_buffer("matrix", torch.randn(40, 30))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.matrix = self.matrix.clone()
            return self.first(x).relu() @ self.matrix

    problem = problem_from_model(Assigns(), INPUTS, divergence="mse")
    assert [layer.name for layer in problem.layers] == ["first"]
    assert "matrix" in dict(problem.teacher.named_buffers())
    problem.teacher(INPUTS)


def test_other_buffers_are_what_a_folders_runs_are_told_apart_by(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(12, 5)
            self.register_buffer("scale", torch.full((5,), scale))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * self.scale

    de_ray.compress(Scaled(1.0), INPUTS, divergence="mse", folder=tmp_path, **SHORT)
    with pytest.raises(ValueError, match="another run's: teacher_digest"):
        de_ray.compress(Scaled(-3.0), INPUTS, divergence="mse", folder=tmp_path, **SHORT)
