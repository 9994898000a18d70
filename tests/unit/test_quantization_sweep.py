import logging
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
from ray.tune.search import Searcher

from de_ray.config import QuantizationConfig
from de_ray.device import threads
from de_ray.quantization.allocate import allocations, lagrangian, warm_starts
from de_ray.quantization.goal import WithinBytes, WithinDivergence
from de_ray.quantization.pareto import Trial, make_trial, pareto
from de_ray.quantization.search import WidthSearch
from de_ray.quantization.sensitivity import choices_at, sensitivity
from de_ray.quantization.sweep import fixed, sweep, tolerated
from de_ray.quantization.table import SensitivityTable
from de_ray.quantization.tune_searcher import RoundSearcher
from de_ray.tuning import signals_restored


class SquaredErrorPool:
    """Divergence 0.01 + relative squared error of the quantized weights; counts calls."""

    batches = 3

    def __init__(self, weights, bad=None):
        self.weights, self.bad, self.calls = weights, bad, []

    def evaluate(self, candidates, batches):
        self.calls.append((len(candidates), list(batches)))
        return np.array([self._one(candidate) for candidate in candidates])

    def _one(self, candidate):
        if self.bad and any((choice.layer, choice.bits) == self.bad for choice in candidate):
            return np.nan
        errors = (c.dequantized(self.weights[c.layer]) - self.weights[c.layer] for c in candidate)
        return 0.01 + sum(float(np.sum(error**2)) for error in errors)

    def client(self):
        return self


def price(tensor):
    counts = np.unique(tensor.symbols, return_counts=True)[1]
    return int(np.ceil(-np.sum(counts * np.log2(counts / counts.sum())) / 8)) + 2 * len(tensor.levels) + 8


@pytest.fixture
def weights():
    generator = np.random.default_rng(0)
    return [np.where(generator.uniform(size=shape) < 0.2, generator.normal(size=shape) * scale, 0).astype(np.float32)
            for shape, scale in (((30, 40), 0.02), ((20, 30), 0.1), ((10, 20), 0.3))]


CONFIG = QuantizationConfig(placement="lloyd", tolerance=100.0, max_bits=6)


def table_of(weights, pool, config=CONFIG):
    return sensitivity(weights, ("a", "b", "c"), pool, config, price=price)


def test_levels_do_not_depend_on_the_threads_that_place_them(weights):
    with threads(1):
        alone, sizes = choices_at(weights, CONFIG)
    with threads(3):
        together, others = choices_at(weights, CONFIG)
    assert np.array_equal(sizes, others)
    for one, other in zip(sum(alone, ()), sum(together, ()), strict=True):
        assert (one.layer, one.bits) == (other.layer, other.bits) and np.array_equal(one.levels, other.levels)


def test_sensitivity_evaluates_every_layer_and_width_in_one_call(weights):
    pool = SquaredErrorPool(weights)
    table = table_of(weights, pool)
    assert pool.calls == [(1 + 3 * 6, [0, 1, 2])]
    assert table.base == pytest.approx(0.01)
    assert table.widths == (1, 2, 3, 4, 5, 6)
    for l, row in enumerate(table.choices):
        for w, choice in enumerate(row):
            assert (choice.layer, choice.bits) == (l, w + 1)
            assert table.bytes[l, w] == price(choice.to_tensor("", weights[l]))
            assert table.divergence[l, w] == pytest.approx(pool._one((choice,)))
    assert np.all(np.diff(table.divergence, axis=1) < 0)
    assert np.all(np.diff(table.bytes, axis=1) > 0)


def test_curvature_reaches_the_levels(weights):
    curvature = [np.ones_like(w) for w in weights]
    curvature[0][:, :20] = 1000.0
    plain, weighted = (sensitivity(weights, ("a", "b", "c"), SquaredErrorPool(weights), CONFIG, importance, price)
                       for importance in (None, curvature))
    assert not np.array_equal(plain.choices[0][2].levels, weighted.choices[0][2].levels)
    assert np.array_equal(plain.choices[1][2].levels, weighted.choices[1][2].levels)


def test_an_assignment_adds_up_bytes_and_is_checked(weights):
    table = table_of(weights, SquaredErrorPool(weights))
    assert table.payload((1, 2, 6)) == table.bytes[0, 0] + table.bytes[1, 1] + table.bytes[2, 5]
    assert [(c.layer, c.bits) for c in table.candidate((1, 2, 6))] == [(0, 1), (1, 2), (2, 6)]
    for widths in ((1, 2), (1, 2, 7)):
        with pytest.raises(ValueError, match="widths"):
            table.payload(widths)


def test_fixed_bits_make_a_table_of_one_width_and_one_trial(weights):
    pool = SquaredErrorPool(weights)
    table = table_of(weights, pool, QuantizationConfig(bits=7, placement="lloyd"))
    assert table.widths == (7,)
    widths = (7, 7, 7)
    divergence = float(pool.evaluate([table.candidate(widths)], range(3))[0])
    assert fixed(table, pool, 7) == Trial(widths, table.payload(widths), divergence)


def plain_table(sizes, divergence, base=0.0):
    sizes, divergence = np.array(sizes), np.array(divergence, float)
    layers, widths = sizes.shape
    return SensitivityTable(tuple(map(str, range(layers))), tuple(range(1, widths + 1)), (), sizes, divergence, base)


def test_lagrangian_assignments_are_the_best_of_all_at_their_bytes():
    generator = np.random.default_rng(2)
    table = plain_table(np.cumsum(generator.integers(5, 50, (3, 4)), 1),
                        9 - np.cumsum(generator.uniform(0.1, 1, (3, 4)), 1))
    everything = [(a, b, c) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5)]
    found = allocations(table)
    assert len(found) >= 4
    assert found[0] == (1, 1, 1) and found[-1] == (4, 4, 4)
    for widths in found:
        rivals = [w for w in everything if table.payload(w) <= table.payload(widths)]
        assert table.predicted(widths) == pytest.approx(min(table.predicted(w) for w in rivals))


def test_failed_widths_are_never_allocated():
    table = plain_table([[10, 20, 30], [10, 20, 30]], [[np.nan, 2, 1], [5, np.inf, 1]])
    assert all(widths[0] != 1 and widths[1] != 2 for widths in allocations(table))
    assert lagrangian(plain_table([[10, 20]], [[np.nan, np.nan]]), 1.0) == (2,)


def test_warm_starts_come_nearest_to_the_limit_first_and_contain_uniform_widths():
    table = plain_table([[10, 20, 30], [100, 200, 300]], [[1.4, 0.6, 0.1], [1.6, 0.5, 0.1]])
    goal = WithinDivergence(1.1, table.base)
    starts = warm_starts(table, goal, 100)
    assert {(1, 1), (2, 2), (3, 3)} <= set(starts) and len(starts) == len(set(starts))
    assert starts[0] == (2, 2)
    assert warm_starts(table, WithinBytes(330.0), 1) == [(3, 3)]
    assert warm_starts(table, goal, 2) == starts[:2]


def test_the_front_holds_exactly_what_no_other_beats():
    trials = [Trial((w,), size, divergence) for w, size, divergence in
              ((1, 10, 5.0), (2, 20, 4.0), (3, 20, 3.0), (4, 30, 3.0), (5, 40, 1.0), (6, 50, math.inf), (7, 45, 1.5))]
    front = pareto(trials)
    assert [t.widths[0] for t in front] == [1, 3, 5]
    assert WithinDivergence(4.5, 0.0).pick(trials).widths == (3,)
    assert WithinDivergence(3.0, 0.0).pick(trials).widths == (3,)


def test_pick_without_any_within_the_limit_takes_the_least_divergence_and_warns(caplog):
    trials = [Trial((1,), 10, 5.0), Trial((2,), 20, 4.0)]
    with caplog.at_level(logging.WARNING):
        assert WithinDivergence(1.0, 0.0).pick(trials).widths == (2,)
    assert "no assignment" in caplog.text


def test_pick_of_failures_alone_is_an_error():
    with pytest.raises(ValueError, match="max_bits"):
        WithinDivergence(1.0, 0.0).pick([make_trial((1,), 5, np.nan)])


def test_within_bytes_the_least_divergence_is_taken_and_else_the_fewest_bytes_with_a_warning(caplog):
    trials = [Trial((1,), 10, 5.0), Trial((2,), 20, 4.0), Trial((3,), 25, 4.5), Trial((4,), 30, 1.0)]
    assert WithinBytes(29.0).pick(trials).widths == (2,)
    assert not caplog.text
    assert WithinBytes(9.0).pick(trials).widths == (1,)
    assert "no assignment" in caplog.text


def run_search(search, divergence):
    while not search.finished:
        search.tell([make_trial(w, 100 * sum(w), divergence(w)) for w in search.ask()])
    return search.trials


def test_a_search_repeats_nothing_and_keeps_its_budget():
    starts = [(3, 3, 3), (3, 4, 3), (2, 3, 3)]
    trials = run_search(WidthSearch(3, (1, 6), 20, 0, starts), lambda w: sum(4.0**-b for b in w))
    assert [t.widths for t in trials[:3]] == starts
    assert len({t.widths for t in trials}) == len(trials) == 20


def test_a_search_of_a_small_space_ends_when_it_is_exhausted():
    trials = run_search(WidthSearch(2, (1, 2), 50, 0, [(1, 1)]), lambda w: 1.0 / sum(w))
    assert {t.widths for t in trials} == {(1, 1), (1, 2), (2, 1), (2, 2)} and len(trials) == 4


def test_seeds_decide_a_search():
    def widths(seed):
        search = WidthSearch(6, (1, 8), 16, seed, [(4,) * 6, (3,) * 6, (5,) * 6])
        return [t.widths for t in run_search(search, lambda w: 1 / sum(w))]

    assert widths(0) == widths(0)
    assert widths(0) != widths(1)


@pytest.mark.parametrize("concurrent", [1, 3, 8])
def test_neither_order_of_arrival_nor_concurrency_changes_a_search(concurrent):
    def divergence(widths):
        return sum((l + 1) * 4.0**-b for l, b in enumerate(widths))

    starts = [(3, 3, 3), (3, 4, 3), (2, 3, 3), (4, 4, 4), (5, 5, 5)]
    expected = run_search(WidthSearch(3, (1, 6), 17, 0, starts), divergence)
    searcher = RoundSearcher(WidthSearch(3, (1, 6), 17, 0, starts), concurrent)
    generator, running, started = np.random.default_rng(concurrent), {}, 0
    while not searcher.search.finished:
        config = searcher.suggest(str(started))
        if config is not None:
            running[str(started)] = config["widths"]
            started += 1
            assert len(running) <= concurrent
        if running and (config is None or generator.random() < 0.4):
            trial = generator.choice(sorted(running))
            widths = running.pop(trial)
            searcher.on_trial_complete(trial, {"bytes": 100 * sum(widths), "divergence": divergence(widths)})
    assert searcher.search.trials == expected
    assert searcher.suggest("one more") == Searcher.FINISHED


def test_a_search_survives_failures():
    trials = run_search(WidthSearch(3, (1, 6), 12, 0, [(1, 1, 1), (2, 2, 2)]), lambda w: np.nan if min(w) < 3 else 1.0)
    assert len(trials) == 12 and math.isinf(trials[0].divergence)


def test_a_sweep_finds_no_worse_than_its_warm_starts(weights, tmp_path, caplog):
    pool = SquaredErrorPool(weights, bad=(1, 2))
    table = table_of(weights, pool)
    goal = tolerated(table, CONFIG)
    trials = sweep(table, pool, CONFIG, goal, 0, tmp_path)
    assert len(trials) == CONFIG.trials
    assert trials == sweep(table, SquaredErrorPool(weights, bad=(1, 2)), CONFIG, goal, 0, tmp_path)
    chosen = goal.pick(trials)
    assert chosen.divergence <= goal.limit
    for bits in table.widths:
        rival = fixed(table, pool, bits)
        assert not (rival.divergence <= goal.limit and rival.bytes < chosen.bytes)
    assert not list(tmp_path.iterdir())
    failed = [t for t in trials if t.widths[1] == 2]
    assert all(math.isinf(t.divergence) for t in failed) and chosen not in failed


def test_one_trial_is_enough(weights, tmp_path):
    pool = SquaredErrorPool(weights)
    config = QuantizationConfig(trials=1, tolerance=100.0)
    table = table_of(weights, pool)
    assert len(sweep(table, pool, config, tolerated(table, config), 0, tmp_path)) == 1


def test_processes_of_trials_import_no_torch():
    code = "import sys, de_ray.quantization.trial, de_ray.quantization.choice; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def as_tune_does(interrupted):
    """Take the signal, and give way to the handler before once it has come."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, before))
    if interrupted:
        signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_tune_took_is_raised_though_all_trials_may_be_there():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals_restored():
        as_tune_does(interrupted=True)
    assert signal.getsignal(signal.SIGINT) is before


def test_tunes_handlers_do_not_outlive_it():
    before = signal.getsignal(signal.SIGINT)
    with signals_restored():
        as_tune_does(interrupted=False)
    assert signal.getsignal(signal.SIGINT) is before
