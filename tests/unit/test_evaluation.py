"""Replicas and pools: exact, equal to each other, and left as they were."""

import copy
import os
import pickle
import time

import numpy as np
import pytest
import ray
import torch

from de_ray.config import PoolConfig, QuantizationConfig
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.ray_pool import RayPool
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.choose import choose
from de_ray.student import Student
from tests.networks import branchy_problem, mlp_problem


def random_candidates(problem, count, seed=0):
    """Candidates that zero a tenth of some layers."""
    rng = np.random.default_rng(seed)
    candidates = []
    for _ in range(count):
        layers = sorted(rng.choice(len(problem.layers), rng.integers(1, len(problem.layers) + 1), replace=False))
        candidates.append(tuple(
            ZeroingSet(int(layer), np.sort(rng.choice(problem.layers[layer].size, problem.layers[layer].size // 10 + 1,
                                                      replace=False))) for layer in layers))
    return candidates


def test_a_batch_travels_without_the_others_and_the_teacher_stays_where_it_is():
    problem = mlp_problem()
    setup = ReplicaSetup(problem, 1, "cpu", 1)
    away = setup.for_device("cuda")
    assert (setup.device, away.device) == ("cpu", "cuda") and away.teacher is not problem.teacher
    assert all(torch.equal(one, other) for one, other in zip(setup.batches, away.batches, strict=True))
    size = len(pickle.dumps(away.batches))
    assert size < 2 * problem.calibration.nbytes + 1000 * len(away.batches) < len(pickle.dumps(setup.batches))


@pytest.mark.parametrize(("share", "actors"), [(1.0, 4), (0.6, 4), (0.5, 8), (0.3, 12), (2.0, 2)])
def test_no_actor_is_counted_on_two_gpus(share, actors, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0, "CPU": 64.0})
    pool = RayPool.__new__(RayPool)
    pool._gpus, pool._config = share, PoolConfig()
    assert pool._places() == actors


def naive(problem, candidate):
    """Copy the weights, zero, full forward."""
    model = copy.deepcopy(problem.teacher)
    for change in candidate:
        weight = model.get_submodule(problem.layers[change.layer].name).weight.data
        weight.view(-1)[torch.from_numpy(change.zero)] = 0
    return mean_divergence(problem, model, problem.calibration)


@pytest.mark.parametrize("make", [branchy_problem, mlp_problem])
def test_fitness_equals_that_of_a_zeroed_copy(make):
    problem = make()
    candidates = random_candidates(problem, 8)
    pool = build_pool(problem, PoolConfig(kind="serial", batch=7), Student(problem.teacher, problem.layers))
    fitness = pool.evaluate(candidates, range(pool.batches))
    np.testing.assert_allclose(fitness, [naive(problem, one) for one in candidates], rtol=1e-4)


def test_evaluation_leaves_the_replica_as_it_was():
    problem = branchy_problem()
    replica = Replica(ReplicaSetup(problem, 8, "cpu", 1))
    before = {name: value.clone() for name, value in replica.student.module.state_dict().items()}
    weight = problem.teacher.get_submodule(problem.layers[0].name).weight.detach().numpy()
    quantized = (choose(0, weight, 2, QuantizationConfig()),)
    replica.evaluate([*random_candidates(problem, 5), quantized], [0, 1])
    for name, value in replica.student.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_unchanged_student_diverges_by_exactly_zero():
    problem = mlp_problem()
    replica = Replica(ReplicaSetup(problem, 64, "cpu", 1))
    assert replica.evaluate([()], range(3))[0] == 0.0


def test_a_level_choice_is_evaluated_as_the_weights_that_the_file_decodes_to():
    problem = mlp_problem()
    weight = problem.teacher[0].weight.detach().numpy()
    choice = choose(0, weight, 3, QuantizationConfig())
    model = copy.deepcopy(problem.teacher)
    model[0].weight.data.copy_(torch.from_numpy(choice.to_tensor("w", weight).dequantize()))
    replica = Replica(ReplicaSetup(problem, 256, "cpu", 1))
    assert replica.evaluate([(choice,)], [0])[0] == pytest.approx(mean_divergence(problem, model, problem.calibration))


def test_a_candidate_with_a_nan_is_out_without_touching_the_others():
    problem = mlp_problem()
    replica = Replica(ReplicaSetup(problem, 64, "cpu", 1))
    replica.student.dormant[0].fill_(float("nan"))
    poisoned = (ZeroingSet(0, np.array([1]), np.array([0])),)
    good = (ZeroingSet(0, np.array([1])),)
    fitness = replica.evaluate([good, poisoned, good], [0])
    assert np.isnan(fitness[1]) and fitness[0] == fitness[2] > 0


def test_a_revived_parameter_has_the_value_that_it_had():
    problem = mlp_problem()
    student = Student(problem.teacher, problem.layers)
    original = student.weights[0].data.clone()
    student.commit((ZeroingSet(0, np.array([3, 5, 8])),))
    assert student.survivors == problem.weights - 3 and (student.weights[0].data.view(-1)[[3, 5, 8]] == 0).all()
    student.commit((ZeroingSet(0, np.array([1]), np.array([5])),))
    assert student.weights[0].data.view(-1)[5] == original.view(-1)[5]
    assert student.survivors == problem.weights - 3


def test_a_students_state_survives_a_round_trip():
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)
    student.commit(random_candidates(problem, 1)[0])
    other = Student(problem.teacher, problem.layers)
    other.load_state(student.state())
    for key, value in student.state().items():
        assert torch.equal(other.state()[key], value), key


@pytest.mark.parametrize("actors", [1, 3])
def test_actors_give_the_serial_pools_numbers_bit_for_bit(session, actors):
    problem = branchy_problem()
    candidates, more = random_candidates(problem, 12), random_candidates(problem, 5, seed=1)
    results = []
    for config in (PoolConfig(kind="serial", batch=16), PoolConfig(actors=actors, batch=16)):
        student = Student(problem.teacher, problem.layers)
        with build_pool(problem, config, student) as pool:
            first = pool.evaluate(candidates, range(pool.batches))
            student.commit(candidates[0])
            pool.commit(candidates[0])
            for weight, mask in zip(student.weights, student.masks, strict=True):
                weight.data.mul_(1.01).mul_(mask)
            pool.refresh(student)
            results.append((first, pool.evaluate([(), *more], [0, 1])))
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_array_equal(serial, parallel)


def test_a_client_evaluates_on_the_pools_actors_from_another_process_and_none_outlives_the_pool(session):
    problem = mlp_problem()
    candidates = random_candidates(problem, 6)
    student = Student(problem.teacher, problem.layers)
    with build_pool(problem, PoolConfig(kind="serial"), student) as pool:
        expected = pool.evaluate(candidates, [0])
    with build_pool(problem, PoolConfig(actors=1), student) as pool:
        assert isinstance(pool, RayPool)
        evaluate = ray.remote(num_cpus=0)(lambda client: client.evaluate(candidates, [0]))
        np.testing.assert_array_equal(ray.get(evaluate.remote(pool.client())), expected)
        pid = ray.get(pool.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


def test_more_actors_than_the_cluster_has_room_for_are_refused_before_any_starts(session):
    problem = mlp_problem()
    with pytest.raises(ValueError, match="pool.actors=50"):
        build_pool(problem, PoolConfig(actors=50), Student(problem.teacher, problem.layers))
