"""MLflow tracking: complete where it works, harmless where it does not."""

import http.server
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import mlflow
import numpy as np
import pytest
import sqlalchemy
import torch
from mlflow import MlflowClient

from de_ray import codec
from de_ray.config import Config, EvolutionConfig, ProblemConfig, TrackingConfig
from de_ray.problem.build import build_architecture
from de_ray.problem.darknet import Darknet
from de_ray.problem.darknet_cfg import parse
from de_ray.redact import without_credentials
from de_ray.serving import BATCH, Predictor, saver
from de_ray.signals import ended_by_sigterm
from de_ray.tracking import SETTINGS, Tracker, flatten
from de_ray.tracking_store import open_store
from tests.networks import small_cfg


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a tracker sets is taken back after each test."""
    for key in SETTINGS:
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


@pytest.fixture
def fresh_store(tmp_path, monkeypatch):
    """A working folder of its own, where the default store is still to be made."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store without runs. To make one takes MLflow longer than most tests take."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        open_store(None)
    return folder / "mlflow.db"


@pytest.fixture
def store(fresh_store, empty_store, tmp_path):
    """A working folder of its own, with the default store in it."""
    shutil.copy(empty_store, tmp_path)
    return fresh_store


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


def test_a_later_sitting_goes_on_with_the_run_of_the_earlier_one(store, tmp_path):
    for sitting, status in enumerate(("KILLED", "FINISHED")):
        tracker = Tracker.start(TrackingConfig(), "run", {}, record=tmp_path / "run.json")
        tracker.log_params({"cluster.address": f"host {sitting}", "seed": 0})
        tracker.log_metrics({"divergence": 0.5}, sitting)
        tracker.end(status)
    client, (run,) = runs(store)
    assert run.info.status == "FINISHED" and run.data.params["cluster.address"] == "host 0"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "divergence")] == [0, 1]


def test_a_run_that_the_store_does_not_know_is_opened_anew(store, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"experiment": "1", "run": "0" * 32}))
    Tracker.start(TrackingConfig(), "run", {}, record=tmp_path / "run.json").end("FINISHED")
    _, (run,) = runs(store)
    assert json.loads((tmp_path / "run.json").read_text())["run"] == run.info.run_id


def test_two_runs_in_one_process_do_not_mix(store):
    first, second = (Tracker.start(TrackingConfig(), name, {}) for name in ("first", "second"))
    first.log_params({"x": 1})
    second.log_params({"x": 2})
    first.end("FAILED")
    second.end("FINISHED")
    _, found = runs(store)
    assert {run.info.run_name: (run.data.params["x"], run.info.status) for run in found} == {
        "first": ("1", "FAILED"), "second": ("2", "FINISHED")}


def test_a_child_that_an_exception_leaves_has_failed_and_the_parent_goes_on(store):
    tracker = Tracker.start(TrackingConfig(), "parent", {})
    with pytest.raises(ZeroDivisionError), tracker.child("trial"):
        raise ZeroDivisionError
    tracker.end("FINISHED")
    _, found = runs(store)
    assert {run.info.run_name: run.info.status for run in found} == {"parent": "FINISHED", "trial": "FAILED"}


def test_names_that_mlflow_refuses_and_more_than_its_limit_are_logged_all_the_same(store, caplog):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_params({f"evolution.targets.layer{i}.*": i / 250 for i in range(250)})
    tracker.log_metrics({"mAP@50": 61.5, "loss": float("inf")}, 3)
    tracker.end("FINISHED")
    _, (run,) = runs(store)
    assert len(run.data.params) == 250 and run.data.params["evolution.targets.layer249._"] == "0.996"
    assert run.data.metrics["mAP_50"] == 61.5
    assert "failed" not in caplog.text


def test_artifacts_go_beside_the_default_store(store, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "course.png").write_bytes(b"x")
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_artifact(tmp_path / "outputs" / "course.png", "figures")
    assert [path.name for path in (tmp_path / "mlartifacts").rglob("figures/*")] == ["course.png"]


def test_a_fresh_store_is_whole_quiet_and_made_in_seconds(fresh_store, tmp_path, capfd):
    started = time.monotonic()
    Tracker.start(TrackingConfig(), "run", {}).end("FINISHED")
    assert time.monotonic() - started < 15
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert capfd.readouterr() == ("", "")


def test_processes_that_start_together_share_a_fresh_store(fresh_store, tmp_path):
    code = ("from de_ray.config import TrackingConfig; from de_ray.tracking import Tracker; import sys\n"
            "Tracker.start(TrackingConfig(), sys.argv[1], {}).end('FINISHED')")
    started = [subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
               for i in range(2)]
    assert [process.communicate()[1] for process in started] == ["", ""]
    _, found = runs(fresh_store)
    assert {(run.info.run_name, run.info.status) for run in found} == {(str(i), "FINISHED") for i in range(2)}


def use(tracker):
    """Everything that a run does with its tracker."""
    tracker.log_params({"x": 1})
    tracker.log_metrics({"y": 1.0}, 0)
    with tracker.child("trial") as child:
        child.log_params({"z": 1})
    tracker.end("FINISHED")


@pytest.mark.parametrize("uri", ["http://user:hunter2@127.0.0.1:9", "http://user:hunter2%40@127.0.0.1:9/path",
                                 "http://user:hun@ter2@127.0.0.1:9", "nonsense://user:hunter2@host",
                                 "postgresql://user:hunter2@127.0.0.1:9/db", "sqlite:////proc/no/such.db",
                                 "sqlite:////proc"])
def test_a_store_that_cannot_be_reached_warns_once_within_seconds_and_tells_no_password(store, caplog, uri):
    started = time.monotonic()
    use(Tracker.start(TrackingConfig(uri=uri), "run", {}))
    assert time.monotonic() - started < 15
    assert len(caplog.records) == 1 and "tracking with MLflow failed" in caplog.text and "goes on" in caplog.text
    assert "ter2" not in caplog.text


def test_a_server_that_never_answers_is_given_up_after_the_time_that_the_user_has_set(store, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        use(Tracker.start(TrackingConfig(uri=f"http://127.0.0.1:{server.getsockname()[1]}"), "run", {}))
    assert time.monotonic() - started < 8
    assert caplog.text.count("tracking with MLflow failed") == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


class Server(http.server.BaseHTTPRequestHandler):
    """As much of an MLflow server as a run without artifacts talks to."""

    def do_GET(self):
        info = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "run_name": "run", "status": "RUNNING"}
        body = json.dumps({"experiment": {"experiment_id": "1", "name": "de-ray", "lifecycle_stage": "active"},
                           "run": {"info": info, "data": {}}, "run_info": info}).encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.paths.append(self.path.partition("?")[0].rpartition("mlflow/")[2])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as started:
        started.paths = []
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def test_a_run_on_a_server_is_ended_there_and_prints_no_password(store, server, caplog, capfd):
    use(Tracker.start(TrackingConfig(uri=f"http://user:hunter2@127.0.0.1:{server.server_port}"), "run", {}))
    assert server.paths[-1] == "runs/update" and server.paths.count("runs/log-batch") == 3
    assert capfd.readouterr() == ("", "") and caplog.text == ""


def test_a_server_that_dies_in_the_middle_of_a_run_warns_once_within_seconds(store, server, caplog):
    tracker = Tracker.start(TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}"), "run", {})
    server.shutdown()
    server.server_close()
    started = time.monotonic()
    use(tracker)
    assert time.monotonic() - started < 15
    assert len(caplog.records) == 1 and "tracking with MLflow failed" in caplog.text


@pytest.mark.parametrize("name", ["what?", "50%41"])
def test_a_working_folder_that_no_database_address_can_name_is_told_at_once(tmp_path, monkeypatch, caplog, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    started = time.monotonic()
    use(Tracker.start(TrackingConfig(), "run", {}))
    assert time.monotonic() - started < 5
    assert len(caplog.records) == 1 and "set tracking.uri" in caplog.text
    assert list((tmp_path / name).iterdir()) == []


def test_a_store_that_breaks_in_the_middle_of_a_run_warns_once_for_the_run_and_its_children(store, tmp_path, caplog):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    with tracker.child("first") as first:
        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            connection.execute("DROP TABLE params")
        first.log_params({"x": 1})
        assert len(caplog.records) == 1 and "params" in caplog.text
    use(tracker)
    assert len(caplog.records) == 1


def test_one_runs_failure_does_not_end_anothers_tracking(store, tmp_path, caplog):
    first, second = (Tracker.start(TrackingConfig(), name, {}) for name in ("first", "second"))
    first.log_artifact(tmp_path / "missing.png")
    second.log_params({"x": 1})
    second.end("FINISHED")
    assert "missing.png" in caplog.text and len(caplog.records) == 1
    _, found = runs(store)
    assert {run.info.run_name: run.data.params for run in found} == {"first": {}, "second": {"x": "1"}}


def test_a_tracking_uris_password_is_not_among_the_parameters(store):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_params(flatten(Config(tracking=TrackingConfig(uri="https://user:hunter2@mlflow.example.org/x"))))
    _, (run,) = runs(store)
    assert run.data.params["tracking.uri"] == "https://mlflow.example.org/x"


@pytest.mark.parametrize(("text", "told"), [
    ("cannot reach http://a:b@host:1/x, twice http://c@d:e@host", "cannot reach http://host:1/x, twice http://host"),
    ("mysql://host/db?user=me&password=s3cret&ssl=1", "mysql://host/db?user=me&password=...&ssl=1"),
    ("3 @ 4 // nothing to hide", "3 @ 4 // nothing to hide")])
def test_credentials_are_taken_out_of_a_text_and_nothing_else(text, told):
    assert without_credentials(text) == told


def test_other_loggers_and_the_root_are_left_as_they_were(store):
    before = [(logger.level, list(logger.handlers), logger.disabled)
              for logger in (logging.getLogger(), logging.getLogger("de_ray"))]
    Tracker.start(TrackingConfig(), "run", {})
    assert before == [(logger.level, list(logger.handlers), logger.disabled)
                      for logger in (logging.getLogger(), logging.getLogger("de_ray"))]


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


def test_the_environments_address_is_used_where_the_configuration_gives_none(fresh_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    Tracker.start(TrackingConfig(), "run", {}).end("FINISHED")
    assert not (tmp_path / "mlflow.db").exists()
    assert runs(f"sqlite:///{tmp_path / 'elsewhere.db'}")[1][0].info.status == "FINISHED"


def test_a_run_whose_tracking_has_failed_is_ended_all_the_same(store, caplog):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_artifact("missing.png")  # anything that fails
    tracker.log_params({"x": 1})
    tracker.end("FINISHED")
    _, (run,) = runs(store)
    assert run.info.status == "FINISHED" and run.data.params == {} and len(caplog.records) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_amid_a_transaction_leaves_the_store_to_those_who_say_that_the_run_was_ended(store, number):
    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
    def interrupt(connection, cursor, statement, *_):
        # What samples the system in a thread of its own writes metrics too: its signal could come after the block.
        if statement.startswith("INSERT INTO metrics") and threading.current_thread() is threading.main_thread():
            signal.raise_signal(number)

    tracker = Tracker.start(TrackingConfig(), "run", {})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with ended_by_sigterm(), pytest.raises((SystemExit, KeyboardInterrupt)):
            tracker.log_metrics({"divergence": 0.25}, 1)
    finally:
        signal.signal(signal.SIGINT, before)
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", interrupt)
    tracker.end("KILLED")
    _, (run,) = runs(store)
    assert run.info.status == "KILLED" and run.data.metrics == {"divergence": 0.25}


def test_what_is_not_set_is_no_parameter(store):
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_params({"bits": None, "sparsity": 0.5})
    _, (run,) = runs(store)
    assert run.data.params == {"sparsity": "0.5"}


def test_runs_of_a_process_that_was_killed_are_ended_by_the_next_one(store, tmp_path):
    code = ("import os, signal; from de_ray.config import TrackingConfig; from de_ray.tracking import Tracker\n"
            "run = Tracker.start(TrackingConfig(), 'killed', {}); run.open_child('trial')\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    ours = Tracker.start(TrackingConfig(), "ours", {})
    Tracker.start(TrackingConfig(), "next", {}).end("FINISHED")
    _, found = runs(store)
    assert {run.info.run_name: run.info.status for run in found} == {
        "killed": "KILLED", "trial": "KILLED", "ours": "RUNNING", "next": "FINISHED"}
    ours.end("FINISHED")


def test_processors_and_memory_are_sampled_without_a_word(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracker = Tracker.start(TrackingConfig(), "run", {})
    deadline = time.monotonic() + 20
    while not (metrics := runs(store)[1][0].data.metrics) and time.monotonic() < deadline:
        time.sleep(0.1)
    tracker.end("FINISHED")
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= metrics.keys()
    assert capfd.readouterr() == ("", "")


def test_a_parents_jobs_are_in_its_experiment_and_tell_how_they_ended(store):
    parent = Tracker.start(TrackingConfig(), "sweep", {}, "de-ray digits")
    Tracker.start(TrackingConfig(), "job", {}, "de-ray lenet", parent.identity).end("FAILED")
    assert parent.child_statuses() == {"FAILED"}
    _, found = runs(store, "de-ray digits")
    assert {run.info.run_name for run in found} == {"sweep", "job"}
    assert Tracker.start(TrackingConfig(enabled=False), "off", {}).identity is None


class Joined(torch.nn.Module):
    """Returns a tensor and a list of them."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, x):
        y = self.fc(x)
        return {"scores": y, "more": [y * 2, (y[:, :1],)]}


def test_a_logged_model_predicts_what_the_file_decodes_to_and_holds_no_pickle(store, tmp_path, capfd):
    file = Path(__file__).parents[2] / "docs/results/lenet300_mnist-0/student.der"
    student, inputs = codec.load(file, build_architecture("lenet300")), torch.randn(300, 1, 28, 28)
    problem = types.SimpleNamespace(held_out=inputs, architecture="lenet300")
    tracker = Tracker.start(TrackingConfig(), "run", {})
    tracker.log_model("student", saver(problem, file, student, ProblemConfig("lenet300_mnist")), "lenet300-student")
    tracker.end("FINISHED")
    assert capfd.readouterr() == ("", "")
    _, (run,) = runs(store)
    written = {path.name for path in (tmp_path / "mlartifacts/models").rglob("*") if path.is_file()}
    assert written == {"student.der", "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    mlflow.set_tracking_uri(store)
    try:
        with torch.inference_mode():
            expected = torch.cat([student(part) for part in inputs.split(BATCH)]).numpy()
        for uri in ("models:/lenet300-student/1", f"runs:/{run.info.run_id}/student"):
            model = mlflow.pyfunc.load_model(uri)
            assert np.array_equal(model.predict(inputs.numpy()), expected)
        assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 28, 28)
        with pytest.raises(mlflow.MlflowException):
            model.predict(inputs[:, :, :4].numpy())
    finally:
        mlflow.set_tracking_uri(None)


def test_a_model_of_ones_own_cfg_is_rebuilt_from_it_wherever_it_is_loaded(tmp_path):
    cfg, file = tmp_path / "own.cfg", tmp_path / "student.der"
    cfg.write_text(small_cfg(2))
    module = Darknet(parse(cfg.read_text())).eval().requires_grad_(False)
    tensors = [codec.QuantizedTensor(name, (value * 100).round().int().numpy(), step=0.01)
               for name, value in module.state_dict().items()]
    file.write_bytes(codec.encode(tensors, {}, "darknet:own.cfg"))
    codec.fill(module, codec.decode(file))
    problem = types.SimpleNamespace(held_out=torch.rand(2, 3, 64, 64), architecture="darknet:own.cfg")
    config = ProblemConfig("yolov3_tiny", divergence="detection", cfg=str(cfg))
    saver(problem, file, module, config)(path=tmp_path / "model", metadata=mlflow.models.Model())
    cfg.unlink()
    got = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(problem.held_out.numpy())
    with torch.inference_mode():
        expected = module(problem.held_out)
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, float("nan")])
def test_a_network_of_bytes_refuses_numbers_that_are_none(value):
    network = Predictor(torch.nn.Identity(), torch.uint8)
    assert network.predict(np.array([[3.0, 255.0]])).tolist() == [[3, 255]]
    with pytest.raises(ValueError, match=r"inputs='torch\.float64': expected whole numbers in torch\.uint8's range"):
        network.predict(np.array([[value]]))


def test_a_models_outputs_are_joined_over_batches_in_their_own_structure():
    module = Joined()
    inputs = torch.randn(600, 6)
    got = Predictor(module).predict(inputs.double().numpy())
    with torch.inference_mode():
        expected = module(inputs)
    assert np.allclose(got["scores"], expected["scores"], atol=1e-6) and isinstance(got["more"], list)
    assert np.allclose(got["more"][1][0], expected["more"][1][0], atol=1e-6) and isinstance(got["more"][1], tuple)
