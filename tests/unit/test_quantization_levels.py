import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de_ray.quantization.atoms import MAX_ATOMS, make_atoms
from de_ray.quantization.ecsq import ecsq
from de_ray.quantization.levels import lloyd_max, nearest_error, uniform


def error_of(values, weights, levels):
    return float(np.sum(weights * np.min((values[:, None].astype(float) - levels) ** 2, axis=1)))


def brute_force(values, weights, count):
    """Least error over all partitions of the sorted values into at most `count` intervals."""
    order = np.argsort(values)
    x, w = values[order].astype(float), weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(count, len(x)) - 1):
        cells = np.split(np.arange(len(x)), cuts)
        best = min(best, sum(np.sum(w[c] * (x[c] - np.average(x[c], weights=w[c])) ** 2) for c in cells))
    return best


values_of = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=9)


@settings(deadline=None, max_examples=150)
@given(values_of, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_lloyd_max_is_the_best_of_all_partitions(values, count, seed):
    values = np.array(values, np.float32)
    weights = np.random.default_rng(seed).uniform(0.1, 3, len(values))
    levels = lloyd_max(values, count, weights)
    assert len(levels) <= count
    assert np.all(np.diff(levels) > 0)
    assert error_of(values, weights, levels) == pytest.approx(brute_force(values, weights, count), abs=1e-9)


@pytest.mark.parametrize("count", [2, 7, 64])
def test_lloyd_max_agrees_with_the_quadratic_programme_on_many_values(count):
    generator = np.random.default_rng(3)
    x = np.sort(generator.normal(size=300).astype(np.float32)).astype(float)
    w = generator.uniform(0.5, 2, 300)
    mass, first, second = (np.concatenate([[0], np.cumsum(t)]) for t in (w, w * x, w * x * x))
    with np.errstate(divide="ignore", invalid="ignore"):
        cell = (second - second[:, None]) - (first - first[:, None]) ** 2 / (mass - mass[:, None])  # [start, end]
    cell[np.tril_indices(301)] = np.inf
    best = cell[0]
    for _ in range(count - 1):
        best = np.min(best[:, None] + cell, axis=0)
    assert error_of(x, w, lloyd_max(x, count, w)) == pytest.approx(best[300], rel=1e-6)


def test_lloyd_max_of_many_values_is_close_to_what_iteration_finds():
    values = np.random.default_rng(0).laplace(size=60_000).astype(np.float32)
    levels = lloyd_max(values, 16)
    refined = levels
    for _ in range(30):
        member = np.searchsorted((refined[1:] + refined[:-1]) / 2, values)
        refined = np.bincount(member, values) / np.bincount(member)
    weights = np.ones(len(values))
    assert error_of(values, weights, levels) <= error_of(values, weights, refined) * 1.0005


def test_merged_atoms_keep_mass_mean_and_error():
    generator = np.random.default_rng(1)
    values, weights = generator.normal(size=50_000).astype(np.float32), generator.uniform(0, 2, 50_000)
    atoms = make_atoms(values, weights)
    assert len(atoms.values) <= MAX_ATOMS + 1
    assert atoms.total == len(values)
    assert np.sum(atoms.weights) == pytest.approx(weights.sum())
    assert atoms.weights @ atoms.values == pytest.approx(weights @ values.astype(float))
    assert np.all(atoms.low[1:] > atoms.high[:-1])
    assert not np.any((atoms.low < 0) & (atoms.high >= 0))
    whole = np.array([np.average(values.astype(float), weights=weights)])
    assert nearest_error(atoms, whole) == pytest.approx(error_of(values, weights, whole), rel=1e-6)


def test_uniform_levels_are_centroids_of_equal_cells_and_skip_empty_ones():
    values = np.array([0.0, 0.2, 0.4, 3.9, 4.0], np.float32)
    assert uniform(values, 4) == pytest.approx([0.2, 3.95])


@pytest.mark.parametrize("placement", [uniform, lloyd_max])
@pytest.mark.parametrize("values, expected", [([], []), ([0.5], [0.5]), ([2, 2, 2], [2]), ([1, 3, 1], [1, 3])])
def test_degenerate_layers_get_the_levels_that_they_have(placement, values, expected):
    assert placement(np.array(values, np.float32), 4) == pytest.approx(expected)


def rates(values, quantizer, zeros):
    table = np.sort(np.append(quantizer.levels, 0.0))
    member = np.searchsorted(quantizer.boundaries, values)
    counts = np.bincount(member, minlength=len(table)).astype(float)
    counts[np.flatnonzero(table == 0)] += zeros
    used = counts > 0
    bits = -np.log2(counts[used] / counts.sum())
    return table[member], float(counts[used] @ bits)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 8), st.sampled_from([0.0, 1e-3, 0.05, 0.5]),
       st.sampled_from([0, 7, 500]), st.booleans())
def test_ecsq_cost_never_rises_and_is_what_its_thresholds_give(seed, size, count, slope, zeros, allow_zero):
    generator = np.random.default_rng(seed)
    values = generator.laplace(size=size).astype(np.float32)
    weights = generator.uniform(0.2, 2, size)
    quantizer = ecsq(values, count, slope, weights, zeros, allow_zero)
    assert np.all(np.diff(quantizer.costs) <= 1e-9 * (1 + np.abs(quantizer.costs[:-1])))
    assert len(quantizer.levels) <= count
    assert np.all(np.diff(quantizer.boundaries) >= 0)
    decoded, bits = rates(values, quantizer, zeros)
    cost = float(np.sum(weights * (values.astype(float) - decoded) ** 2)) + slope * bits
    assert cost == pytest.approx(quantizer.costs[-1], rel=1e-6, abs=1e-9)
    if not allow_zero:
        assert np.all(decoded != 0)


def all_partitions(x, count, slope, zeros):
    """Least cost over all ordered partitions into levels of one sign each and an interval for zero."""
    def cuts_of(side):
        for cut in itertools.product([0, 1], repeat=max(len(side) - 1, 0)):
            yield np.split(side, 1 + np.flatnonzero(cut)) if len(side) else []

    best = np.inf
    for first, end in itertools.combinations_with_replacement(range(len(x) + 1), 2):
        left, zeroed, right = x[:first], x[first:end], x[end:]
        if (left > 0).any() or (right < 0).any():
            continue
        for cells in (a + b for a in cuts_of(left) for b in cuts_of(right)):
            if len(cells) <= count:
                counts = np.array([c for c in (zeros + len(zeroed), *map(len, cells)) if c], float)
                error = np.sum(zeroed**2) + sum(np.sum((c - c.mean()) ** 2) for c in cells)
                best = min(best, error - slope * float(counts @ np.log2(counts / counts.sum())))
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.0, 0.02, 0.2]),
       st.sampled_from([0, 20]))
def test_ecsq_is_the_best_of_all_ordered_partitions(seed, size, count, slope, zeros):
    values = np.sort(np.random.default_rng(seed).normal(size=size).astype(np.float32))
    cost = ecsq(values, count, slope, zeros=zeros).costs[-1]
    assert cost == pytest.approx(all_partitions(values.astype(float), count, slope, zeros), rel=1e-5, abs=1e-9)


def test_ecsq_needs_less_rate_than_lloyd_max_at_equal_error():
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    levels = lloyd_max(values, 16)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    shares = np.bincount(nearest) / len(values)
    lloyd_bits, lloyd_error = float(-shares @ np.log2(shares)), error_of(values, np.ones(len(values)), levels)
    low, high = 1e-4, 1.0
    for _ in range(12):  # the slope at which ECSQ's error is Lloyd's
        slope = np.sqrt(low * high)
        decoded, bits = rates(values, ecsq(values, 64, slope), 0)
        low, high = (slope, high) if np.sum((values - decoded) ** 2) <= lloyd_error else (low, slope)
    decoded, bits = rates(values, ecsq(values, 64, low), 0)
    assert np.sum((values - decoded) ** 2) <= lloyd_error
    assert bits / len(values) < lloyd_bits - 0.2


def test_a_steep_slope_turns_all_survivors_into_zeros():
    quantizer = ecsq(np.array([0.1, -0.1, 0.2], np.float32), 4, slope=100.0, zeros=50)
    assert len(quantizer.levels) == len(quantizer.boundaries) == 0


@pytest.mark.parametrize("values, weights, words", [([1.0, np.nan], None, "finite"), ([1.0, np.inf], None, "finite"),
                                                    ([1.0], [-1.0], "0 or more"), ([1.0], [1.0, 2.0], "one for each")])
def test_impossible_values_and_weights_are_named(values, weights, words):
    with pytest.raises(ValueError, match=words):
        lloyd_max(np.array(values, np.float32), 2, None if weights is None else np.array(weights))


def test_values_without_curvature_still_count():
    levels = lloyd_max(np.array([1.0, 2.0, 3.0], np.float32), 2, np.zeros(3))
    assert levels == pytest.approx([1.5, 3.0]) or levels == pytest.approx([1.0, 2.5])
    levels = lloyd_max(np.array([1.0, 9.0], np.float32), 1, np.array([1.0, 0.0]))
    assert levels == pytest.approx([1.0], abs=1e-4)
