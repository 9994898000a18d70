"""The sweep in Ray Tune's processes, against the same search in this one."""

import os
import signal
import sys
import threading

import numpy as np
import pytest
import ray
from ray import cloudpickle

from de_ray.config import QuantizationConfig
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.goal import WithinDivergence
from de_ray.quantization.sweep import sweep
from de_ray.quantization.table import SensitivityTable
from tests.clusters import shared_session

CONFIG = QuantizationConfig()
GOAL = WithinDivergence(0.045, 0.03)
WIDTHS = tuple(range(1, 7))


def divergence(candidate):
    """Rises that do not quite add up; a width of 1 in the last layer fails."""
    if any(choice.layer == 2 and choice.bits == 1 for choice in candidate):
        return np.nan
    rise = sum((choice.layer + 1) * 4.0**-choice.bits for choice in candidate)
    return 0.03 + rise + rise**2


class Replica:
    def evaluate(self, candidates, batches):
        if any(len(candidate) == 3 and candidate[0].bits == 99 for candidate in candidates):
            raise RuntimeError("replica broke")
        return np.array([divergence(candidate) for candidate in candidates])


class ActorClient:
    batches = 2

    def __init__(self, actor):
        self.actor = actor

    def evaluate(self, candidates, batches):
        return ray.get(self.actor.evaluate.remote(candidates, list(batches)))


class ActorPool(ActorClient):
    def client(self):
        return ActorClient(self.actor)


class SerialPool(Replica):
    batches = 2

    def client(self):
        return self


def make_table(bits_offset=0):
    nothing = np.empty(0, np.float32)
    choices = tuple(tuple(LevelChoice(l, bits + bits_offset, nothing, nothing) for bits in WIDTHS) for l in range(3))
    sizes = np.array([[(3 - l) * 100 * bits for bits in WIDTHS] for l in range(3)])
    rises = np.array([[divergence((choice,)) for choice in row] for row in choices])
    return SensitivityTable(("a", "b", "c"), WIDTHS, choices, sizes, rises, 0.03)


@pytest.fixture(scope="module")
def pool():
    shared_session()
    # Workers cannot import a test module, so that its classes have to travel themselves.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # The actor owns all CPUs: a trial that asked for one would never start.
    actor = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Replica).remote()
    yield ActorPool(actor)
    ray.kill(actor)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_tune_gives_the_list_of_the_search_in_process_quietly(pool, tmp_path, capfd):
    table = make_table()
    handler = signal.getsignal(signal.SIGINT)
    environment = dict(os.environ)
    trials = sweep(table, pool, CONFIG, GOAL, 0, tmp_path / "first")
    printed = capfd.readouterr()
    assert trials == sweep(table, SerialPool(), CONFIG, GOAL, 0, tmp_path / "second")
    assert len(trials) == CONFIG.trials
    assert printed.out == ""
    assert (tmp_path / "first").is_dir() and not (tmp_path / "second").exists()
    # Tune leaves its handler of Ctrl-C behind, and the sweep takes it away again.
    assert signal.getsignal(signal.SIGINT) is handler
    assert dict(os.environ) == environment


def test_ctrl_c_ends_the_sweep_instead_of_passing_for_its_end(pool, tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        sweep(make_table(), pool, QuantizationConfig(trials=200), GOAL, 0, tmp_path)


def test_a_trial_that_raises_ends_the_sweep_with_its_error(pool, tmp_path, capfd):
    with pytest.raises(Exception, match="replica broke"):
        sweep(make_table(bits_offset=99 - 1), pool, CONFIG, WithinDivergence(1e9, 0.03), 0, tmp_path)
    assert capfd.readouterr().out == ""
