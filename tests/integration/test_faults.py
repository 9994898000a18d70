"""What clusters do to a run: whatever happens to actors, nodes, memory or the driver, the numbers stay."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import OutOfDiskError
from torch import nn

from de_ray.config import (
    Config,
    EvolutionConfig,
    PoolConfig,
    ProblemConfig,
    QuantizationConfig,
    RefitConfig,
    TeacherConfig,
)
from de_ray.evaluation.full import FullForwards
from de_ray.evaluation.pool import SerialPool
from de_ray.evaluation.ray_pool import EvaluationError, RayClient, RayPool
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.request import Request
from de_ray.pipeline import run
from de_ray.problem.build import build_problem
from de_ray.problem.custom import problem_from_model
from de_ray.student import Student
from tests.clusters import head_alone, local_session, shared_session
from tests.networks import mlp_problem

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module
START_SECONDS = 180
"""More than an actor takes to start on a busy machine."""
SLOW_SECONDS = 2.5


class PlainReplica(Replica):
    """Runs whole networks: what captures their graphs takes each actor seconds to import."""

    def _build_runner(self, cache_mb):
        logging.getLogger("de_ray.evaluation.replica").warning("a plain replica")
        return FullForwards(self.student, self.batches)


class Faults:
    """Carries out the faults whose names lie as files in a folder; whoever takes a file has the fault."""

    def __init__(self, setup):
        self.faults, self.lies = setup.faults, setup.faults / "a replica is wrong"
        if self.takes("fail to start"):
            raise RuntimeError("no such device")
        super().__init__(setup)
        self.wrong = 0

    def takes(self, name):
        for path in self.faults.glob(f"{name}*"):
            try:
                path.unlink()
                return True
            except FileNotFoundError:
                pass
        return False

    def evaluate(self, candidates, batches, screening=False):
        deadline = time.monotonic() + START_SECONDS
        while self.wrong == 0 and self.lies.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.takes("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.takes("raise"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.takes("hang"):
            time.sleep(3600)
        if self.takes("be slow"):
            time.sleep(SLOW_SECONDS)
        fitness = super().evaluate(candidates, batches, screening)
        if self.wrong or self.takes("answer NaN"):
            self.wrong += 1
            # It is wrong for two tasks before anybody can tell. The others wait, lest they do all that is left.
            if self.wrong <= 2:
                self.lies.touch()
            else:
                self.lies.unlink(missing_ok=True)
        return fitness if not self.wrong else fitness + 1 if self.wrong <= 2 else np.full_like(fitness, np.nan)

    def commit(self, candidate):
        if self.takes("forget"):
            raise RuntimeError("CUDA error: unspecified launch failure")
        super().commit(candidate)


class FaultyPlainReplica(Faults, PlainReplica):
    """See both."""


class FaultyReplica(Faults, Replica):
    """See both."""


class Poison:
    """An edit that no network survives."""

    layer = 0

    def apply(self, weight):
        return torch.full_like(weight, torch.nan)


class Case:
    """A problem, candidates, and what a serial pool says of them; replicas are plain ones, or with the engine."""

    def __init__(self, problem, folder, count=60, engine=False, **config):
        self.classes = (Replica, FaultyReplica) if engine else (PlainReplica, FaultyPlainReplica)
        self.problem, self.config, self.folder = problem, PoolConfig(**{"stack": 2, "batch": 64} | config), folder
        rng = np.random.default_rng(0)
        self.candidates = [self.candidate(rng) for _ in range(count)]
        self.student = Student(problem.teacher, problem.layers)
        self.serial = SerialPool(self.setup(), self.config.stack, self.classes[0])
        self.expected = self.serial.evaluate(self.candidates, range(self.serial.batches))

    def candidate(self, rng):
        layer = int(rng.integers(len(self.problem.layers)))
        size = self.problem.layers[layer].size
        return (ZeroingSet(layer, np.sort(rng.choice(size, size // 10, replace=False))),)

    def setup(self):
        setup = ReplicaSetup(self.problem, self.config.batch, "cpu", 1)
        setup.faults = self.folder
        return setup

    def pool(self):
        return RayPool(self.setup(), self.config, self.student, replica=self.classes[1])

    def fault(self, name, count=1):
        for number in range(count):
            (self.folder / f"{name} {number}").touch()

    def commit(self, pool):
        """Change the student by its first candidate and a refit of a kind, everywhere."""
        change = self.candidates[0]
        self.student.commit(change)
        for one in (pool, self.serial):
            one.commit(change)
        for weight in self.student.weights:
            weight.data.mul_(1.01)
        for one in (pool, self.serial):
            one.refresh(self.student)
        self.expected = self.serial.evaluate(self.candidates, range(self.serial.batches))

    def check(self, pool):
        """The pool's numbers are the serial pool's, and the faults that were laid out have happened."""
        np.testing.assert_array_equal(pool.evaluate(self.candidates, range(pool.batches)), self.expected)
        assert not list(self.folder.iterdir())


def pids(pool):
    return [ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=START_SECONDS) for actor in pool.actors]


def fill(pool, count):
    """Evaluate until the pool has `count` actors in service; returns their process ids."""
    deadline = time.monotonic() + START_SECONDS
    while len(pool.actors) < count and time.monotonic() < deadline:
        pool.evaluate([()], [0])
        time.sleep(0.2)  # what starts needs the processor
    assert len(pool.actors) == count
    return pids(pool)


def is_gone(pid):
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    return not os.path.exists(f"/proc/{pid}")


@pytest.fixture
def no_session():
    """For tests that start Ray in their own way."""
    ray.shutdown()
    yield
    ray.shutdown()


# The driver.

KILLS, CYCLES = 20, 24
DRIVERS = """
import json, os, signal, sys, time, traceback
from pathlib import Path
from tests.integration.test_faults import compress, newest

compress(Path(sys.argv[1]))
print("warm", flush=True)
for line in sys.stdin:
    folder, cycles, seconds = json.loads(line)
    before = newest(Path(folder))
    driver = os.fork()
    if driver == 0:
        try:
            compress(Path(folder))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if cycles is not None:
        alive = lambda: os.waitid(os.P_PID, driver, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        while newest(Path(folder)) < before + cycles and alive():
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(driver, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]), flush=True)
"""
"""Starts a driver for each line, and kills it some seconds after so many cycles, unless they are null. It forks after a
first run, so that drivers need not import torch."""


def compress(folder):
    """What a driver does: a run of seconds in one process."""
    config = Config(problem=ProblemConfig(name="digits", calibration_size=512,
                                          teacher=TeacherConfig(epochs=5, learning_rate=2e-3)),
                    evolution=EvolutionConfig(cycles=CYCLES, population=4, generations=2, saliency_inputs=256),
                    refit=RefitConfig(steps=20, final_steps=20),
                    quantization=QuantizationConfig(trials=2, refit_steps=10, max_bits=3),
                    pool=PoolConfig(kind="serial"))
    run(build_problem(config.problem, 0), config, folder).save(folder / "student.der")


def newest(folder):
    """The cycle of a run's newest checkpoint, 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in (folder / "checkpoint").glob("step-*")), default=0)


@pytest.fixture
def drive(cache, tmp_path):
    """A function that starts a driver for a folder, kills it some seconds after so many cycles, unless they are None,
    and tells whether that killed it."""
    (tmp_path / "first").mkdir()
    server = subprocess.Popen([sys.executable, "-c", DRIVERS, tmp_path / "first"], cwd=Path(__file__).parents[2],
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert server.stdout.readline() == "warm\n"

    def start(folder, cycles=None, seconds=0.0):
        print(json.dumps([str(folder), cycles, seconds]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code == -signal.SIGKILL

    yield start
    server.kill()
    server.communicate()


def test_a_driver_killed_twenty_times_at_random_leaves_the_undisturbed_runs_file(drive, tmp_path):
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    undisturbed.mkdir(), broken.mkdir()
    started = time.monotonic()
    drive(undisturbed)
    a_cycle = (time.monotonic() - started) / CYCLES
    expected = (undisturbed / "student.der").read_bytes()
    rng, kills, reached = random.Random(0), 0, set()
    for _ in range(3 * KILLS):
        # However slow the machine has become, about half of the drivers get through a cycle.
        kills += drive(broken, rng.randrange(2), rng.uniform(0, a_cycle))
        reached.add(newest(broken))
        if kills == KILLS:
            break
    assert kills == KILLS and len(reached) > 4, "kills are to fall into many cycles"
    (broken / "student.der").unlink(missing_ok=True)
    assert not drive(broken)
    assert (broken / "student.der").read_bytes() == expected


# Nodes.

@pytest.fixture
def cluster(no_session):
    with head_alone() as nodes:
        yield nodes


def plug_pulled(cluster, node, pool):
    """Returns what makes a node leave, as a machine that loses its power does: all its processes end at once."""
    where = [ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))
             for actor in pool.actors]
    victims = [pid for pid, node_id in zip(pids(pool), where, strict=True) if node_id == node.node_id]
    assert len(victims) == 1

    def pull():
        os.kill(victims[0], signal.SIGSTOP)  # it would live on for a while and answer
        cluster.remove_node(node, allow_graceful=False)
        os.kill(victims[0], signal.SIGKILL)

    return pull


def test_a_pool_goes_on_without_a_node_that_left_and_grows_onto_one_that_joins(cluster, tmp_path):
    first, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    case = Case(mlp_problem(), tmp_path, actors=0, engine=True)
    with case.pool() as pool:
        before = fill(pool, 2)
        case.commit(pool)
        case.check(pool)
        case.fault("be slow", 2)
        leaving = threading.Timer(0.5, plug_pulled(cluster, first, pool))
        leaving.start()
        case.check(pool)
        leaving.join()
        left = set(fill(pool, 1))
        assert left < set(before)
        case.commit(pool)
        cluster.add_node(num_cpus=1)
        case.check(pool)
        assert left < set(fill(pool, 2))
        case.check(pool)


def test_a_pool_without_any_node_left_waits_for_one_and_then_ends_with_one_clear_error(cluster, tmp_path):
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    case = Case(mlp_problem(), tmp_path, actors=1)
    with case.pool() as pool:
        fill(pool, 1)
        plug_pulled(cluster, node, pool)()
        pool.task_seconds = 5.0
        with pytest.raises(EvaluationError, match="could start within pool.task_seconds=5:.*resume=RUN_FOLDER"):
            pool.evaluate(case.candidates, [0])
        cluster.add_node(num_cpus=1)
        pool.task_seconds = 60.0
        case.check(pool)


# Memory.

def test_an_object_store_that_overflows_changes_no_fitness(no_session, tmp_path):
    local_session(num_cpus=2, object_store_memory=80 * 2**20)
    torch.manual_seed(0)
    problem = problem_from_model(nn.Sequential(nn.Linear(32, 20000), nn.ReLU(), nn.Linear(20000, 4)),
                                 torch.randn(64, 32))
    case = Case(problem, tmp_path, count=8, actors=2)
    ballast = []
    with case.pool() as pool:
        for _ in range(8):  # x 6.5 MB of student
            ballast.append(ray.put(np.ones(20 * 2**20, np.uint8)))
            pool.load(case.student)
            case.commit(pool)
            case.check(pool)
        case.fault("die")
        case.check(pool)
        fill(pool, 2)
    assert all(ray.get(one).all() for one in ballast)


def test_a_disk_without_room_for_spilled_objects_is_one_clear_error(no_session, tmp_path):
    local_session(num_cpus=1, object_store_memory=80 * 2**20,
                  _system_config={"local_fs_capacity_threshold": 0.0001, "local_fs_monitor_interval_ms": 50})
    torch.manual_seed(0)
    problem = problem_from_model(nn.Linear(1024, 1024), torch.randn(8, 1024))
    case = Case(problem, tmp_path, count=2, actors=1)
    ballast = []
    with case.pool() as pool:
        fill(pool, 1)
        with pytest.raises(EvaluationError, match="OutOfDiskError.*resume=RUN_FOLDER"):
            for _ in range(10):  # Ray frees what nobody holds any more with a delay, which leaves room again
                with pytest.raises(OutOfDiskError):
                    while True:
                        ballast.append(ray.put(np.ones(2**20, np.uint8)))
                pool.load(case.student)  # 9 MB
        ballast.clear()
        case.check(pool)


# Actors.

def test_a_lone_actor_that_answers_nan_is_checked_by_its_replacement(session, tmp_path):
    case = Case(mlp_problem(), tmp_path, actors=1)
    with case.pool() as pool:
        before = fill(pool, 1)
        case.fault("answer NaN")
        case.check(pool)
        assert pids(pool) != before
        fitness = pool.evaluate([*case.candidates, (Poison(),)], range(pool.batches))
        np.testing.assert_array_equal(fitness[:-1], case.serial.evaluate([*case.candidates, (Poison(),)],
                                                                         range(pool.batches))[:-1])
        assert np.isnan(fitness[-1])


def test_two_actors_that_raise_over_a_candidate_are_one_clear_error_and_leave_no_process(session, tmp_path):
    case = Case(mlp_problem(), tmp_path, actors=2)
    with pytest.raises(EvaluationError, match="two replicas could not evaluate a candidate: .*illegal memory access"):
        with case.pool() as pool:
            workers = fill(pool, 2)
            case.fault("raise", 2)
            pool.evaluate(case.candidates[:1], [0])
    assert all(is_gone(pid) for pid in workers)


@pytest.fixture
def impatient(monkeypatch):
    """Two replicas are given up where users' runs give up four, each of which takes seconds to start."""
    for module in ("ray_pool", "scatter"):
        monkeypatch.setattr(f"de_ray.evaluation.{module}.DEATHS_ALLOWED", 1)


def test_a_candidate_that_kills_every_actor_is_one_clear_error(session, impatient, tmp_path):
    case = Case(mlp_problem(), tmp_path, actors=1)
    with case.pool() as pool:
        fill(pool, 1)
        case.fault("die", 2)
        with pytest.raises(EvaluationError, match="2 replicas were lost over the same candidates.*resume=RUN_FOLDER"):
            pool.evaluate(case.candidates[:1], [0])


def test_actors_that_cannot_start_are_one_clear_error(session, impatient, tmp_path):
    case = Case(mlp_problem(), tmp_path, actors=1)
    case.fault("fail to start", 2)
    with case.pool() as pool, pytest.raises(EvaluationError, match="no replica is left.*no such device"):
        pool.evaluate(case.candidates, [0])


def test_a_failure_of_the_driver_leaves_no_actor(session, tmp_path):
    case = Case(mlp_problem(), tmp_path, actors=1)
    with pytest.raises(ZeroDivisionError):
        with case.pool() as pool:
            workers = fill(pool, 1)
            raise ZeroDivisionError
    assert all(is_gone(pid) for pid in workers)


# Actors of a pool that heals. These tests come last: the pool lasts until the end.

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A pool of two actors; tests lay out faults for it, and it heals."""
    shared_session()
    case = Case(mlp_problem(), tmp_path_factory.mktemp("faults"), actors=2)
    with case.pool() as pool:
        yield case, pool


def test_an_actor_killed_in_mid_generation_changes_no_fitness(shared):
    case, pool = shared
    before = fill(pool, 2)
    case.fault("die")
    case.check(pool)
    assert len(set(fill(pool, 2)) & set(before)) == 1


def test_an_actor_that_raises_is_replaced_and_changes_no_fitness(shared):
    case, pool = shared
    before = fill(pool, 2)
    case.fault("raise")
    case.check(pool)
    assert len(set(fill(pool, 2)) & set(before)) == 1


def test_an_actor_that_missed_a_commit_answers_nothing(shared):
    case, pool = shared
    before = fill(pool, 2)
    case.fault("forget")
    case.commit(pool)
    case.check(pool)
    assert len(set(fill(pool, 2)) & set(before)) == 1
    case.check(pool)  # the replacement, too, has the student as it is now


def test_a_hung_actor_changes_no_fitness(shared, monkeypatch):
    case, pool = shared
    before = fill(pool, 2)
    monkeypatch.setattr(pool, "task_seconds", 4.0)
    case.fault("hang")
    started = time.monotonic()
    case.check(pool)
    assert time.monotonic() - started >= 4
    monkeypatch.undo()
    gone = set(before) - set(fill(pool, 2))
    assert len(gone) == 1 and is_gone(gone.pop())


def test_a_task_that_waits_behind_a_slow_one_is_not_taken_for_hung(shared, monkeypatch):
    case, pool = shared
    before = fill(pool, 2)
    # More than a slow task by as much as a busy machine may add, and less than two.
    monkeypatch.setattr(pool, "task_seconds", 1.8 * SLOW_SECONDS)
    case.fault("be slow", 4)  # each actor has two tasks in flight
    case.check(pool)
    assert pids(pool) == before


def test_a_client_leaves_a_hung_actor_alone_and_goes_on_with_the_others(shared):
    case, pool = shared
    before = fill(pool, 2)
    client = pool.client()
    client.task_seconds = 2.0
    case.fault("hang")
    np.testing.assert_array_equal(client.evaluate(case.candidates, range(client.batches)), case.expected)
    assert len(client.members) == 1 and len(pool.actors) == 2
    pool.task_seconds, limit = 4.0, pool.task_seconds
    case.check(pool)  # the driver finds out about it
    pool.task_seconds = limit
    assert len(set(fill(pool, 2)) & set(before)) == 1


def test_an_actor_that_answers_nan_is_replaced_and_all_its_answers_with_it(shared):
    case, pool = shared
    before = fill(pool, 2)
    case.fault("answer NaN")
    case.check(pool)
    assert len(set(fill(pool, 2)) & set(before)) == 1


@pytest.mark.parametrize("fault", [None, "die", "answer NaN"])
def test_requests_that_are_under_way_together_are_answered_as_each_alone(shared, fault):
    case, pool = shared
    before = fill(pool, 2)
    requests = [Request(case.candidates[:24], range(pool.batches), screening=True),
                Request(case.candidates[24:], range(pool.batches), screening=True), Request([], [0]),
                Request(case.candidates[::3], range(pool.batches))]
    if fault:
        case.fault(fault)
    with pool.dispatch() as dispatch:
        for request in requests:
            dispatch.submit(request)
        answers = dict(dispatch.next() for _ in requests)
        with pytest.raises(ValueError, match="has been answered"):
            dispatch.next()
    # What is only screened waits for the rest.
    assert list(answers) == [requests[k] for k in (2, 3, 0, 1)] or fault
    for request, answer in answers.items():
        expected = case.serial.evaluate(request.candidates, request.batches, request.screening)
        np.testing.assert_array_equal(answer, expected)
    assert not list(case.folder.iterdir())
    assert len(set(fill(pool, 2)) & set(before)) == (1 if fault else 2)


def test_a_candidate_that_is_nan_on_two_actors_is_nan_and_nobodys_fault(shared):
    case, pool = shared
    before = fill(pool, 2)
    fitness = pool.evaluate([*case.candidates, (Poison(),), (Poison(),)], range(pool.batches))
    assert np.isnan(fitness[-2:]).all()
    np.testing.assert_array_equal(fitness[:-2], case.expected)
    assert pids(pool) == before


def test_a_client_of_a_single_actor_believes_it(shared):
    case, pool = shared
    client = RayClient(pool.actors[:1], pool.batches, case.config)
    fitness = client.evaluate([*case.candidates, (Poison(),)], range(pool.batches))
    np.testing.assert_array_equal(fitness, [*case.expected, np.nan])


def test_a_pool_tells_the_hidden_units_though_every_actor_died(shared):
    case, pool = shared
    before = fill(pool, 2)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert pool.hidden() == case.serial.hidden() == []  # plain replicas run whole networks
    assert not set(fill(pool, 2)) & set(before)
    case.check(pool)


def test_what_replicas_warn_of_is_told_by_the_driver_once(shared, caplog):
    case, pool = shared
    before = fill(pool, 2)
    assert pool._warned == {"a plain replica"}
    pool._warned.clear()
    caplog.clear()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    case.check(pool)
    fill(pool, 2)
    assert [record.getMessage() for record in caplog.records].count("a plain replica") == 1


def test_a_pool_tells_the_memory_of_each_evaluator(shared):
    case, pool = shared
    fill(pool, 2)
    assert len(pool.peak_mb()) == 2 and all(10 < peak < 10**5 for peak in [*pool.peak_mb(), *case.serial.peak_mb()])
