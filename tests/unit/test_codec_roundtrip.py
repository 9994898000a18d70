"""What is encoded comes back bit for bit, whatever its shape, density and levels."""

import decimal

import numpy as np
import pytest
import torch
from codec_samples import lenet300, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from de_ray import codec
from de_ray.codec import tables
from de_ray.codec.tensor import QuantizedTensor


@st.composite
def quantized(draw, name: str = "weight") -> QuantizedTensor:
    """Any tensor: 1-D to 5-D, empty ones too, any density, 1 to 256 levels or a step, with and without row scales."""
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)))
    density = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) < density
    exponents = rng.integers(-60, 60, shape[0]).astype(np.int32) if draw(st.booleans()) else None
    if draw(st.booleans()):
        most = draw(st.sampled_from([1, 3, 1000, 2**24]))
        symbols = np.where(mask, rng.integers(-most, most + 1, shape), 0).astype(np.int32)
        step = np.float32(2.0 ** draw(st.integers(-40, 20)) * 1.1)
        return QuantizedTensor(name, symbols, step=step, row_exponents=exponents)
    count = draw(st.integers(1, 256))
    numbers = np.unique(rng.normal(0, 1, 4 * count).astype(np.float16))
    levels = np.sort(rng.choice(numbers[numbers != 0], min(count, len(numbers) - 1), replace=False)).astype(np.float32)
    negatives = int((levels < 0).sum())
    values = rng.integers(-negatives, len(levels) - negatives + 1, shape)
    return QuantizedTensor(name, np.where(mask, values, 0).astype(np.int32), levels=levels, row_exponents=exponents)


def same_bits(a: torch.Tensor, b: np.ndarray | torch.Tensor) -> bool:
    """Equal types, shapes and bits: -0.0 is not 0.0."""
    b = torch.as_tensor(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_tensors_come_back_bit_for_bit(data: st.DataObject) -> None:
    tensors = [data.draw(quantized(f"layer.{i}.weight")) for i in range(data.draw(st.integers(0, 3)))]
    decoded = codec.decode(codec.encode(tensors, {}, "net"))
    assert list(decoded) == [t.name for t in tensors]
    for tensor in tensors:
        assert same_bits(decoded[tensor.name], tensor.dequantize())


def test_a_scalar_comes_back() -> None:
    tensor = QuantizedTensor("scale", np.array(7, np.int32), step=np.float32(0.1))
    decoded = codec.decode(codec.encode([tensor]))
    assert same_bits(decoded["scale"], np.asarray(tensor.dequantize()))


@pytest.mark.parametrize("value", [
    torch.tensor(123456789), torch.arange(6, dtype=torch.int32).reshape(2, 3), torch.tensor([True, False]),
    torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(0, 4),
    torch.tensor([0.1, -2.0], dtype=torch.float16), torch.tensor([0.1, -0.0], dtype=torch.bfloat16),
    torch.tensor([float("nan"), float("inf")], dtype=torch.float64),
    torch.tensor([255, 0], dtype=torch.uint8)], ids=lambda t: f"{t.dtype}{list(t.shape)}")
def test_raw_tensors_come_back_with_their_type(value: torch.Tensor) -> None:
    decoded = codec.decode(codec.encode([], {"buffer": value}))["buffer"]
    assert decoded.dtype == value.dtype and decoded.shape == value.shape
    assert decoded.reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))


def test_an_all_zero_layer_costs_next_to_nothing() -> None:
    tensor = QuantizedTensor("weight", np.zeros((2000, 2000), np.int32), levels=np.array([1.0], np.float32))
    data = codec.encode([tensor])
    assert len(data) < 1000
    assert not codec.decode(data)["weight"].any()


def test_a_lone_survivor_in_a_large_layer_comes_back() -> None:
    symbols = np.zeros((1500, 1500), np.int32)
    symbols[1499, 1499] = -1
    tensor = QuantizedTensor("weight", symbols, levels=np.array([-0.5], np.float32))
    data = codec.encode([tensor])
    assert len(data) < 1500
    assert same_bits(codec.decode(data)["weight"], tensor.dequantize())


def test_the_same_tensors_give_the_same_bytes() -> None:
    assert codec.encode(lenet300(), {}, "lenet300") == codec.encode(lenet300(), {}, "lenet300")


def test_the_given_symbols_are_left_alone() -> None:
    tensors = lenet300()
    before = [t.symbols.copy() for t in tensors]
    codec.encode(tensors)
    codec.coded_bytes(tensors[0])
    assert all(np.array_equal(b, t.symbols) for b, t in zip(before, tensors, strict=True))


def test_non_contiguous_symbols_come_back() -> None:
    symbols = sparse((6, 40, 3, 3), 0.2, seed=3).transpose(1, 0, 2, 3)
    tensor = QuantizedTensor("weight", symbols, step=np.float32(0.01))
    assert same_bits(codec.decode(codec.encode([tensor]))["weight"], np.ascontiguousarray(tensor.dequantize()))


@pytest.mark.parametrize("tensor, problem", [
    ({"levels": np.array([np.nan], np.float32)}, "NaN level"),
    ({"levels": np.array([np.inf], np.float32)}, "infinite level"),
    ({"levels": np.array([0.1], np.float32)}, "level that float16 cannot hold"),
    ({"levels": np.array([0.0, 1.0], np.float32)}, "zero level"),
    ({"levels": np.array([2.0, 1.0], np.float32)}, "descending levels"),
    ({"levels": np.arange(1, 258).astype(np.float32)}, "257 levels"),
    ({"levels": np.array([-1.0], np.float32)}, "symbol without a level"),
    ({"levels": np.array([1.0])}, "levels of float64"),
    ({"step": np.float32(0)}, "step of 0"),
    ({"step": np.float32(np.nan)}, "step of NaN"),
    ({}, "neither levels nor step"),
    ({"levels": np.array([1.0], np.float32), "step": np.float32(1)}, "both levels and step"),
    ({"step": np.float32(1), "row_exponents": np.zeros(3, np.int32)}, "row exponents of another length"),
    ({"step": np.float32(1), "row_exponents": np.zeros(2, np.float32)}, "row exponents of another type"),
    ({"step": np.float32(1), "row_exponents": np.full(2, 10**6, np.int32)}, "row exponents that overflow"),
    ({"step": np.float32(1), "symbols": np.ones((2, 2), np.int64)}, "symbols of another type"),
    ({"step": np.float32(1), "symbols": np.full((2, 2), 2**24 + 1, np.int32)}, "symbols beyond 2^24"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_coded_is_refused(tensor: dict, problem: str) -> None:
    fields = {"symbols": np.ones((2, 2), np.int32), **tensor}
    with pytest.raises(ValueError):
        codec.encode([QuantizedTensor("weight", **fields)])


def test_two_tensors_of_one_name_are_refused() -> None:
    one = QuantizedTensor("a", np.ones(2, np.int32), step=np.float32(1))
    with pytest.raises(ValueError, match="a"):
        codec.encode([one, one])
    with pytest.raises(ValueError, match="a"):
        codec.encode([one], {"a": torch.zeros(1)})


def test_the_coders_tables_do_not_depend_on_the_callers_decimal_context():
    with decimal.localcontext(decimal.Context(prec=6, rounding=decimal.ROUND_DOWN)):
        assert np.array_equal(tables._squash(), tables.SQUASH)


def test_a_tensor_of_too_many_dimensions_is_refused_before_it_is_written():
    with pytest.raises(ValueError, match="counter has 9 dimensions: expected at most 8"):
        codec.encode([], {"counter": torch.zeros([1] * 9)})
