"""Large tensors that stay dense."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import de_ray
from de_ray.codec import coded_bytes
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.quantization import dense
from de_ray.quantization.dense import RUNGS, quantize_large

RNG = np.random.default_rng(0)
TENSORS = {"small": RNG.normal(size=(30, 10)).astype(np.float32),
           "large": (5 * RNG.normal(size=(90, 10))).astype(np.float32)}


class Measured:
    """The squared error of tensors relative to their size, summed, with what is in their place now."""

    def __init__(self, base: float = 0.0) -> None:
        self.base, self.values = base, {name: value.copy() for name, value in TENSORS.items()}

    def __call__(self, values: dict[str, np.ndarray]) -> float:
        self.values |= values
        return self.base + sum(float(np.square(self.values[name] - exact).sum() / np.square(exact).mean())
                               for name, exact in TENSORS.items())


def test_each_tensor_gets_the_coarsest_step_within_its_share():
    measure = Measured(base=2.0)
    found = quantize_large(TENSORS, measure, 2.0, 40.0)
    assert list(found) == ["large", "small"]
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.dequantize(), measure.values[name])
    alone = Measured(base=2.0)
    root = np.sqrt(np.square(TENSORS["large"]).mean())
    assert alone({"large": found["large"].dequantize()}) <= 2 + 40 * 900 / 1200
    rung = round(2 * (1 - np.log2(found["large"].step / root)))
    assert alone({"large": dense.quantize_dense("large", TENSORS["large"], root * 2 ** (1 - (rung - 1) / 2)
                                                ).dequantize()}) > 2 + 40 * 900 / 1200
    assert measure({}) <= 42.0


def test_a_tensor_that_no_step_is_fine_enough_for_is_left_as_it_was():
    measure = Measured()
    assert quantize_large(TENSORS, measure, 0.0, 0.0) == {}
    assert all(np.array_equal(measure.values[name], exact) for name, exact in TENSORS.items())
    assert quantize_large(TENSORS, lambda values: float("nan"), 0.0, 1.0) == {}


@pytest.mark.parametrize("allowed", [0.0, 1e-3, 1e9])
def test_room_goes_before_the_limit(allowed):
    found = quantize_large(TENSORS, Measured(), 0.0, allowed, room=0.5)
    assert found.keys() == TENSORS.keys()
    sizes = {name: coded_bytes(tensor) / tensor.symbols.size for name, tensor in found.items()}
    assert all(size <= 0.5 for size in sizes.values())
    assert allowed == 1e9 or all(size > 0.4 for size in sizes.values())  # as fine as there is room for
    assert allowed < 1 or all(size < 0.2 for size in sizes.values())


def test_zeros_and_one_dimension():
    found = quantize_large({"zero": np.zeros((4, 4), np.float32)}, lambda values: 0.0, 0.0, 0.0)
    assert not found["zero"].dequantize().any()
    assert dense.is_large((2**8, 2**8)) and not dense.is_large((2**16,)) and not dense.is_large((2**8, 2**8 - 1))
    assert len(dense._steps(np.ones(3))) == RUNGS


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
    if limit is None:
        assert len(coarse.data) < 0.8 * len(fine.data)
    else:
        assert len(coarse.data) <= limit
        assert coarse.report["divergence"]["held_out"] < fine.report["divergence"]["held_out"]
    state = de_ray.load(coarse.save(tmp_path / "words.der"))
    assert state["words.weight"].unique().numel() < 0.5 * fine.model.words.weight.unique().numel()
    loaded = de_ray.load(tmp_path / "words.der", model=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), coarse.model(tokens))
