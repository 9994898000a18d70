"""What a cycle's search may choose from, against brute force."""

import numpy as np
import pytest

from de_ray.evolution import space as module
from de_ray.evolution.space import CONTENDERS, LEAST_REACH, REACH, TINY, Budget, SearchSpace

SIZES = (900, 400, 70)


def case(bound, seed=0):
    """Saliencies of two criteria, masks, and a budget of 150 zeros, 20 of which are the last layer's if it is bound."""
    rng = np.random.default_rng(seed)
    saliency = {c: [np.exp(rng.normal(size=n)).astype(np.float32) for n in SIZES] for c in ("fisher", "magnitude")}
    masks = [rng.random(n) < 0.7 for n in SIZES]
    flags = np.array([False, False, bound])
    return saliency, masks, Budget(flags, np.where(flags, 20, 0), 130 if bound else 150)


def standardized(saliency, masks):
    logs = [np.log(s + np.float32(TINY)) for s in saliency]
    everyone = np.concatenate([log[mask] for log, mask in zip(logs, masks, strict=True)])
    return [(log - float(np.median(everyone))) / float(np.std(everyone)) for log in logs]


@pytest.mark.parametrize("bound", [False, True])
def test_survivors_that_may_be_zeroed_are_those_that_any_criterion_counts_among_its_least(bound):
    saliency, masks, budget = case(bound)
    space = SearchSpace(saliency, masks, budget, 0.01)
    logs = [standardized(of, masks) for of in saliency.values()]
    owner = np.concatenate([np.full(mask.sum(), layer) for layer, mask in enumerate(masks)])
    plain = []
    for of in logs:
        keys = np.concatenate([log[mask] for log, mask in zip(of, masks, strict=True)])
        free = np.flatnonzero(~budget.bound[owner])
        least = free[np.argsort(keys[free], kind="stable")[:budget.free_total]]
        plain.append(np.bincount(owner[least], minlength=3) + budget.fixed)
    starts = space.field.alive_starts
    for layer, mask in enumerate(masks):
        reach = REACH * max(quotas[layer] for quotas in plain) + LEAST_REACH
        alive, dead = np.flatnonzero(mask), np.flatnonzero(~mask)
        expected = np.unique([alive[np.argsort(of[layer][alive], kind="stable")[:reach]] for of in logs])
        here = slice(starts[layer], starts[layer + 1])
        np.testing.assert_array_equal(space.alive_indices[here], expected)
        np.testing.assert_array_equal(space.field.alive[:, here], [of[layer][expected] for of in logs])
        most = round(CONTENDERS * 0.01 * mask.sum())
        expected = np.unique([dead[np.argsort(-of[layer][dead], kind="stable")[:most]] for of in logs])
        here = slice(*space.field.dead_starts[layer:layer + 2])
        np.testing.assert_array_equal(space.dead_indices[here], expected)
        np.testing.assert_array_equal(space.field.dead[:, here], [of[layer][expected] for of in logs])


def test_indices_take_four_bytes_but_where_a_layer_is_huge(monkeypatch):
    saliency, masks, budget = case(False)
    small = SearchSpace(saliency, masks, budget)
    assert small.alive_indices.dtype == small.dead_indices.dtype == np.int32
    monkeypatch.setattr(module, "LAST", 500)
    large = SearchSpace(saliency, masks, budget)
    assert large.alive_indices.dtype == np.int64
    np.testing.assert_array_equal(large.alive_indices, small.alive_indices)


def test_scores_are_finite_whatever_saliencies_are():
    saliency, masks, budget = case(False)
    saliency["magnitude"][0][:3] = 0, np.inf, np.nan
    masks[0][:3] = True
    assert np.isfinite(SearchSpace(saliency, masks, budget).field.alive).all()


def test_what_is_gathered_is_by_position():
    saliency, masks, budget = case(False)
    space = SearchSpace(saliency, masks, budget)
    alive, dead = space.gathered([np.arange(n, dtype=np.float32) for n in SIZES])
    np.testing.assert_array_equal(alive, space.alive_indices)
    np.testing.assert_array_equal(dead, space.dead_indices)
