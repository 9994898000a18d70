"""Genomes as bits, the candidates that are read off them, and what stays in memory."""

import gc
import pickle
import tracemalloc
import weakref

import numpy as np
import pytest

from de_ray.config import EvolutionConfig
from de_ray.evolution.breeding import Rates, vary
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.genomes import Genomes
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import DiagonalSurrogate

SIZES = (61, 5, 43)  # no layer starts at a whole byte
REGROW = 0.3


@pytest.fixture
def case():
    """Saliencies, a space and 20 genomes, of which half are bred from two parents."""
    rng = np.random.default_rng(0)
    saliency = {c: [rng.random(n).astype(np.float32) for n in SIZES] for c in ("fisher", "magnitude")}
    masks = [rng.random(n) < 0.8 for n in SIZES]
    space = SearchSpace(saliency, masks, Budget(np.zeros(3, bool), np.zeros(3, np.int64), 30), REGROW)
    search = DirectedSearch(space, EvolutionConfig(regrow=REGROW), 4, rng)
    parents = search._plain(rng.dirichlet(np.ones(2), 4))
    genomes = Genomes.empty(20, space, REGROW)
    vary(space.field, Rates(0.2, 0.3, REGROW, 0.3), parents, rng.integers(0, 4, (20, 2)), rng.random(20), 7, 0, genomes)
    return saliency, space, genomes


def test_the_bits_of_a_genome_are_its_zeroing_sets(case):
    _, space, genomes = case
    starts = space.field.alive_starts
    for row, candidate in enumerate(genomes.candidates(space)):
        inside = np.unpackbits(genomes.members[row], bitorder="little")[:starts[-1]].astype(bool)
        back = genomes.revived[row, :genomes.returned[row].sum()]  # nothing was written behind these
        returned = np.split(space.dead_indices[back], np.cumsum(genomes.returned[row]))
        found = {one.layer: one for one in candidate}
        for layer in range(len(SIZES)):
            here = slice(starts[layer], starts[layer + 1])
            expected = space.alive_indices[here][inside[here]]
            assert len(expected) == genomes.quotas[row, layer] + genomes.returned[row, layer]
            assert (layer in found) == bool(len(expected))
            if len(expected):
                assert found[layer].zero.dtype == found[layer].revive.dtype == np.int64
                np.testing.assert_array_equal(found[layer].zero, expected)
                np.testing.assert_array_equal(found[layer].revive, returned[layer])


def test_sums_over_genomes_are_those_over_their_candidates(case):
    saliency, space, genomes = case
    expected = DiagonalSurrogate(saliency["fisher"])(genomes.candidates(space))
    np.testing.assert_allclose(genomes.sums(*space.gathered(saliency["fisher"])), expected, rtol=1e-5)


def test_costs_that_are_not_finite_count_where_they_are_members(case):
    _, space, genomes = case
    alive, dead = space.gathered([np.zeros(n, np.float32) for n in SIZES])
    inside = np.unpackbits(genomes.members, axis=1, bitorder="little")
    alive[3] = np.inf
    np.testing.assert_array_equal(genomes.sums(alive, dead), np.where(inside[:, 3], np.inf, 0.0))


def test_candidates_cut_together_are_those_made_one_by_one(case):
    _, space, genomes = case
    for candidate, expected in zip(genomes.cut(*genomes.flat(space)), genomes.candidates(space), strict=True):
        for one, other in zip(candidate, expected, strict=True):
            assert one.layer == other.layer
            np.testing.assert_array_equal(one.zero, other.zero)
            np.testing.assert_array_equal(one.revive, other.revive)


def test_candidates_are_read_as_any_sequence(case):
    _, space, genomes = case
    candidates = genomes.candidates(space)
    assert len(candidates) == len(list(candidates)) == 20 and len(candidates[3:9:2]) == 3
    np.testing.assert_array_equal(candidates[-1][0].zero, candidates[19][0].zero)
    with pytest.raises(IndexError):
        candidates[20]


def test_a_bred_set_travels_as_a_plain_one_and_has_no_other_attributes(case):
    _, space, genomes = case
    one = genomes.candidate(space, 5)[0]
    other = pickle.loads(pickle.dumps(one))
    assert type(other) is ZeroingSet and other.layer == one.layer
    np.testing.assert_array_equal(other.zero, one.zero)
    np.testing.assert_array_equal(other.revive, one.revive)
    assert one.zero is one.zero, "who reads them twice looks them up once"
    with pytest.raises(AttributeError):
        one.weight


# What stays in memory.


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def make_search(n=4000, zeros=1500, population=12):
    rng = np.random.default_rng(1)
    saliency = {c: [rng.random(n).astype(np.float32)] for c in ("fisher", "magnitude", "taylor")}
    space = SearchSpace(saliency, [np.ones(n, bool)], Budget(np.zeros(1, bool), np.zeros(1, np.int64), zeros))
    return DirectedSearch(space, EvolutionConfig(population=population), 4, rng)


def run(search, seen=lambda candidates: None):
    while (request := search.ask()) is not None:
        seen(request.candidates)
        search.tell(request, np.array([float(candidate[0].zero.sum()) for candidate in request.candidates]))


@pytest.fixture
def large(monkeypatch):
    """Candidates that are too large to be kept."""
    monkeypatch.setattr("de_ray.evolution.brood.KEPT", 0)


def test_a_large_candidate_that_was_evaluated_is_not_kept_by_its_generation(no_collector, large):
    gone = []

    def read(candidates):
        array = candidates[0][0].zero
        gone.append(weakref.ref(array))
        del array
        assert gone[-1]() is None
    run(make_search(), read)
    assert len(gone) > 3


def test_a_search_finds_the_same_whether_candidates_are_kept_or_made_anew(monkeypatch):
    found = []
    for kept in (0, 2**26):
        monkeypatch.setattr("de_ray.evolution.brood.KEPT", kept)
        search = make_search(population=600)
        run(search)
        found.append(search.best())
    ((one,), fitness), ((other,), same) = found
    assert fitness == same
    np.testing.assert_array_equal(one.zero, other.zero)


@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize("population", [12, 600])
def test_a_search_is_freed_once_nobody_holds_it_though_its_best_candidate_is_held(no_collector, monkeypatch, population,
                                                                                        kept):
    monkeypatch.setattr("de_ray.evolution.brood.KEPT", kept)
    search = make_search(population=population)
    parts = [weakref.ref(search), weakref.ref(search._space)]
    run(search, lambda candidates: parts.append(weakref.ref(candidates)) if not isinstance(candidates, list) else None)
    best, _ = search.best()
    del search
    assert len(best[0].zero) == 1500
    assert len(parts) > 3 and not any(part() for part in parts)


def test_memory_of_a_search_over_large_layers_is_bounded_by_a_few_bytes_a_weight(large):
    n = 200_000
    run(make_search())  # what is imported and compiled does not count
    tracemalloc.start()
    search = make_search(n, n // 2)
    _, building = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    run(search)
    _, running = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 12 of saliencies, 12 of scores and 4 of indices; two generations of genomes, bits, take 3, and a candidate 4.
    assert building / n < 60
    assert running / n < 60
