"""`+sweep=tune`: whole compressions as Ray Tune trials, interrupted and resumed."""

import json
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from de_ray.schema import compose

REPOSITORY = Path(__file__).parents[2]
PLANTED = "hunter2-planted"
QUICK = ["evolution.cycles=3", "evolution.population=4", "evolution.generations=1", "refit.steps=10",
         "refit.final_steps=20", "quantization.refit_steps=10", "problem.teacher.epochs=10"]
SPACE = ["~sweep.space.refit", "sweep.space.evolution.sparsity=[0.6]", "sweep.space.quantization.bits=[3,4]",
         "sweep.concurrent=1"]


@pytest.fixture(scope="module")
def swept(python, tmp_path_factory):
    """(working folder, exit code of the sweep that was killed after its first trial, files and statuses of runs then,
    output of the resumed one)."""
    work = tmp_path_factory.mktemp("swept")
    ray_folder = tempfile.mkdtemp(prefix="dr")  # short: Ray puts sockets into it
    environment = os.environ | {"DE_RAY_CACHE": str(work / "cache"), "RAY_TMPDIR": ray_folder,
                                "RAY_ADDRESS": "local",  # whatever else runs on this machine
                                "MLFLOW_TRACKING_PASSWORD": PLANTED,
                                "MLFLOW_TRACKING_URI": f"sqlite:///{work}/runs.db?password={PLANTED}"}

    def launch(*overrides):
        return python.start(REPOSITORY / "launch.py", *overrides, cwd=work, env=environment)

    try:
        process = launch("+sweep=tune", *SPACE, *QUICK, "hydra.run.dir=sweep")
        deadline = time.monotonic() + 300
        while not list(work.glob("sweep/trials/001/checkpoint/step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=180)
        then = {path.name for path in (work / "sweep").iterdir()}, [run.info.status for run in runs(work)[1]]
        first = (work / "sweep/trials/000/student.der").stat().st_mtime_ns
        resumed = launch("resume=sweep")
        out, err = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, err
        assert list(Path(ray_folder).rglob("gcs_server*")), "Ray has kept its files elsewhere"
        leaks = [path for root in (work, Path(ray_folder)) for path in root.rglob("*")
                 if path.is_file() and PLANTED.encode() in path.read_bytes()]
        yield work, process.returncode, then, first, out + err, leaks
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def runs(work):
    client = MlflowClient(f"sqlite:///{work}/runs.db")
    return client, client.search_runs([client.get_experiment_by_name("de-ray digits").experiment_id])


def test_a_killed_sweep_leaves_no_run_running(swept):
    files, statuses = swept[2]
    # 143, or what Ray's threads end the process with as its servers go, once the run has said its word.
    assert swept[1] != 0 and "sweep.json" not in files
    assert statuses.count("KILLED") == 2 and "RUNNING" not in statuses  # the sweep's and the second trial's


def test_a_resumed_sweep_goes_on_with_the_runs_of_the_killed_one(swept):
    _, found = runs(swept[0])
    assert [run.info.run_name for run in found].count("digits directed sweep seed 0") == 1
    assert sorted(run.data.tags["trial"] for run in found if "trial" in run.data.tags) == ["0", "1"]
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_resumed_sweep_ends_with_all_trials_the_figure_and_the_best_ones_command_line(swept):
    work, _, _, first, printed, _ = swept
    summary = json.loads((work / "sweep/sweep.json").read_text())
    assert [row["point"]["quantization.bits"] for row in summary["trials"]] == [3, 4]
    assert {row["status"] for row in summary["trials"]} == {"finished"}  # bits do not matter at the rungs
    assert (work / "sweep/trials/000/student.der").stat().st_mtime_ns == first  # not made again
    assert (work / "sweep/figures/sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert printed.count(summary["command"]) == 2  # printed, and logged
    best = compose(shlex.split(summary["command"])[2:])
    assert best.quantization.bits == summary["trials"][summary["best"]]["point"]["quantization.bits"]
    report = json.loads((work / f"sweep/trials/{summary['best']:03}/report.json").read_text())
    assert report["ratio"] == summary["trials"][summary["best"]]["ratio"] > 10


def test_trials_are_runs_under_the_sweeps_with_their_metrics_by_cycle(swept):
    client, found = runs(swept[0])
    parent = next(run for run in found if run.data.params.get("sweep.concurrent") and run.info.status == "FINISHED")
    trials = {run.data.tags["trial"]: run for run in found
              if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert trials.keys() == {"0", "1"}
    assert all({"ratio", "student_accuracy", "sparsity"} <= run.data.metrics.keys() for run in trials.values())
    assert trials["1"].data.params["quantization.bits"] == "4"
    by_cycle = [client.get_metric_history(run.info.run_id, "divergence") for run in found
                if run.data.tags.get("trial") == "0" and run.data.metrics.get("evaluations")]
    assert any([metric.step for metric in history] == [1, 2, 3, 4] for history in by_cycle)
    assert parent.data.metrics["trials"] == 2 and "best: trial" in parent.data.tags["mlflow.note.content"]
    assert {"trials.json", "sweep.json", "figures"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}


def test_planted_credentials_are_in_no_file_of_the_sweep_or_of_ray(swept):
    assert swept[5] == [] and PLANTED not in swept[4]
    assert (swept[0] / "sweep/tune/tuner.pkl").is_file()


@pytest.mark.parametrize(("overrides", "message"), [
    (["sweep.actors=500"], "sweep.actors=500"), (["sweep.space.evolution.sparsity=[1.5]"], "evolution.sparsity=1.5"),
    (["+sweep.space.pool.actors=[1]"], "pool.actors"), (["sweep.metric=nope"], "sweep.metric='nope'")])
def test_a_sweep_that_cannot_run_says_so_at_once(tmp_path, monkeypatch, overrides, message):
    from de_ray.problem.build import build_problem
    from de_ray.sweep.run import run_sweep
    from de_ray.tracking import Tracker

    monkeypatch.setattr("de_ray.sweep.run.ensure_ray", lambda: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    config = compose(["+sweep=tune", "tracking.enabled=false", "problem.teacher.epochs=1", *overrides])
    monkeypatch.setenv("DE_RAY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        run_sweep(build_problem(config.problem, 0), config, tmp_path, Tracker.start(config.tracking, "x", {}))


def test_a_trials_actors_take_the_places_reserved_for_them_and_one_that_fails_says_why(python, tmp_path):
    """On as many CPUs as the trial and its actor ask for, none is left beside what Tune has reserved."""
    ray_folder = tempfile.mkdtemp(prefix="dr")
    environment = os.environ | {"DE_RAY_CACHE": str(tmp_path / "cache"), "RAY_TMPDIR": ray_folder,
                                "RAY_ADDRESS": "local"}
    cpus = len(os.sched_getaffinity(0))
    try:
        process = python.start(REPOSITORY / "launch.py", "+sweep=tune", "~sweep.space.refit.learning_rate",
                               "+sweep.space.refit.learning_rate=[2e-3,1e30]", "refit.backoff=false",
                               "sweep.space.evolution.sparsity=[0.6]", "~sweep.space.quantization",
                               f"sweep.actors={cpus - 1}", *QUICK,
                               "pool.task_seconds=60", "tracking.enabled=false", "quantization.bits=4",
                               "hydra.run.dir=sweep", cwd=tmp_path, env=environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        report = json.loads((tmp_path / "sweep/trials/000/report.json").read_text())
        assert len(report["evaluator_peak_mb"]) == cpus - 1
        assert "trial 1 failed: FloatingPointError" in out + err and "lower refit.learning_rate" in out + err
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
