"""Distillation by two workers against one, in Ray Train's processes."""

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from torch import nn

from de_ray.config import PoolConfig, RefitConfig
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.refit.build import build_refit
from de_ray.refit.parallel import require_gpus, worker_gpus
from de_ray.student import Student
from tests.networks import mlp_problem
from tests.warm import warm_workers


@pytest.fixture(scope="module")
def no_session():
    """Refit starts Ray itself."""
    ray.shutdown()
    with warm_workers():
        yield
    ray.shutdown()


def refitted(workers):
    """Between cycles by one process, in the end by so many, which go on from the first one's moments; each worker's
    batch goes in parts."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 20_000), nn.ReLU(), nn.Linear(20_000, 3))  # 80 kB a sample, 13 fit
    problem = problem_from_model(wide, torch.randn(200, 8), divergence="mse")
    student = Student(problem.teacher, problem.layers)
    student.commit(tuple(ZeroingSet(i, np.arange(0, layer.size, 2)) for i, layer in enumerate(problem.layers)))
    before = mean_divergence(problem, student.module, problem.calibration)
    config = RefitConfig(steps=30, final_steps=30, batch=32, learning_rate=1e-3, memory_mb=1)
    generator = torch.Generator().manual_seed(0)
    first = build_refit(student, problem, config)
    first.after_cycle(generator)
    refit = build_refit(student, problem, dataclasses.replace(config, workers=workers))
    refit.load_state(first.state())
    refit.final(0, 30, generator)
    after = mean_divergence(problem, student.module, problem.calibration)
    assert after < before
    return student, refit.state(), generator.get_state(), after


def test_two_workers_refit_as_one_does(no_session):
    one, moments, drawn, divergence = refitted(1)
    two, moments_of_two, drawn_by_two, divergence_of_two = refitted(2)
    assert divergence_of_two == pytest.approx(divergence, rel=1e-3)
    for a, b in zip(one.weights, two.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert torch.equal(a != 0, b != 0), "masks are held"
    assert moments.keys() == moments_of_two.keys()
    for name, moment in moments.items():
        torch.testing.assert_close(moments_of_two[name], moment, rtol=1e-2, atol=1e-6)
    assert torch.equal(drawn, drawn_by_two), "later draws go on from the same place"


class InThisProcess:
    """In place of Ray's trainer, whose workers take half a minute to start: a single worker, and what it raises."""

    def __init__(self, work, train_loop_config, **_):
        self.work, self.job = work, train_loop_config

    def fit(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            self.work(self.job)
        finally:
            torch.distributed.destroy_process_group()


@pytest.fixture
def in_this_process(no_session, monkeypatch):
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("de_ray.refit.parallel.TorchTrainer", InThisProcess)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))


@pytest.mark.parametrize(("kind", "evaluators", "left"), [
    ("ray", None, 0.4), ("serial", None, 1.0), ("ray", 0.0, 1.0), ("ray", 1.0, 1.0), ("ray", 0.5, 1.0),
    ("ray", 0.3, 0.1)])
def test_no_two_workers_have_room_on_one_gpu_beside_its_evaluators(kind, evaluators, left):
    assert worker_gpus(PoolConfig(kind, gpus=evaluators)) == pytest.approx(left)


def test_more_workers_than_gpus_are_refused_rather_than_waited_for(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0, "CPU": 8.0})
    require_gpus(1, PoolConfig())
    with pytest.raises(ValueError, match=r"refit\.workers=2: expected at most 1, the number of the cluster's GPUs"):
        require_gpus(2, PoolConfig())


@pytest.mark.parametrize(("workers", "pool", "message"), [
    (4, PoolConfig("serial"), None), (4, PoolConfig(), None), (4, PoolConfig(actors=4), None),
    (4, PoolConfig(gpus=0.0, actors=9), None), (2, PoolConfig(gpus=1.0, actors=2), None),
    (4, PoolConfig(gpus=0.3, actors=12), None),
    (4, PoolConfig(actors=1), r"pool\.actors=1: expected 0, or at least 4"),
    (4, PoolConfig(gpus=0.3, actors=4), r"pool\.actors=4: expected 0, or at least 12"),
    (1, PoolConfig(gpus=1.0), r"refit\.workers=1: expected at most 0, .* pool\.gpus=1 "),
    (3, PoolConfig(gpus=1.0, actors=2), r"refit\.workers=3: expected at most 2"),
    (2, PoolConfig(gpus=0.5), r"refit\.workers=2: expected at most 0"),
])
def test_evaluators_that_leave_no_gpu_or_room_for_two_workers_on_one_are_refused(workers, pool, message, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0, "CPU": 8.0})
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        require_gpus(workers, pool)


def test_a_divergence_that_explodes_is_the_same_error_as_with_one_worker(in_this_process):
    problem = mlp_problem()
    student = Student(problem.teacher, problem.layers)
    refit = build_refit(student, problem, RefitConfig(steps=20, batch=32, workers=2, learning_rate=1e30))
    with pytest.raises(FloatingPointError, match="refit.learning_rate"):
        refit.after_cycle(torch.Generator().manual_seed(0))


def test_another_workers_exploding_divergence_is_waited_for_and_told(in_this_process, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda loss: loss.add_(float("nan")))
    problem = mlp_problem()
    refit = build_refit(Student(problem.teacher, problem.layers), problem, RefitConfig(steps=2, batch=32, workers=2))
    with pytest.raises(FloatingPointError, match=r"divergence nan after 2 steps; lower refit\.learning_rate"):
        refit.after_cycle(torch.Generator().manual_seed(0))
