"""Schedules that take a number of minutes."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import de_ray
from de_ray import costs as costs_module
from de_ray import minutes
from de_ray.config import Config, EvolutionConfig, QuantizationConfig, RefitConfig, SweepConfig
from de_ray.costs import Costs, measured, steps
from de_ray.minutes import BATCHES, FILE, with_minutes
from de_ray.problem.custom import problem_from_model
from de_ray.results import STUDENT_FILE
from de_ray.schema import CONFIG_FILE, compose, saved_config
from de_ray.session import run_session
from tests.networks import Counts

SLOW = Costs(any_step=0.1, an_input=0.03, candidate=2.0, other=10.0, inputs=4000)
"""Of which the default schedule takes hours."""
TINY = {"evolution": EvolutionConfig(cycles=8, generations=1, population=4, elite=1, saliency_inputs=16),
        "refit": RefitConfig(batch=16, steps=6, final_steps=8), "quantization": QuantizationConfig(refit_steps=4)}


def network(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4)).eval()


@pytest.fixture
def problem():
    return problem_from_model(network(), torch.randn(40, 16))


@pytest.fixture
def costs(monkeypatch):
    """Takes the place of what is measured."""
    def set_costs(found):
        monkeypatch.setattr(minutes, "measured", lambda problem, config: found)
    set_costs(SLOW)
    return set_costs


def fitted(problem, number, **groups):
    return with_minutes(problem, Config(minutes=number, **groups))


@pytest.mark.parametrize("number", [2, 4, 10, 30, 60, 120, 240, 480])
def test_a_schedule_takes_the_minutes_that_there_are_and_no_more(problem, costs, number):
    assert SLOW.total(Config()) > 60 * 300
    found = fitted(problem, number)
    taken = SLOW.total(found)
    assert taken <= 60 * number * 1.02
    # It is the numbers of whole cycles, and of inputs that were asked for, that leave some of them.
    assert taken >= 60 * number * 0.8 or found.refit.batch * steps(found) >= 0.98 * Config().refit.batch * steps(
        Config())


def test_more_minutes_are_never_fewer_inputs_and_cycles(problem, costs):
    found = [fitted(problem, number) for number in (8, 15, 30, 60, 120, 240, 480, 960)]
    for fewer, more in zip(found, found[1:], strict=False):
        assert fewer.evolution.cycles <= more.evolution.cycles <= 20
        assert fewer.evolution.population <= more.evolution.population <= 12
        assert fewer.refit.batch * steps(fewer) <= more.refit.batch * steps(more) * 1.02
    assert found[-1] == Config()


def test_small_batches_take_the_place_of_large_ones_and_no_batch_grows(problem, costs):
    assert fitted(problem, 10).refit.batch == BATCHES[0]
    assert fitted(problem, 2, refit=RefitConfig(batch=8)).refit.batch == 8
    shared = fitted(problem, 10, refit=RefitConfig(batch=120, workers=3))
    assert shared.refit.batch == 120  # which three workers can share


def test_where_large_steps_would_be_few_batches_are_smaller_still(problem, costs):
    """A network of seconds an input has its minutes too: in few cycles, without candidates, by steps of few inputs."""
    few, least = fitted(problem, 4), fitted(problem, 0.5)
    assert BATCHES[-1] < few.refit.batch < BATCHES[0] and few.evolution.generations == 1
    assert least.refit.batch == BATCHES[-1] and steps(least) == pytest.approx(0.05 * steps(Config()), rel=0.1)
    assert least.evolution.generations == 0 and least.evolution.cycles == 2 and least.evolution.saliency_inputs < 512
    assert fitted(problem, 0.5, refit=RefitConfig(batch=2)).refit.batch == 2
    assert fitted(problem, 0.5, refit=RefitConfig(batch=64, workers=8)).refit.batch == 8  # an input for each of them


def test_large_networks_are_timed_by_few_inputs(problem, monkeypatch):
    taken = []
    monkeypatch.setattr(costs_module, "_step_seconds", lambda a, b, c, batch: taken.append(batch) or 0.1 + 2.0 * batch)
    monkeypatch.setattr(costs_module, "_pass_seconds", lambda a, b, inputs: taken.append(len(inputs)) or 1.0)
    assert measured(problem, Config(minutes=10)).an_input == pytest.approx(2.0)
    assert taken == [1, 4, 14]
    taken.clear()
    measured(problem, Config(minutes=0.1))
    assert taken == [1, 2, 2]
    taken.clear()
    measured(problem, Config(minutes=1000))
    assert taken == [1, 32, 32]


def test_saliencies_cost_no_more_than_there_are_inputs(problem):
    few = replace(SLOW, inputs=64)
    assert few.search(Config()) < SLOW.search(Config())
    assert few.search(Config()) == few.search(Config(evolution=EvolutionConfig(saliency_inputs=64)))
    assert measured(problem, Config()).inputs == len(problem.inputs)


def test_a_search_that_was_small_stays_and_so_does_a_baseline(problem, costs):
    small = EvolutionConfig(cycles=3, population=2, elite=1, tournament=1, generations=1, saliency_inputs=64)
    assert fitted(problem, 1, evolution=small).evolution == small
    assert fitted(problem, 1, evolution=EvolutionConfig(generations=0)).evolution.generations == 0


def test_a_refit_keeps_a_step_where_it_had_any(problem, costs):
    few = RefitConfig(steps=1, final_steps=8)
    assert fitted(problem, 0.01, refit=few).refit.steps == fitted(problem, 0.01, refit=few).refit.final_steps == 1
    assert fitted(problem, 0.01, refit=RefitConfig(steps=0)).refit.steps == 0


def test_what_has_no_distillation_is_cut_in_its_search(problem, costs):
    closed = fitted(problem, 6, refit=RefitConfig(method="least_squares"))
    assert closed.evolution.cycles < 20 and closed.refit.method == "least_squares"


def test_refits_in_closed_form_count_and_are_timed(problem, costs):
    config = Config(refit=RefitConfig(method="obs"))
    assert measured(problem, Config()).closed == 0 < measured(problem, config).closed
    slow = replace(SLOW, closed=60.0)
    assert slow.total(config) == pytest.approx(SLOW.total(config) + 20 * 60)
    costs(slow)
    found = fitted(problem, 20, refit=config.refit)
    assert found.evolution.cycles < 20 and slow.total(found) <= 60 * 20 * 1.02


def test_what_measuring_takes_is_part_of_the_minutes(problem, monkeypatch):
    clock = iter((0.0, 600.0))
    monkeypatch.setattr(minutes, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(minutes, "measured", lambda problem, config: SLOW)
    assert SLOW.total(fitted(problem, 70)) <= 60 * 60 * 1.02


def test_a_schedule_that_was_kept_is_of_its_own_network_alone(problem, costs, tmp_path):
    first = with_minutes(problem, Config(minutes=20.0), tmp_path)
    costs(replace(SLOW, any_step=1.0))
    assert with_minutes(problem, Config(minutes=20.0), tmp_path) == first
    other = problem_from_model(network(20), torch.randn(40, 16))
    assert with_minutes(other, Config(minutes=20.0), tmp_path) != first


def test_a_schedule_that_cannot_be_short_enough_is_warned_of(problem, costs, caplog):
    caplog.set_level(logging.WARNING)
    fitted(problem, 0.5)
    assert "minutes=0.5" in caplog.text
    caplog.clear()
    fitted(problem, 60)
    assert not caplog.text


def test_what_is_measured_leaves_the_problem_and_random_draws_as_they_are():
    problem = problem_from_model(Counts(16), torch.randn(40, 16))
    weight, passes, state = problem.teacher.layer.weight.clone(), problem.teacher.passes.clone(), torch.get_rng_state()
    found = measured(problem, Config())
    assert found.any_step >= 0 and found.an_input >= 0 and 0 < found.step(64) and 0 < found.candidate < found.other
    assert torch.equal(problem.teacher.layer.weight, weight) and torch.equal(problem.teacher.passes, passes)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_timed_keeps_its_schedule_and_is_told_of(problem, monkeypatch, caplog):
    def fails(problem, config):
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(minutes, "measured", fails)
    assert fitted(problem, 1) == Config()
    assert "minutes=1: steps could not be timed" in caplog.text and "no memory" in caplog.text


def test_a_network_without_gradients_is_told_of_by_the_run_itself():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match="no gradient"):
        de_ray.compress(Closed(), torch.randn(40, 16), minutes=1)


def test_a_compression_that_goes_on_keeps_the_schedule_that_it_began_with(tmp_path, costs, monkeypatch):
    inputs, costs_then = torch.randn(40, 16), replace(SLOW, any_step=1.0)

    def compressed(folder, number):
        return de_ray.compress(network(), inputs, minutes=number, folder=folder, progress=False, **TINY)

    whole = compressed(tmp_path / "whole", 1)
    cycles = whole.report["schedule"]["evolution"]["cycles"]
    assert cycles < 8 and len(whole.report["history"]) == cycles + 1

    from de_ray import pipeline
    evolve = pipeline.evolve

    def ended(problem, config, student, pool, folder, fingerprint, on_record, limit, units):
        def stop(record, total):
            on_record(record, total)
            if record.cycle == 2:
                raise KeyboardInterrupt
        return evolve(problem, config, student, pool, folder, fingerprint, stop, limit, units)

    monkeypatch.setattr(pipeline, "evolve", ended)
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "cut", 1)
    monkeypatch.setattr(pipeline, "evolve", evolve)
    costs(costs_then)  # another time, the machine has other work beside
    assert compressed(tmp_path / "cut", 1).data == whole.data

    kept = (tmp_path / "cut" / FILE).read_bytes()
    with pytest.raises(ValueError, match="refit"):  # other minutes are other steps
        compressed(tmp_path / "cut", 1.5)
    assert (tmp_path / "cut" / FILE).read_bytes() == kept


def test_a_run_saves_its_schedule_in_place_of_the_minutes(tmp_path, cache):
    quick = ["pool=serial", "tracking.enabled=false", "problem.teacher.epochs=1", "evolution.cycles=10",
             "evolution.population=4", "evolution.elite=1", "evolution.generations=1", "refit.steps=200",
             "refit.final_steps=4000", "quantization.bits=4", "quantization.refit_steps=200", "minutes=0.01"]
    run_session(compose(quick), tmp_path)
    saved = saved_config(tmp_path / CONFIG_FILE)
    assert saved.minutes is None and saved.refit.final_steps < 4_000 and saved.refit.batch == BATCHES[-1]
    data = (tmp_path / STUDENT_FILE).read_bytes()
    run_session(compose(quick), tmp_path)  # the same command once more keeps to what was chosen
    assert saved_config(tmp_path / CONFIG_FILE) == saved and (tmp_path / STUDENT_FILE).read_bytes() == data


@pytest.mark.parametrize(("groups", "message"), [
    ({"minutes": 0.0}, "minutes=0.0: expected a number above 0"),
    ({"minutes": -1.0}, "minutes=-1.0"),
    ({"minutes": 5.0, "sweep": SweepConfig(space={"seed": [0, 1]})}, "minutes=5.0: expected null beside a sweep"),
])
def test_minutes_out_of_range_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        Config(**groups)
