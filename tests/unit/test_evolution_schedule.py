"""The course of density over cycles, and targets by layer."""

import numpy as np
import pytest

from de_ray.config import Config, EvolutionConfig, RefitConfig
from de_ray.evolution.schedule import Targets, density_at, next_progress, progress_at
from de_ray.evolve import settled
from de_ray.problem.base import Layer

LAYERS = (Layer("conv", (10, 10)), Layer("fc1", (30, 10)), Layer("fc2", (10, 60)))


def course(config, rises=()):
    progress, found = 0.0, []
    for cycle in range(config.cycles):
        progress = next_progress(config, cycle, progress, list(rises)[:cycle])
        found.append(progress)
    return found


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic", "adaptive"])
def test_density_falls_in_each_cycle_and_ends_at_the_target(schedule):
    config = EvolutionConfig(schedule=schedule, cycles=9)
    densities = [density_at(schedule, progress, 0.05) for progress in course(config, [1, 5, 0.1, 2, 9, 3, 1, 1])]
    assert (np.diff([1.0, *densities]) < 0).all()
    assert densities[-1] == pytest.approx(0.05)


def test_the_adaptive_schedule_takes_smaller_steps_where_divergence_climbs():
    config = EvolutionConfig(schedule="adaptive", cycles=10)
    flat = next_progress(config, 5, 0.5, [1.0, 1.0, 1.0])
    steep = next_progress(config, 5, 0.5, [1.0, 1.0, 10.0])
    gentle = next_progress(config, 5, 0.5, [1.0, 1.0, 0.1])
    assert steep < flat < gentle


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_last_cycle_leaves_the_survivors_that_were_asked_for(allocation):
    targets = Targets(EvolutionConfig(sparsity=0.9, allocation=allocation), LAYERS)
    budget = targets.budget(1.0, [100, 300, 600])
    assert int(budget.fixed.sum()) + budget.free_total == 900
    if allocation == "uniform":
        assert budget.fixed.tolist() == [90, 270, 540]


def test_a_layers_own_target_binds_it_and_leaves_the_others_to_evolution():
    targets = Targets(EvolutionConfig(sparsity=0.9, targets={"conv": 0.2, "fc2": 0.5}), LAYERS)
    budget = targets.budget(1.0, [100, 300, 600])
    assert budget.bound.tolist() == [True, False, True]
    assert budget.fixed.tolist() == [20, 0, 300]
    assert budget.free_total == 270


def test_a_small_bound_layer_keeps_a_weight():
    for config in (EvolutionConfig(sparsity=0.99, allocation="uniform"), EvolutionConfig(targets={"*": 0.99})):
        targets = Targets(config, [Layer("small", (1, 20)), Layer("large", (100, 20))])
        assert targets.survivors.tolist() == [1, 20]
        assert targets.budget(1.0, [20, 2000]).fixed.tolist() == [19, 1980]
        assert targets.missing([0, 20]).fixed.tolist() == [1, 0]


def test_what_a_student_that_is_sparser_than_asked_for_lacks():
    targets = Targets(EvolutionConfig(sparsity=0.9, targets={"conv": 0.2, "fc2": 0.5}), LAYERS)
    missing = targets.missing([70, 25, 400])
    assert (missing.fixed.tolist(), missing.free_total, missing.total) == ([10, 0, 0], 5, 15)
    assert targets.missing([100, 300, 600]).total == 0


def test_a_target_for_a_layer_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match=r"targets.nope.*conv, fc1, fc2"):
        Targets(EvolutionConfig(targets={"nope": 0.5}), LAYERS)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.9])
def test_the_way_that_a_density_has_come_is_found_again(schedule, progress):
    found = progress_at(schedule, density_at(schedule, progress, 0.1), 0.1)
    assert found == pytest.approx(progress, abs=1e-6)
    assert 0.99 < progress_at(schedule, 0.05, 0.1) < 1  # below its end


def test_without_distillation_the_gradient_proposes_and_the_last_steps_are_small():
    named = EvolutionConfig(criteria=["obs"], schedule="linear")
    for refit, criteria, schedule in ((RefitConfig(), ["fisher", "magnitude"], "exponential"),
                                      (RefitConfig(method="none"), ["fisher", "magnitude", "taylor"], "cubic"),
                                      (RefitConfig(steps=0), ["fisher", "magnitude", "taylor"], "cubic")):
        found = settled(Config(refit=refit))
        assert (found.criteria, found.schedule) == (criteria, schedule)
        assert settled(Config(evolution=named, refit=refit)) == named
