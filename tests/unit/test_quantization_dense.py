"""Large tensors that stay dense."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import de_ray
from de_ray.codec import coded_bytes
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.problem.custom import problem_from_model
from de_ray.quantization import dense
from de_ray.quantization.dense import quantize_large

RNG = np.random.default_rng(0)
TENSORS = {"small": RNG.normal(size=(30, 10)).astype(np.float32),
           "large": (5 * RNG.normal(size=(90, 10))).astype(np.float32)}


def squared_error(values: dict[str, np.ndarray]) -> float:
    """Of tensors relative to their size, summed."""
    return sum(float(np.square(values[name] - exact).sum() / np.square(exact).mean())
               for name, exact in TENSORS.items())


def steps_of(rung: int) -> dict[str, float]:
    return {name: np.sqrt(np.square(exact).mean()) * 2 ** (1 - rung / 2) for name, exact in TENSORS.items()}


def rounded(rung: int) -> dict[str, np.ndarray]:
    return {name: dense.quantize_dense(name, exact, steps_of(rung)[name]).dequantize()
            for name, exact in TENSORS.items()}


@pytest.mark.parametrize("limit", [900.0, 40.0, 0.1, 1e-3])
def test_the_coarsest_rung_within_the_limit_is_taken_in_a_few_measurements(limit):
    calls = []
    found = quantize_large(TENSORS, lambda values: calls.append(values) or squared_error(values), limit)
    rung = round(2 * (1 - np.log2(found["large"].step / np.sqrt(np.square(TENSORS["large"]).mean()))))
    assert {name: tensor.step for name, tensor in found.items()} == pytest.approx(steps_of(rung))
    assert squared_error({name: tensor.dequantize() for name, tensor in found.items()}) <= limit
    assert rung == 0 or squared_error(rounded(rung - 1)) > limit
    assert len(calls) <= 6


def test_tensors_that_no_rung_is_fine_enough_for_are_left_to_others():
    assert quantize_large(TENSORS, squared_error, 0.0) == {}
    assert quantize_large(TENSORS, lambda values: float("nan"), 1e9) == {}


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e9])
def test_room_goes_before_the_limit(limit):
    found = quantize_large(TENSORS, squared_error, limit, room=600)
    assert found.keys() == TENSORS.keys()
    size = sum(map(coded_bytes, found.values()))
    assert size <= 600
    assert limit == 1e9 or size > 500  # as fine as there is room for
    assert limit < 1 or size < 240


def test_zeros_and_one_dimension():
    found = quantize_large({"zero": np.zeros((4, 4), np.float32)}, lambda values: 0.0, 0.0)
    assert not found["zero"].dequantize().any()


def test_a_number_that_is_far_from_all_others_is_held():
    values = np.zeros(2**23, np.float32)
    values[:2] = 1, -0.5
    tensors = {"peak": values.reshape(2**11, -1)}
    assert quantize_large(tensors, lambda _: 1.0, 0.0) == {}
    found = quantize_large(tensors, lambda rounded: float(np.abs(rounded["peak"] - tensors["peak"]).max()), 1e-7)
    assert np.abs(found["peak"].dequantize() - tensors["peak"]).max() <= 1e-7


def test_tables_are_large_tensors_and_layers_that_are_left_out_are_not(monkeypatch):
    monkeypatch.setattr(dense, "LARGE", 1000)
    tokens = torch.randint(400, (60, 9))
    assert dense.large_tensors(problem_from_model(Words(), tokens, divergence="mse")) == {"words.weight": 12_800}
    left_out = problem_from_model(Words(), tokens, divergence="mse", exclude=["body"])
    assert dense.large_tensors(left_out) == {"words.weight": 12_800}
    monkeypatch.setattr(dense, "LARGE", 12_801)
    assert dense.large_tensors(left_out) == {}


class Words(nn.Module):
    """Most of its numbers are embeddings'."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body, self.head = nn.Embedding(400, 32), nn.Linear(32, 32), nn.Linear(32, 400, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.words(tokens)).relu()).mean(1)


def test_a_size_below_and_above_what_a_file_takes_by_itself_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(dense, "LARGE", 1000)
    model, tokens = Words(), torch.randint(400, (60, 9), generator=torch.Generator().manual_seed(1))

    def file_of(**size):
        return de_ray.compress(model, tokens, sparsity=0.5, quantization=QuantizationConfig(refit_steps=5),
                               divergence="mse", refit=RefitConfig(steps=5, final_steps=5), progress=False,
                               evolution=EvolutionConfig(cycles=2, generations=0, criteria=["magnitude"]), **size)

    own = len(file_of().data)
    small, large = file_of(target_bytes=own * 2 // 3), file_of(target_bytes=own * 3)
    assert len(small.data) <= own * 2 // 3
    assert own < len(large.data) <= own * 3
    assert large.report["divergence"]["held_out"] < small.report["divergence"]["held_out"]
    with pytest.raises(ValueError, match="target_bytes=1500 allows 1,500 bytes: expected more than about"):
        file_of(target_bytes=1500)


@pytest.mark.parametrize(("tied", "limit"), [(False, None), (True, 11_000)])
def test_embeddings_take_few_bits_and_the_file_is_what_was_measured(tied, limit, monkeypatch, tmp_path):
    model, tokens = Words(tied), torch.randint(400, (60, 9), generator=torch.Generator().manual_seed(1))
    short = {"evolution": EvolutionConfig(cycles=2, generations=0, criteria=["magnitude"]),
             "refit": RefitConfig(steps=5, final_steps=5), "target_bytes": limit}
    quantization = QuantizationConfig(refit_steps=5, negligible=1e-4)

    def file_of(large: int):
        monkeypatch.setattr(dense, "LARGE", large)
        return de_ray.compress(model, tokens, sparsity=0.5, quantization=quantization, divergence="mse", **short)

    fine, coarse = file_of(2**30), file_of(1000)
    state = de_ray.load(coarse.save(tmp_path / "words.der"))
    if limit is None:
        assert len(coarse.data) < 0.8 * len(fine.data)
        assert state["words.weight"].unique().numel() < 0.5 * fine.model.words.weight.unique().numel()
    else:
        assert 0.9 * limit < len(coarse.data) <= limit
        assert coarse.report["divergence"]["held_out"] < 0.1 * fine.report["divergence"]["held_out"]
    loaded = de_ray.load(tmp_path / "words.der", model=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), coarse.model(tokens))


def test_a_matrix_that_exclude_names_is_no_large_tensor_whatever_module_it_is_of():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.usual = nn.Parameter(torch.randn(256, 260)), nn.Linear(260, 256)
            self.head = nn.Linear(256, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.usual(torch.relu(x @ self.matrix))))

    problem = problem_from_model(Own(), torch.randn(20, 256), divergence="mse", exclude=["matrix", "usual"])
    assert [layer.name for layer in problem.layers] == ["head"]
    assert dense.large_tensors(problem) == {}
