"""Operators on sets, against brute force and as properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de_ray.evolution import operators
from de_ray.evolution.draws import gumbels, stream
from de_ray.evolution.operators import fill, smallest
from de_ray.evolution.quotas import spread


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compilation is not to count as the time of a property's first example."""
    keys = np.arange(4, dtype=np.float32)
    fill(np.zeros(4, np.uint8), keys, 2)
    swap(np.arange(2), keys, 1)
    spread(np.ones(2), np.ones(2, np.int64), 1)


@st.composite
def keys_and_sets(draw):
    """Keys [n] and two subsets of range(n)."""
    keys = np.array(draw(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40)), np.float32)
    subset = st.lists(st.integers(0, len(keys) - 1), unique=True, max_size=len(keys))
    first, second = (np.array(sorted(draw(subset)), np.int64) for _ in range(2))
    return keys, first, second


def filled(tiers, keys, k):
    fill(tiers, keys, k)
    return tiers.nonzero()[0]


def resize(members, keys, k):
    tiers = np.zeros(len(keys), np.uint8)
    tiers[members] = 2
    return filled(tiers, keys, k)


def cross(first, second, keys, k):
    tiers = np.zeros(len(keys), np.uint8)
    tiers[first] += 1
    tiers[second] += 1
    return filled(tiers, keys, k)


def swap(members, keys, count, temperature=0.0):
    inside = np.zeros(len(keys), np.uint8)
    inside[members] = 1
    operators.swap(inside, keys, count, temperature, stream(0, 0))
    return inside.nonzero()[0]


def is_set(positions, n):
    within = not len(positions) or 0 <= positions[0] <= positions[-1] < n
    return within and np.array_equal(positions, np.unique(positions))


@given(keys_and_sets(), st.data())
def test_smallest_is_the_head_of_a_stable_sort(case, data):
    keys, _, _ = case
    k = data.draw(st.integers(0, len(keys)))
    np.testing.assert_array_equal(smallest(keys, k), np.sort(np.argsort(keys, kind="stable")[:k]))


@given(st.integers(0, 2**32), st.integers(1, 4000), st.sampled_from([1, 7, 300, 10**6]), st.data())
def test_filling_takes_the_head_of_a_stable_sort_by_tier_and_key(seed, n, values, data):
    rng = np.random.default_rng(seed)
    keys = (rng.integers(0, values, n) / values * rng.choice([1e-3, 1, 1e4])).astype(np.float32)  # with ties
    keys[rng.integers(n)] = rng.choice([-1e6, 0, 1e6])  # an outlier empties most of a histogram's bins
    tiers = rng.integers(0, 3, n).astype(np.uint8)
    k = data.draw(st.integers(0, n))
    expected = np.sort(np.lexsort((keys, -tiers.astype(int)))[:k])
    np.testing.assert_array_equal(filled(tiers, keys, k), expected)


MANY = {"normal": lambda rng, n: rng.normal(size=n), "ties": lambda rng, n: rng.integers(0, 5, n),
        "equal": lambda rng, n: np.ones(n), "rising": lambda rng, n: np.arange(n),
        # What a sample of each so-many-th key takes for all of them.
        "odd sample": lambda rng, n: np.where(np.arange(n) % (n // operators.SAMPLE) == 0, -5, rng.normal(size=n)),
        "outliers": lambda rng, n: np.where(rng.random(n) < 1e-4, 1e6, rng.normal(size=n))}


@pytest.mark.parametrize("keys", MANY.values(), ids=MANY)
@pytest.mark.parametrize("share", [0, 1e-4, 0.03, 0.5, 0.97, 1])
def test_filling_among_many_keys_takes_the_head_of_a_stable_sort_too(keys, share):
    rng, n = np.random.default_rng(3), operators.MANY + 4321
    keys = keys(rng, n).astype(np.float32)
    k = min(max(1, round(share * n)), n - 1)
    expected = np.sort(np.argsort(keys, kind="stable")[:k])
    np.testing.assert_array_equal(filled(np.zeros(n, np.uint8), keys, k), expected)
    np.testing.assert_array_equal(operators._least(keys, k), expected)


@given(keys_and_sets(), st.data())
def test_resize_keeps_as_many_members_as_fit(case, data):
    keys, members, _ = case
    k = data.draw(st.integers(0, len(keys)))
    resized = resize(members, keys, k)
    assert len(resized) == k and is_set(resized, len(keys))
    assert len(np.intersect1d(resized, members)) == min(k, len(members))


@given(keys_and_sets(), st.integers(0, 50))
def test_swap_keeps_the_size_and_exchanges_the_number_asked_for(case, count):
    keys, members, _ = case
    swapped = swap(members, keys, count)
    possible = min(count, len(members), len(keys) - len(members))
    assert len(swapped) == len(members) and is_set(swapped, len(keys))
    assert len(np.setdiff1d(swapped, members)) == possible


@given(keys_and_sets(), st.data())
def test_crossover_keeps_the_intersection_and_stays_in_the_union_where_it_can(case, data):
    keys, first, second = case
    both, either = np.intersect1d(first, second), np.union1d(first, second)
    k = data.draw(st.integers(len(both), len(keys)))
    child = cross(first, second, keys, k)
    assert len(child) == k and is_set(child, len(keys))
    assert np.isin(both, child).all()
    assert len(np.setdiff1d(child, either)) == max(0, k - len(either))


@given(st.integers(0, 99), st.integers(1, 60))
def test_swaps_at_a_temperature_exchange_as_many_and_favour_little_keys(seed, count):
    keys = np.random.default_rng(seed).normal(size=400).astype(np.float32)
    inside = np.zeros(400, np.uint8)
    inside[np.random.default_rng(seed).choice(400, 150, replace=False)] = 1
    before = inside.copy()
    operators.swap(inside, keys, count, 0.3, stream(seed, 1))
    assert inside.sum() == 150 and ((before == 1) & (inside == 0)).sum() == count
    entered, left = keys[inside > before], keys[inside < before]
    assert entered.mean() < keys[before == 0].mean() and left.mean() > keys[before == 1].mean()


def test_gumbel_draws_have_the_distributions_quantiles_and_differ_from_stream_to_stream():
    found = np.sort(np.concatenate([gumbels(stream(5, number), 50) for number in range(2000)]))
    shares = (np.arange(len(found)) + 0.5) / len(found)
    assert np.abs(np.exp(-np.exp(-found)) - shares).max() < 2 / np.sqrt(len(found))  # Kolmogorov-Smirnov
    assert len(np.unique(found)) > 0.99 * len(found)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(0, 100)), min_size=1, max_size=12), st.data())
def test_spread_hands_out_the_whole_budget_within_the_room(layers, data):
    weights, room = np.array([w for w, _ in layers]), np.array([r for _, r in layers], np.int64)
    budget = data.draw(st.integers(0, int(room.sum())))
    counts = spread(weights, room, budget)
    assert counts.sum() == budget
    assert (counts >= 0).all() and (counts <= room).all()


def test_spread_is_proportional_where_there_is_room():
    np.testing.assert_array_equal(spread(np.array([1.0, 3.0]), np.array([100, 100]), 40), [10, 30])
