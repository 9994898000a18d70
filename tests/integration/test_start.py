"""Evolution that goes on from an earlier file."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from de_ray.codec import decode
from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.evaluation.pool import SerialPool
from de_ray.evaluation.replica import ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.pipeline import run
from de_ray.session import run_session
from de_ray.student import Student
from de_ray.units import find_units
from tests.networks import branchy_problem, mlp_problem

CONFIG = Config(
    evolution=EvolutionConfig(sparsity=0.5, cycles=3, population=4, generations=2, regrow=0.0),
    pool=PoolConfig(kind="serial"), refit=RefitConfig(steps=10, final_steps=10, batch=32),
    quantization=QuantizationConfig(bits=4, refit_steps=10))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "first.der"
    result = run(mlp_problem(), CONFIG)
    return result.save(path), result


def test_a_run_that_starts_from_a_file_zeroes_more_of_it_and_brings_nothing_back(first, monkeypatch):
    path, result = first
    problem = mlp_problem()
    monkeypatch.setattr("de_ray.pipeline.tidy", lambda *_: None)  # units keep the numbers that they have while it runs
    further = run(problem, replace(CONFIG, start=str(path), evolution=replace(CONFIG.evolution, sparsity=0.8)))
    rises = [record["sparsity"] for record in further.report["history"][:3]]
    assert 0.5 < rises[0] < rises[1] < rises[2] == pytest.approx(0.8, abs=0.01)
    before, after = decode(path), decode(further.data)
    with SerialPool(ReplicaSetup(problem, 64, "cpu", 1), 1) as pool:
        units = find_units(problem.teacher, problem.calibration, pool.hidden())
    units.restore(before, problem.teacher.state_dict())
    for name in ("0.weight", "2.weight"):
        assert not ((before[name] == 0) & (after[name] != 0)).any()
    assert further.report["ratio"] > result.report["ratio"]


@pytest.mark.parametrize("rate_weight", [0.0, 0.5])
def test_a_file_sparser_than_asked_for_gets_weights_back(first, rate_weight):
    path, result = first
    evolution = replace(CONFIG.evolution, sparsity=0.3, cycles=2, rate_weight=rate_weight)
    quantization = replace(CONFIG.quantization, bits=8)  # levels make zeros of few survivors
    denser = run(mlp_problem(), replace(CONFIG, start=str(path), evolution=evolution, quantization=quantization))
    assert denser.report["history"][0]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert denser.report["divergence"]["held_out"] < result.report["divergence"]["held_out"]


def test_a_start_keeps_the_schedule_to_targets_by_layer(first):
    evolution = replace(CONFIG.evolution, sparsity=0.5, targets={"*": 0.8})
    rises = [record["sparsity"] for record in
             run(mlp_problem(), replace(CONFIG, start=str(first[0]), evolution=evolution)).report["history"][:3]]
    assert 0.5 < rises[0] < rises[1] < rises[2] == pytest.approx(0.8, abs=0.01)
    assert rises[0] < 0.75


def test_nothing_returns_where_no_refit_would_give_it_a_value(first):
    untouched = run(mlp_problem(), replace(CONFIG, start=str(first[0]), refit=RefitConfig(method="none"),
                                           evolution=replace(CONFIG.evolution, sparsity=0.3)))
    assert untouched.report["history"][0]["sparsity"] >= 0.5


def test_zeroed_weights_of_a_file_return_with_the_teachers_values(first):
    problem, state = mlp_problem(), decode(first[0])
    student = Student(problem.teacher, problem.layers)
    student.start_from(state)
    zeroed = (state["0.weight"] == 0).flatten().nonzero().flatten()[:5]
    student.commit((ZeroingSet(0, np.empty(0, np.int64), zeroed.numpy()),))
    found, teacher = student.module.state_dict(), problem.teacher.state_dict()
    assert torch.equal(found["0.weight"].flatten()[zeroed], teacher["0.weight"].flatten()[zeroed])
    assert torch.equal(found["2.weight"], state["2.weight"])


@pytest.mark.parametrize("problem", [branchy_problem, mlp_problem])
def test_a_start_that_is_no_student_of_the_teacher_is_one_clear_error(problem, first, tmp_path):
    other = tmp_path / "other.der"
    if problem is branchy_problem:
        other = first[0]
    else:
        other.write_bytes(b"no file of ours")
    with pytest.raises(ValueError, match=r"start=.*(differ in name or shape|not a).*; expected a compressed file"):
        run(problem(), replace(CONFIG, start=str(other)))


def test_a_start_that_is_another_networks_student_is_told_of(first, caplog):
    further = replace(CONFIG, start=str(first[0]), evolution=replace(CONFIG.evolution, cycles=1))
    run(mlp_problem(), further)
    assert "is it a student of this teacher" not in caplog.text
    stranger = mlp_problem()
    torch.nn.init.normal_(stranger.teacher[2].weight, std=3.0)
    run(stranger, further)
    assert "is it a student of this teacher" in caplog.text


def test_a_start_that_is_missing_is_one_clear_error():
    with pytest.raises(ValueError, match="start='absent.der': .*expected a compressed file of this teacher"):
        run(mlp_problem(), replace(CONFIG, start="absent.der"))


def test_a_student_takes_over_what_a_file_holds(first):
    path, result = first
    state = decode(path)
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_start_that_is_missing_ends_a_session_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="start='absent.der': no such file"):
        run_session(replace(CONFIG, start="absent.der"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
