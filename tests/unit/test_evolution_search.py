"""The search as ask/tell, on objectives whose best answer is known."""

import threading

import numpy as np
import pytest

from de_ray.config import EvolutionConfig
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace

SIZES = (60, 40)
TOTAL = 50


def make_space(rng, criteria=("fisher", "magnitude"), bound=False, dead=0):
    """Two layers with random saliencies, `dead` of each already zeroed, 50 zeros to add."""
    saliency = {c: [rng.random(n).astype(np.float32) for n in SIZES] for c in criteria}
    masks = [np.arange(n) >= dead for n in SIZES]
    flags = np.full(2, bound)
    fixed = np.array([30, 20]) if bound else np.zeros(2, np.int64)
    return SearchSpace(saliency, masks, Budget(flags, fixed, 0 if bound else TOTAL)), masks


def additive(costs):
    """An evaluator whose fitness is the zeroed parameters' cost less the revived ones'; batches do not matter."""
    def evaluate(candidates, batches):
        return np.array([sum(costs[s.layer][s.zero].sum() - costs[s.layer][s.revive].sum() for s in candidate)
                         for candidate in candidates])
    return evaluate


def drive(search, evaluate):
    requests = []
    while (request := search.ask()) is not None:
        requests.append(request)
        search.tell(request, evaluate(request.candidates, request.batches))
    return requests


def net(candidate):
    return sum(len(s.zero) - len(s.revive) for s in candidate)


@pytest.mark.parametrize("dead", [0, 10])
@pytest.mark.parametrize("bound", [False, True])
def test_every_candidate_spends_exactly_the_budget(bound, dead):
    rng = np.random.default_rng(1)
    space, masks = make_space(rng, bound=bound, dead=dead)
    search = DirectedSearch(space, EvolutionConfig(regrow=0.3, swap=0.3), 4, rng)
    for request in drive(search, additive([rng.random(n) for n in SIZES])):
        for candidate in request.candidates:
            assert net(candidate) == TOTAL
            for one in candidate:
                assert masks[one.layer][one.zero].all(), "only survivors are zeroed"
                assert not masks[one.layer][one.revive].any(), "only zeroed parameters come back"
                assert np.array_equal(one.zero, np.unique(one.zero))
                if bound:
                    assert len(one.zero) - len(one.revive) == (30, 20)[one.layer]


def test_the_first_generation_holds_every_criterions_plain_top_k():
    rng = np.random.default_rng(2)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(), 1, rng)
    first = search.ask().candidates
    for c, criterion in enumerate(space.criteria):
        plain = DirectedSearch(space, EvolutionConfig(criteria=[criterion], generations=0), 1, rng)
        expected = search._plain().candidates(space)[c]
        assert plain.ask() is None
        for a, b in zip(first[c], expected, strict=True):
            np.testing.assert_array_equal(a.zero, b.zero)


def test_evolution_ends_no_worse_than_any_criterion_and_beats_them_on_noisy_saliencies():
    rng = np.random.default_rng(3)
    costs = [rng.random(n) ** 3 for n in SIZES]
    noisy = {c: [(cost * np.exp(rng.normal(0, 1, len(cost)))).astype(np.float32) for cost in costs]
             for c in ("fisher", "magnitude")}
    space = SearchSpace(noisy, [np.ones(n, bool) for n in SIZES],
                        Budget(np.zeros(2, bool), np.zeros(2, np.int64), TOTAL))
    search = DirectedSearch(space, EvolutionConfig(generations=8, swap=0.2), 4, rng)
    requests = drive(search, additive(costs))
    plain = additive(costs)(requests[0].candidates[:2], [])
    assert search.best()[1] < plain.min()


def test_the_last_choice_is_made_on_batches_that_breeding_has_not_seen():
    rng = np.random.default_rng(4)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(confirm=0.25, elite=2), 8, rng)
    requests = drive(search, lambda candidates, batches: np.arange(len(candidates), 0.0, -1.0))
    assert requests[-1].batches == [6, 7] and len(requests[-1].candidates) == 2 + len(space.criteria)
    assert all(max(request.batches) < 6 for request in requests[:-1])
    assert search.best()[1] == 1.0
    for a, b in zip(search.best()[0], requests[-1].candidates[-1], strict=True):
        np.testing.assert_array_equal(a.zero, b.zero)


def test_racing_screens_on_fresh_batches_and_reports_what_it_saved():
    rng = np.random.default_rng(5)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(population=12, generations=3, screen=0.25), 8, rng)
    requests = drive(search, additive([rng.random(n) for n in SIZES]))[:-1]
    screens = [tuple(r.batches) for r in requests if len(r.batches) < 6]
    assert len(screens) == 3 and all(len(batches) == 2 for batches in screens)
    assert len(set(screens)) > 1
    full = sum(len(r.candidates) for r in requests if len(r.batches) == 6)
    screened = sum(len(r.candidates) for r in requests if len(r.batches) < 6)
    assert search.saved_evaluations == screened - full > 0
    assert all(r.screening == (len(r.batches) == 2) for r in requests)


def race_in_heats(rng, costs, choose):
    """A search over generations of three heats, of whose open requests `choose` says which one is answered next."""
    space, _ = make_space(rng, dead=10)
    search = DirectedSearch(space, EvolutionConfig(population=3 * HEAT, generations=2, screen=0.25), 8, rng)
    history, out = [], []
    while not search.over:
        out.extend(iter(search.ask, None))
        request = out.pop(choose(out))
        history.append(request)
        search.tell(request, additive(costs)(request.candidates, request.batches))
    assert not out
    return search, history


@pytest.fixture
def short_heats(monkeypatch):
    monkeypatch.setattr("de_ray.evolution.search.HEAT", HEAT)


HEAT = 8


def test_what_a_search_finds_does_not_depend_on_the_order_of_its_answers(short_heats):
    costs = [np.random.default_rng(13).random(n) for n in SIZES]
    orders = [lambda out: 0, lambda out: -1, lambda out: len(out) // 2]
    searches = [race_in_heats(np.random.default_rng(14), costs, choose)[0] for choose in orders]
    (expected, fitness), *others = [search.best() for search in searches]
    assert len({search.saved_evaluations for search in searches}) == 1
    for found, same in others:
        assert same == fitness
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.zero, other.zero)


def test_finalists_of_a_heat_are_its_better_half_and_wait_for_no_other_heat(short_heats):
    costs = [np.random.default_rng(15).random(n) for n in SIZES]
    search, history = race_in_heats(np.random.default_rng(16), costs, lambda out: -1)
    screens = [request for request in history if request.screening]
    finals = [request for request in history if not request.screening][:-1]
    assert [request.screening for request in history[:6]] == [True, False] * 3
    assert len(screens) == len(finals) == 5 and {len(request.candidates) for request in screens[:3]} == {HEAT}
    plain = 2  # of the first heat; they go through whatever screening says
    for screen, final in zip(screens, finals, strict=True):
        spared = plain if screen is screens[2] else 0
        fitness = additive(costs)(screen.candidates[spared:], [])
        better = additive(costs)(final.candidates[spared:], [])
        np.testing.assert_array_equal(np.sort(better), np.sort(fitness)[:(len(fitness) + 1) // 2])
    assert search.saved_evaluations == sum(len(s.candidates) - len(f.candidates)
                                           for s, f in zip(screens, finals, strict=True))


def test_a_candidate_of_nan_fitness_is_out():
    rng = np.random.default_rng(6)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(screen=1.0), 2, rng)
    drive(search, lambda candidates, _: np.where(np.arange(len(candidates)) == 1, 0.5, np.nan))
    assert search.best()[1] == 0.5


def test_fitness_that_is_nan_throughout_is_an_error():
    rng = np.random.default_rng(7)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(), 2, rng)
    drive(search, lambda candidates, _: np.full(len(candidates), np.nan))
    with pytest.raises(FloatingPointError):
        search.best()


def test_a_baseline_evaluates_nothing():
    rng = np.random.default_rng(8)
    space, _ = make_space(rng, criteria=("magnitude",))
    search = DirectedSearch(space, EvolutionConfig(criteria=["magnitude"], generations=0), 4, rng)
    assert search.ask() is None
    assert net(search.best()[0]) == TOTAL


def test_the_same_generator_gives_the_same_search():
    def run():
        rng = np.random.default_rng(9)
        space, _ = make_space(rng)
        costs = [np.linspace(0, 1, n) for n in SIZES]
        search = DirectedSearch(space, EvolutionConfig(), 4, rng)
        drive(search, additive(costs))
        return search.best()
    (first, a), (second, b) = run(), run()
    assert a == b
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.zero, other.zero)


@pytest.mark.parametrize("read", [lambda candidates: candidates[600], lambda candidates: candidates[:]])
def test_children_do_not_depend_on_how_their_generation_is_read(read):
    def run(read):
        rng = np.random.default_rng(11)
        space, _ = make_space(rng, dead=10)
        search = DirectedSearch(space, EvolutionConfig(population=1000, regrow=0.3, swap=0.3), 4, rng)
        costs = [np.linspace(0, 1, n) for n in SIZES]
        while (request := search.ask()) is not None:
            if len(request.candidates) > 600:
                read(request.candidates)
            search.tell(request, additive(costs)(request.candidates, request.batches))
        return search.best()
    (found, fitness), (expected, same) = run(read), run(len)
    assert fitness == same
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.zero, other.zero)
        np.testing.assert_array_equal(one.revive, other.revive)


def test_the_first_candidates_of_a_generation_can_be_read_before_the_last_ones_are_bred():
    rng = np.random.default_rng(12)
    space, _ = make_space(rng)
    search = DirectedSearch(space, EvolutionConfig(population=1000), 4, rng)
    candidates, go_on = search.ask().candidates, threading.Event()
    brood = candidates._brood
    write = brood._write

    def slowly(begin, end, genomes):
        assert begin < 500 or go_on.wait(60)
        write(begin, end, genomes)

    brood._write = slowly
    assert len(candidates) == 1000 and net(candidates[0]) == TOTAL
    go_on.set()
    assert net(candidates[-1]) == TOTAL


def test_more_zeros_than_survivors_is_an_error_that_names_both():
    rng = np.random.default_rng(10)
    saliency = {"fisher": [rng.random(4).astype(np.float32)]}
    with pytest.raises(ValueError, match=r"5 zeros.*at most the 4"):
        SearchSpace(saliency, [np.ones(4, bool)], Budget(np.zeros(1, bool), np.zeros(1, np.int64), 5))
