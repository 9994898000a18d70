"""Candidates on the wire: whatever is sent arrives unchanged, and sets of many indices in few bytes."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de_ray.evaluation.parcel import Parcel
from de_ray.evolution.candidate import ZeroingSet

STEPS = [1, 3, 300, 70_000, 2**33]
"""Largest gaps, whose types differ in width."""


def ascending(count, step, seed):
    return np.cumsum(np.random.default_rng(seed).integers(1, step + 1, count), dtype=np.int64)


def require_same(found, expected):
    assert found.layer == expected.layer
    for got, wanted in ((found.zero, expected.zero), (found.revive, expected.revive)):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, wanted)


sets = st.builds(lambda layer, zeros, revived, step, seed:
                 ZeroingSet(layer, ascending(zeros, step, seed), ascending(revived, step, seed + 1)),
                 st.integers(0, 300), st.integers(0, 40), st.integers(0, 3), st.sampled_from(STEPS), st.integers(0, 99))


@given(st.lists(st.lists(sets, max_size=3).map(tuple), max_size=5))
def test_candidates_arrive_as_they_were_sent(candidates):
    found = pickle.loads(pickle.dumps(Parcel(candidates)))
    assert [len(candidate) for candidate in found] == [len(candidate) for candidate in candidates]
    for got, expected in zip(found, candidates, strict=True):
        assert isinstance(got, tuple)
        for one, other in zip(got, expected, strict=True):
            require_same(one, other)


class Other:
    """An edit that is no zeroing set."""

    layer = 1


def test_other_edits_travel_as_they_are():
    first, second = pickle.loads(pickle.dumps(Parcel([(ZeroingSet(0, ascending(5, 3, 0)), Other()), ()])))
    require_same(first[0], ZeroingSet(0, ascending(5, 3, 0)))
    assert isinstance(first[1], Other) and second == ()


@given(sets)
def test_a_zeroing_set_travels_by_itself(change):
    require_same(pickle.loads(pickle.dumps(change)), change)


@pytest.mark.parametrize(("step", "width"), [(200, 1), (60_000, 2)])
def test_an_index_takes_a_byte_or_two(step, width):
    candidates = [(ZeroingSet(0, ascending(1000, step, seed)),) for seed in range(16)]
    wire = len(pickle.dumps(Parcel(candidates)))
    assert wire < 16 * 1000 * width + 500
    assert len(pickle.dumps(candidates[0][0])) < 1000 * width + 300
