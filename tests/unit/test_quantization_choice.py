import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from de_ray.codec import coded_bytes
from de_ray.config import QuantizationConfig
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.choose import Placements, choose
from de_ray.quantization.placement import PLACEMENTS, place, rate_slope
from de_ray.quantization.scales import layer_exponents, row_exponents, row_scales


def sparse(shape, density, seed=0, scale=0.05):
    generator = np.random.default_rng(seed)
    weight = generator.laplace(size=shape) * scale
    return np.where(generator.uniform(size=shape) < density, weight, 0.0).astype(np.float32)


def entropy_bytes(tensor):
    """Zero-order entropy of the symbols, plus the side information."""
    counts = np.unique(tensor.symbols, return_counts=True)[1]
    bits = -np.sum(counts * np.log2(counts / counts.sum())) + 16 * len(tensor.levels)
    if tensor.row_exponents is not None:
        bits += 6 * len(tensor.row_exponents)
    return int(np.ceil(bits / 8))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_levels_are_distinct_float16_numbers_and_thresholds_separate_them(placement, bits):
    values = sparse((4000,), 0.2)
    levels, boundaries = place(values[values != 0], bits, placement, 0.3, zeros=3200)
    assert 1 <= len(levels) <= 2**bits
    assert levels.dtype == boundaries.dtype == np.float32
    assert np.array_equal(levels, levels.astype(np.float16).astype(np.float32))
    assert np.all(np.diff(levels) > 0) and not np.any(levels == 0)
    table = np.sort(np.append(levels, 0))
    assert len(boundaries) == len(levels) and np.all(np.diff(boundaries) >= 0)
    if placement != "ecsq":
        assert np.all((table[:-1] <= boundaries) & (boundaries <= table[1:]))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("values, count", [([], 0), ([0.25], 1), ([0.25, 0.25], 1), ([-0.5, 0.25, 0.25], 2)])
def test_degenerate_layers_are_kept_exactly(placement, values, count):
    weight = np.array([*values, 0.0, 0.0], np.float32)
    choice = choose(0, weight, 4, QuantizationConfig(placement=placement))
    assert len(choice.levels) == count
    assert np.array_equal(choice.dequantized(weight), weight)


def test_levels_that_coincide_in_float16_are_merged():
    values = np.array([1.0, 1.0001, 1.0002, 2.0], np.float32)
    levels, boundaries = place(values, 3, "lloyd")
    assert levels.tolist() == [1.0, 2.0]
    assert np.searchsorted(boundaries, values).tolist() == [1, 1, 1, 2]


def test_a_level_that_float16_would_call_zero_is_zero():
    choice = choose(0, np.array([[1e-9, 1.0]], np.float32), 2, QuantizationConfig(placement="lloyd"))
    assert choice.levels.tolist() == [1.0]
    assert choice.symbols(np.array([[1e-9, 1.0]], np.float32)).tolist() == [[0, 1]]


def test_values_beyond_float16_are_named():
    with pytest.raises(ValueError, match="65504"):
        place(np.array([1e6], np.float32), 4)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e29])
def test_layers_beyond_float16_get_a_common_scale(magnitude):
    weight = (sparse((8, 50), 0.5, scale=1.0) * magnitude).astype(np.float32)
    config = QuantizationConfig(placement="lloyd", row_scales="never")
    exponents = Placements(0, weight, config, entropy_bytes).exponents(8)
    assert len(set(exponents.tolist())) == 1
    choice = choose(0, weight, 8, config, exponents=exponents)
    relative = np.abs(choice.dequantized(weight) - weight).max() / np.abs(weight).max()
    assert np.isfinite(choice.levels).all() and relative < 0.01


def test_an_ordinary_layer_needs_no_common_scale():
    assert layer_exponents(sparse((8, 50), 0.5)) is None
    assert layer_exponents(np.zeros((2, 2), np.float32)) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_diverged_layer_is_named(value):
    with pytest.raises(ValueError, match="diverged"):
        layer_exponents(np.array([[1.0, value]], np.float32))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from(PLACEMENTS), st.booleans(),
       st.sampled_from([(3, 40), (4, 3, 3, 3), (2, 7, 5), (1, 1)]), st.sampled_from([0.0, 0.1, 1.0]))
def test_torch_numpy_and_the_coded_tensor_give_the_same_bits(seed, bits, placement, scaled, shape, density):
    weight = sparse(shape, density, seed)
    exponents = row_exponents(weight) if scaled else None
    choice = choose(0, weight, bits, QuantizationConfig(placement=placement), exponents=exponents)
    other = sparse(shape, 0.7, seed + 1)  # not the weight that levels were placed for
    for w in (weight, other):
        decoded = choice.to_tensor("w", w).dequantize()
        assert decoded.dtype == np.float32 and decoded.shape == shape
        assert np.array_equal(decoded, choice.dequantized(w))
        applied = choice.apply(torch.from_numpy(w))
        assert applied.dtype == torch.float32
        assert applied.numpy().tobytes() == decoded.tobytes()
        assert not np.any(decoded[w == 0])


def test_apply_leaves_the_weight_alone_and_works_on_parameters():
    weight = torch.nn.Parameter(torch.from_numpy(sparse((4, 9), 0.5)))
    before = weight.detach().clone()
    result = choose(0, before.numpy(), 1, QuantizationConfig()).apply(weight)
    assert torch.equal(weight, before) and not result.requires_grad


def test_a_value_on_a_threshold_goes_down_in_numpy_and_in_torch():
    choice = LevelChoice(0, 1, np.array([-1, 1], np.float32), np.array([-0.5, 0.5], np.float32))
    weight = np.array([-0.5, 0.5, 0.5000001], np.float32)
    assert choice.symbols(weight).tolist() == [-1, 0, 1]
    assert choice.apply(torch.from_numpy(weight)).tolist() == [-1, 0, 1]


def test_a_choice_is_small_on_the_wire():
    weight = sparse((300, 784), 0.1)
    choice = choose(0, weight, 4, QuantizationConfig())
    assert len(pickle.dumps(choice)) < 1000


def test_row_scales_bring_rows_to_a_common_size():
    weight = sparse((6, 400), 0.5) * np.float32(2.0) ** np.arange(6, dtype=np.float32)[:, None]
    weight[3] = 0
    exponents = row_exponents(weight)
    assert exponents.dtype == np.int32 and exponents[3] == exponents[2]
    scaled = weight / row_scales(exponents)[:, None]
    alive = np.array([0, 1, 2, 4, 5])
    rms = np.sqrt(np.nanmean(np.where(scaled == 0, np.nan, scaled)[alive] ** 2, axis=1))
    assert np.all(np.abs(np.log2(rms)) <= 1 / 16 + 1e-3)


def test_row_scales_hold_values_that_the_curvature_ignores():
    weight = np.array([[1e-3, 1e6], [1e-3, 1e-3]], np.float32)
    exponents = row_exponents(weight, np.array([[1.0, 0.0], [1.0, 1.0]]))
    choice = choose(0, weight, 3, QuantizationConfig(placement="lloyd"), exponents=exponents)
    assert np.isfinite(choice.dequantized(weight)).all()


def test_row_scales_are_taken_only_where_they_pay():
    config = QuantizationConfig()
    alike = sparse((64, 200), 0.3)
    sizes = (np.float32(4.0) ** (np.arange(64, dtype=np.float32) % 5))[:, None]
    unlike, relative = alike * sizes, np.broadcast_to(sizes**-2.0, alike.shape)
    assert Placements(0, alike, config, entropy_bytes).exponents(4) is None
    # Rows of any size that all matter to the output, as behind a normalisation.
    assert Placements(0, unlike, config, entropy_bytes, relative).exponents(4) is not None
    # Where only the absolute error counts, small rows need no finer levels.
    assert Placements(0, unlike, config, entropy_bytes).exponents(4) is None
    assert Placements(0, unlike, QuantizationConfig(row_scales="never"), entropy_bytes, relative).exponents(4) is None
    assert Placements(0, alike, QuantizationConfig(row_scales="always"), entropy_bytes).exponents(4) is not None


def test_scaled_levels_minimise_the_error_of_the_weights_themselves():
    """Two rows, one level: the great row matters more than the small one."""
    weight = np.array([[1.0, 1.0], [64.0, 128.0]], np.float32)
    choice = choose(0, weight, 1, QuantizationConfig(placement="lloyd"), exponents=np.array([0, 48], np.int32))
    error = np.sum((choice.dequantized(weight) - weight) ** 2)
    best = min(np.sum((np.array([[a, a], [64 * b, 64 * c]]) - weight) ** 2)
               for levels in ((1.0, 2.0), (1.0, 1.5)) for a in levels for b in levels for c in levels)
    assert error == pytest.approx(best, abs=1e-3)


def test_curvature_pulls_levels_to_the_weights_that_matter():
    weight = np.array([[1.0, 2.0]], np.float32)
    config = QuantizationConfig(placement="uniform")
    choice = choose(0, np.repeat(weight, 2, 0), 1, config, np.array([[1.0, 9.0], [1.0, 9.0]]))
    assert choice.levels.tolist() == [1.0, 2.0]
    one_level = np.array([[1.0, 1.5, 8.0]], np.float32)
    choice = choose(0, one_level, 1, config, np.array([[1.0, 3.0, 1.0]]))
    assert choice.levels == pytest.approx([1.375, 8.0])


def test_the_slope_follows_the_width():
    values = sparse((20_000,), 1.0)
    ratio = rate_slope(values, 4, 1.0) / rate_slope(values, 5, 1.0)
    assert 3 < ratio < 5  # about 4 a bit
    assert rate_slope(values, 4, 0.5) == pytest.approx(rate_slope(values, 4, 1.0) / 2)


@pytest.mark.parametrize("arguments, words", [((0,), "bits=0"), ((9,), "bits=9"), ((4, "kmeans"), "kmeans"),
                                              ((4, "ecsq", -1.0), "rate_weight")])
def test_arguments_out_of_range_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        place(np.array([1.0], np.float32), *arguments)


def test_a_layer_with_a_level_for_each_survivor_gets_no_row_scales():
    rng, settings = np.random.default_rng(0), QuantizationConfig(bits=8)
    for _ in range(8):
        weight = (rng.standard_normal((10, 84)) * rng.uniform(0.2, 5, (10, 1))).astype(np.float32)
        weight[rng.random(weight.shape) > 0.05] = 0
        assert Placements(0, weight, settings, coded_bytes).exponents(8) is None
