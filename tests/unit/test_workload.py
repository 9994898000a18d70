"""How many threads a run takes when nothing says so."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from de_ray import workload
from de_ray.config import Config, RefitConfig, SweepConfig
from de_ray.problem.custom import problem_from_model
from de_ray.schema import CONFIG_FILE, compose, saved_config
from de_ray.session import run_session
from de_ray.sweep.trial import own_config
from de_ray.workload import with_threads
from tests.networks import Counts

CORES = 8


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(workload, "available_threads", lambda: CORES)


def chosen(model, inputs, config=None):
    return with_threads(problem_from_model(model, inputs), config or Config()).threads


def perceptron(width):
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def test_a_small_network_has_one_thread_and_a_large_one_all_cores():
    inputs = torch.randn(10, 784)
    few, some, many = (chosen(perceptron(width), inputs) for width in (100, 3_000, 20_000))
    assert few == 1 and 1 < some < CORES and many == CORES


def test_activations_count_as_parameters_do_and_so_does_the_batch():
    model, inputs = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 3)), torch.randn(10, 1, 28, 28)
    single = Config(refit=RefitConfig(batch=1))
    assert chosen(model, inputs) > 1 == chosen(model, inputs, single)


def test_whole_numbers_among_the_parameters_are_no_hindrance():
    class Picks(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(784, 3_000), nn.Linear(784, 10))
            self.order = nn.Parameter(torch.arange(784), requires_grad=False)

        def forward(self, x):
            return self[1](self[0](x).relu()[:, self.order])

    assert 1 < chosen(Picks(), torch.randn(10, 784)) < CORES


def test_a_count_that_is_given_stays():
    assert chosen(perceptron(20_000), torch.randn(10, 784), Config(threads=3)) == 3


def test_where_there_is_one_core_nothing_is_weighed(monkeypatch):
    monkeypatch.setattr(workload, "available_threads", lambda: 1)
    monkeypatch.setattr(workload, "bytes_an_input", lambda run: pytest.fail("measured for nothing"))
    assert chosen(perceptron(20_000), torch.randn(10, 784)) == 1


def test_workers_that_share_the_cores_have_one_each():
    assert chosen(perceptron(20_000), torch.randn(10, 784), Config(refit=RefitConfig(workers=2))) == 1


def test_trials_that_share_the_cores_have_one_each():
    sweep = SweepConfig(space={"seed": [0, 1]})
    base = Config(sweep=sweep)
    assert chosen(perceptron(20_000), torch.randn(10, 784), base) is None
    assert own_config(base, sweep, {"seed": 1}).threads == 1
    assert own_config(replace(base, threads=2), sweep, {"seed": 1}).threads == 2


def test_counting_leaves_the_teacher_and_its_buffers_alone():
    problem = problem_from_model(Counts(4), torch.randn(10, 4))
    before = problem.teacher.passes.clone()
    with_threads(problem, Config())
    assert torch.equal(problem.teacher.passes, before)
    assert not any(parameter.requires_grad for parameter in problem.teacher.parameters())


def test_a_run_keeps_what_was_chosen_for_where_it_continues(tmp_path, cache):
    quick = ["pool=serial", "tracking.enabled=false", "problem.teacher.epochs=1", "evolution.cycles=1",
             "evolution.population=2", "evolution.elite=1", "evolution.tournament=1", "evolution.generations=0",
             "refit.steps=1", "refit.final_steps=1", "quantization.bits=4", "quantization.refit_steps=0",
             "refit.batch=1000"]
    run_session(compose(quick), tmp_path)
    assert saved_config(tmp_path / CONFIG_FILE).threads == 1
