"""MLflow tracking: complete where it works, harmless where it does not."""

import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from de_ray.config import Config, EvolutionConfig, TrackingConfig
from de_ray.tracking import Tracker, flatten


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A working folder of its own, with the default store in it."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def runs(store, experiment="de-ray"):
    client = MlflowClient(store)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_a_runs_parameters_metrics_artifacts_and_children_can_be_read_back(store, tmp_path):
    tracker = Tracker.start(TrackingConfig(), "digits directed", {"method": "directed"})
    tracker.log_params(flatten(Config(evolution=EvolutionConfig(sparsity=0.7))))
    for step in (1, 2):
        tracker.log_metrics({"divergence": 0.5 / step}, step)
    (tmp_path / "report.json").write_text("{}")
    tracker.log_artifact(tmp_path / "report.json")
    with tracker.child("trial 0") as child:
        child.log_metrics({"bytes": 100}, 0)
    tracker.end("FINISHED")
    client, found = runs(store)
    by_name = {run.info.run_name: run for run in found}
    parent, nested = by_name["digits directed"], by_name["trial 0"]
    assert parent.data.params["evolution.sparsity"] == "0.7" and parent.data.tags["method"] == "directed"
    assert [m.value for m in client.get_metric_history(parent.info.run_id, "divergence")] == [0.5, 0.25]
    assert [a.path for a in client.list_artifacts(parent.info.run_id)] == ["report.json"]
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.status == nested.info.status == "FINISHED"


def test_two_runs_in_one_process_do_not_mix(store):
    first, second = (Tracker.start(TrackingConfig(), name, {}) for name in ("first", "second"))
    first.log_params({"x": 1})
    second.log_params({"x": 2})
    first.end("FAILED")
    second.end("FINISHED")
    _, found = runs(store)
    assert {run.info.run_name: (run.data.params["x"], run.info.status) for run in found} == {
        "first": ("1", "FAILED"), "second": ("2", "FINISHED")}


def test_a_dead_server_warns_once_within_seconds_and_tells_no_password(store, caplog):
    started = time.monotonic()
    tracker = Tracker.start(TrackingConfig(uri="http://user:hunter2@127.0.0.1:9"), "run", {})
    tracker.log_params({"x": 1})
    tracker.log_metrics({"y": 1.0}, 0)
    with tracker.child("trial") as child:
        child.log_params({"z": 1})
    tracker.end("FINISHED")
    assert time.monotonic() - started < 30
    assert caplog.text.count("tracking with MLflow failed") == 1
    assert "hunter2" not in caplog.text


def test_an_artifact_that_is_missing_ends_tracking_and_not_the_run(store, tmp_path, caplog):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_artifact(tmp_path / "missing.png")
    tracker.log_params({"x": 1})
    assert "missing.png" in caplog.text


def test_tracking_that_is_off_imports_no_mlflow(tmp_path):
    code = ("import sys; from de_ray.config import TrackingConfig; from de_ray.tracking import Tracker\n"
            "t = Tracker.start(TrackingConfig(enabled=False), 'x', {}); t.log_params({'a': 1}); t.end('FINISHED')\n"
            "assert 'mlflow' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_flattening_gives_dotted_keys_and_text_for_lists():
    flat = flatten(Config(evolution=EvolutionConfig(criteria=["fisher", "obs"], targets={"fc*": 0.5})))
    assert flat["evolution.criteria"] == "fisher,obs"
    assert flat["evolution.targets.fc*"] == 0.5
    assert flat["problem.teacher.seed"] == 0
