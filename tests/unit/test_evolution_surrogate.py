"""Screening by surrogates."""

import numpy as np
import pytest

from de_ray.config import EvolutionConfig
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import DiagonalSurrogate, rank_correlation

SIZES = (60, 40)
VALUES = [np.random.default_rng(layer).random(size).astype(np.float32) for layer, size in enumerate(SIZES)]
TRUE = [np.random.default_rng(9 + layer).random(size).astype(np.float32) for layer, size in enumerate(SIZES)]


def run(estimate, oversample=4, seed=0):
    """Search for sets whose sum of TRUE is least: the best sum, sets estimated and evaluated, correlation."""
    budget = Budget(np.zeros(2, bool), np.zeros(2, np.int64), 40)
    space = SearchSpace({"magnitude": VALUES}, [np.ones(size, bool) for size in SIZES], budget)
    config = EvolutionConfig(criteria=["magnitude"], population=8, generations=5, oversample=oversample, swap=0.3)
    asked = []

    def counted(candidates):
        asked.append(len(candidates))
        return estimate(candidates)

    search = DirectedSearch(space, config, 4, np.random.default_rng(seed), counted if estimate else None)
    evaluated = 0
    while (request := search.ask()) is not None:
        evaluated += len(request.candidates)
        search.tell(request, cost(request.candidates))
    return search.best()[1], asked, evaluated, search.correlation


cost = DiagonalSurrogate(TRUE)


def test_a_true_estimate_finds_better_sets_by_as_many_evaluations():
    plain = [run(None, seed=seed) for seed in range(5)]
    screened = [run(cost, seed=seed) for seed in range(5)]
    assert [found[2] for found in plain] == [found[2] for found in screened]
    assert np.mean([found[0] for found in screened]) < np.mean([found[0] for found in plain])
    assert all(found[3] == pytest.approx(1) for found in screened)
    assert screened[0][1] == [8] + 4 * [4 * 6]  # the first generation, and four times each later one's children


def test_an_estimate_that_ranks_wrongly_is_asked_no_more():
    wrong = run(lambda candidates: -cost(candidates))
    assert wrong[1] == [8] and wrong[3] == pytest.approx(-1)
    assert wrong[0] == run(None)[0]


@pytest.mark.parametrize(("first", "second", "expected"), [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1.0), ([1, 2, 3, 4], [4, 3, 2, 1], -1.0), ([1, 1, 1], [1, 2, 3], 0.0),
    ([1, 2, 2, 3], [1, 2, 2, 3], 1.0), ([1, 2, 3], [1, 2, np.nan], 1.0), ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8)])
def test_rank_correlation_is_spearmans(first, second, expected):
    assert rank_correlation(np.array(first, float), np.array(second, float)) == pytest.approx(expected)
