"""A search space's points, the rungs on which trials are compared, and which trial is best."""

import pytest
from omegaconf.errors import OmegaConfBaseException

from de_ray.config import SweepConfig
from de_ray.schema import compose
from de_ray.sweep.conclude import LOWER_IS_BETTER, choose, front
from de_ray.sweep.rungs import EqualSparsity, crossings, halvings, rungs
from de_ray.sweep.space import configure, label, listed_sparsities, points
from de_ray.sweep.trial import bundles, own_config

SPACE = {"evolution": {"sparsity": [0.8, 0.9]}, "quantization": {"bits": [3, 4]},
         "refit": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "steps": 7}}


def test_lists_are_combined_and_ranges_drawn_for_each_combination():
    found = points(SPACE, 3, 0)
    assert len(found) == 2 * 2 * 3
    assert {(p["evolution.sparsity"], p["quantization.bits"]) for p in found} == {(s, b) for s in (0.8, 0.9)
                                                                                  for b in (3, 4)}
    rates = [p["refit.learning_rate"] for p in found]
    assert len(set(rates)) == 12 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert min(rates) < 1e-3 and max(rates) > 3e-3 and all(p["refit.steps"] == 7 for p in found)
    assert found == points(SPACE, 3, 0) != points(SPACE, 3, 1)


@pytest.mark.parametrize("log", [False, True])
def test_a_range_of_whole_numbers_gives_whole_numbers_both_ends_included(log):
    space = {"refit": {"steps": {"low": 1, "high": 3, "log": log}}}
    assert {point["refit.steps"] for point in points(space, 60, 0)} == {1, 2, 3}


def test_without_ranges_samples_are_not_repeated():
    assert points({"seed": [0, 1]}, 5, 0) == [{"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize(("space", "message"), [
    ({"problem": {"name": ["digits"]}}, "problem.name"), ({"pool": {"actors": [1]}}, "pool.actors"),
    ({"seed": []}, "at least one"), ({"refit": {"steps": {"low": 3, "high": 3}}}, "low"),
    ({"refit": {"steps": {"low": 0, "high": 3, "log": True}}}, "low"),
    ({"refit": {"steps": {"low": 1, "high": 3, "lgo": True}}}, "log: true"),
    ({"refit": {"steps": {"low": "a", "high": 3}}}, "NUMBER")])
def test_a_space_that_cannot_be_searched_is_told_by_its_key(space, message):
    with pytest.raises(ValueError, match=message):
        points(space, 1, 0)


@pytest.mark.parametrize("point", [{"evolution.sparsity": 1.5}, {"evolution.sparsty": 0.5}, {"seed": "many"}])
def test_a_point_is_checked_as_any_configuration(point):
    with pytest.raises((ValueError, OmegaConfBaseException)):
        configure(compose([]), point)


def test_targets_of_layers_are_searched_whatever_their_pattern_and_beside_those_there_are():
    base = compose(["+evolution.targets.fc3=0.5"])
    space = {"evolution": {"targets": {"fc1": [0.9, 0.95], "body.0.*": {"low": 0.5, "high": 0.8}}}}
    found = [configure(base, point).evolution.targets for point in points(space, 1, 0)]
    assert [targets["fc1"] for targets in found] == [0.9, 0.95]
    assert all(targets["fc3"] == 0.5 and 0.5 <= targets["body.0.*"] <= 0.8 for targets in found)
    with pytest.raises(ValueError, match=r"evolution\.targets\.fc1=1\.5"):
        configure(base, {"evolution.targets.fc1": 1.5})


def test_a_trial_is_one_untracked_compression_in_its_own_process_unless_it_is_given_actors():
    base = compose(["+sweep=tune", "tracking.uri='http://user:hunter2@host'"])
    mine = own_config(base, base.sweep, {"evolution.sparsity": 0.7})
    assert (mine.evolution.sparsity, mine.sweep, mine.pool.kind, mine.tracking.enabled) == (0.7, None, "serial", False)
    assert mine.tracking.uri is None
    base.sweep.actors = 2
    mine = own_config(base, base.sweep, {})
    assert (mine.pool.kind, mine.pool.actors, mine.pool.gpus) == ("ray", 2, 0.0)
    assert bundles(base, base.sweep) == [{"CPU": 1.0}] * 3


@pytest.mark.parametrize(("device", "gpus", "found"), [
    ("auto", 0.0, "cpu"), ("cpu", 0.0, "cpu"), ("auto", 0.25, "cuda"), ("cuda:1", 1.0, "cuda"), ("cpu", 1.0, "cpu")])
def test_a_trial_takes_no_gpu_but_what_is_reserved_for_it(device, gpus, found):
    base = compose(["+sweep=tune", f"sweep.gpus={gpus}", f"device={device}"])
    assert own_config(base, base.sweep, {}).device == found


def test_a_sweep_on_gpus_that_reserves_none_says_what_to_set():
    base = compose(["+sweep=tune", "device=cuda"])
    with pytest.raises(ValueError, match=r"device='cuda'.*sweep\.gpus"):
        own_config(base, base.sweep, {})


def test_labels_are_short():
    assert label({"evolution.sparsity": 0.9, "quantization.bits": 3}) == "sparsity 0.9, bits 3"


def test_rungs_are_sparsities_at_which_the_density_was_halved():
    assert [round(1 - 2.0**-rung, 4) for rung in rungs(SweepConfig(space=SPACE))] == [0.5, 0.75, 0.9375, 0.9961, 1.0]


def test_a_divergence_is_interpolated_at_each_rung_that_a_cycle_passes():
    assert list(crossings([1.0, 2.0, 4.0], (0.5, 1.0), (2.5, 16.0))) == [(1.0, pytest.approx(2.0)),
                                                                         (2.0, pytest.approx(8.0))]
    assert list(crossings([1.0], (0.0, 0.0), (2.0, 3.0))) == [(1.0, 1.5)]  # from the teacher, whose divergence is 0
    assert list(crossings([1.0], (1.0, 0.1), (1.0, 0.2))) == list(crossings([1.0], (1.0, 0.1), (1.5, 0.2))) == []
    assert halvings(0.75) == 2.0


class Trial:
    def __init__(self, number):
        self.trial_id, self.config = str(number), {"number": number}


def test_the_worse_of_rivals_is_stopped_at_a_rung_and_other_aims_are_no_rivals():
    scheduler = EqualSparsity(SweepConfig(space=SPACE), [0.8, 0.8, 0.8, 0.95])
    trials = [Trial(number) for number in range(4)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    told = [scheduler.on_trial_result(None, trial, {"halvings": 1.0, "divergence": divergence})
            for trial, divergence in zip(trials, (0.1, 0.3, 0.05, 9.0), strict=True)]
    assert told == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE"]
    # Cycles between rungs decide nothing.
    assert scheduler.on_trial_result(None, trials[0], {"cycle": 3, "divergence": 99.0}) == "CONTINUE"


def test_a_range_of_sparsities_makes_all_trials_rivals():
    assert listed_sparsities(SPACE) and not listed_sparsities({"evolution": {"sparsity": {"low": 0.5, "high": 0.9}}})
    scheduler = EqualSparsity(SweepConfig(space=SPACE), [None, None])
    trials = [Trial(number) for number in range(2)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    assert [scheduler.on_trial_result(None, trial, {"halvings": 1.0, "divergence": divergence})
            for trial, divergence in zip(trials, (0.1, 0.3), strict=True)] == ["CONTINUE", "STOP"]


def rows(*pairs):
    return [{"number": number, "ratio": ratio, "metric": metric} for number, (ratio, metric) in enumerate(pairs)]


def test_the_front_holds_what_no_other_trial_beats_in_both():
    given = rows((10, 99), (20, 98), (15, 97), (40, 90), (40, 91))
    assert [row["number"] for row in front(given, lower=False)] == [4, 1, 0]
    assert [row["number"] for row in front(rows((10, 0.1), (20, 0.2), (15, 0.3)), lower=True)] == [1, 0]


def test_the_best_is_the_smallest_file_that_is_close_to_the_teacher_or_the_best_metric_where_none_is(caplog):
    given = rows((10, 99), (20, 98.5), (40, 90))
    assert choose(given, 99.0, False, 0.01)["number"] == 1
    assert not caplog.messages
    assert choose(given, 110.0, False, 0.01)["number"] == 0 and "no trial is within sweep.tolerance" in caplog.text
    assert choose(rows((50, 0), (60, 9)), 0.0, "false_80" in LOWER_IS_BETTER, 0.01)["number"] == 0
    assert choose(rows((10, 0.001), (20, 0.02), (30, 0.005)), 0.0, True, 0.01)["number"] == 2
    assert choose(rows((10, float("nan")), (20, 5.0)), 99.0, False, 0.01)["number"] == 1
