"""Clusters without Ray: what is chosen, where runs are kept, what is sent, what is refused."""

import dataclasses
import json
import os
import shlex
import zipfile
from types import SimpleNamespace

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch import nn

from de_ray.checkpoint import latest, save_checkpoint
from de_ray.cluster import submit as jobs
from de_ray.cluster.join import use_token
from de_ray.cluster.probe import shared_folders
from de_ray.cluster.storage import Mirror, fetch, location, open_storage, tune_storage
from de_ray.config import ClusterConfig, Config, PoolConfig, QuantizationConfig, SweepConfig
from de_ray.fingerprint import fingerprint
from de_ray.results import save_config
from de_ray.schema import CONF, compose, refuse_without_plus, resumed


@pytest.fixture(scope="module")
def server():
    """A local S3 server and an environment that leads to it. fsspec keeps its clients: they are to find it again."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "planted-secret",
                           "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(key, value)
        yield
    server.stop()


@pytest.fixture
def bucket(server):
    """The address of a folder in a bucket of the test's own."""
    import boto3

    name = f"runs-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/de-ray"


def a_run(folder):
    """A run's folder as it is after two cycles, with Tune's records in it."""
    (folder / "sweep").mkdir(parents=True)
    (folder / "sweep/tuner.pkl").write_text("records")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(Config(seed=5))))
    for done in (1, 2):
        save_checkpoint(folder, done, {}, {"done": done})


def names(uri):
    filesystem, root = open_storage(uri)
    return {path[len(root):].lstrip("/") for path in filesystem.find(root)}


# Choosing.

def test_a_plain_cluster_is_told_what_to_type():
    with pytest.raises(ValueError, match=r"^cluster=aws: type \+cluster=aws; there are \+cluster=aws, \+cluster=k"):
        refuse_without_plus(["problem=digits", "cluster=aws"])
    with pytest.raises(ValueError, match=r"^sweep\.metric=accuracy: there is no sweep; type \+sweep=tune besides"):
        refuse_without_plus(["problem=digits", "sweep.metric=accuracy"])
    refuse_without_plus(["sweep.samples=3", "+sweep=tune"])
    refuse_without_plus(["+cluster=aws", "cluster.storage=x", "problem.name=cluster=aws"])


def test_the_root_names_no_cluster():
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    assert not any("cluster" in str(entry) for entry in defaults)


@pytest.mark.parametrize(("values", "message"), [
    ({"address": "10.0.0.1"}, "cluster.address='10.0.0.1'"),
    ({"address": "10.0.0.1:99999"}, "cluster.address"),
    ({"address": "ray://10.0.0.1:10001"}, "cluster.submit=true"),
    ({"dashboard": "10.0.0.1:8265"}, "cluster.dashboard='10.0.0.1:8265'"),
    ({"submit": True}, "cluster.dashboard=None"),
    ({"attach": "a"}, "cluster.dashboard=None"),
    ({"attach": "a", "submit": True, "dashboard": "http://a:1"}, "cluster.attach='a'"),
    ({"storage": "/"}, "cluster.storage='/'"),
    ({"patience": -1}, "cluster.patience=-1"),
])
def test_a_cluster_that_cannot_be_is_one_error_with_the_key(values, message):
    with pytest.raises(ValueError) as error:
        ClusterConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["storage", "dashboard"])
def test_a_password_in_an_address_is_refused_and_not_repeated(key):
    with pytest.raises(ValueError, match=f"cluster.{key}") as error:
        ClusterConfig(**{key: "https://somebody:planted-secret@host/folder"})
    assert "planted-secret" not in str(error.value)


@pytest.mark.parametrize("override", ["+problem._target_=os.system", "+_target_=os.system", "+cluster._target_=a",
                                      "+problem.teacher._target_=a", "+evolution.sparsty=0.5"])
def test_keys_outside_the_schema_are_refused_target_ones_among_them(override):
    with pytest.raises(ValueError, match="expected no such key") as error:
        compose([override])
    assert override.partition("=")[0] in str(error.value)


def test_a_saved_configuration_cannot_bring_keys_in(tmp_path):
    saved = OmegaConf.to_container(OmegaConf.structured(Config()))
    saved["problem"]["_target_"] = "os.system"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(Exception, match="_target_"):
        resumed(Config(resume=str(tmp_path)), ["resume=x"])


def test_a_cluster_is_no_part_of_a_runs_fingerprint():
    problem = SimpleNamespace(teacher=nn.Identity(), sources="")
    elsewhere = Config(cluster=ClusterConfig(address="auto", storage="s3://a/b"))
    assert fingerprint(problem, Config()) == fingerprint(problem, elsewhere)


# Storage.

def test_a_mirror_follows_a_folder_and_a_run_can_be_fetched_from_it(bucket, tmp_path, monkeypatch):
    folder = tmp_path / "outputs/digits-directed/now"
    a_run(folder)
    mirror = Mirror(folder, bucket)
    mirror.push()
    kept = {"config.yaml", "checkpoint/step-0001.safetensors", "checkpoint/step-0002.safetensors"}
    assert mirror.uri == f"{bucket}/digits-directed/now" and names(mirror.uri) == kept
    save_checkpoint(folder, 3, {}, {"done": 3})  # which drops the first
    mirror.push()
    assert names(mirror.uri) == kept - {"checkpoint/step-0001.safetensors"} | {"checkpoint/step-0003.safetensors"}
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    config, found = resumed(Config(resume=mirror.uri), [f"resume={mirror.uri}"])
    assert found == fetch(mirror.uri) and found.parts == ("outputs", "digits-directed", "now")
    assert config.seed == 5 and latest(found).done == 3
    assert Mirror(found, bucket).uri == mirror.uri, "the run goes on in the same mirror"


def test_a_resumed_run_takes_another_cluster_and_nothing_else(tmp_path):
    a_run(tmp_path / "run")
    config = Config(resume=str(tmp_path / "run"), cluster=ClusterConfig(address="auto"))
    assert resumed(config, ["resume=x", "+cluster=aws"])[0].cluster.address == "auto"
    assert resumed(config, ["resume=x"])[0].cluster.address is None
    growing = dataclasses.replace(config, pool=PoolConfig(autoscale=True, batch=7))
    found = resumed(growing, ["resume=x", "+cluster=aws"])[0].pool
    assert found.autoscale and found.batch == PoolConfig.batch, "how the cluster grows, and nothing else of the pool"
    with pytest.raises(ValueError, match="leave out seed=3"):
        resumed(config, ["resume=x", "+cluster=aws", "seed=3"])


def test_a_resumed_run_keeps_its_storage_unless_another_is_named(tmp_path):
    folder, kept = tmp_path / "run", ClusterConfig(storage="s3://b/c")
    a_run(folder)
    save_config(Config(cluster=kept), folder)
    config = Config(resume=str(folder), cluster=ClusterConfig(address="10.0.0.7:6379"))
    assert resumed(config, ["resume=x", "cluster.address=10.0.0.7:6379"])[0].cluster == dataclasses.replace(
        config.cluster, storage="s3://b/c")
    assert resumed(config, ["resume=x", "cluster.storage=null"])[0].cluster.storage is None
    config.cluster.storage = "s3://d"
    assert resumed(config, ["resume=x", "cluster.storage=s3://d"])[0].cluster.storage == "s3://d"


def test_a_path_is_a_storage_too_and_a_folder_that_lies_in_it_is_not_copied(tmp_path):
    a_run(tmp_path / "work/run")
    mirror = Mirror(tmp_path / "work/run", str(tmp_path / "disk"))
    mirror.push()
    assert (tmp_path / "disk/work/run/checkpoint/step-0002.safetensors").exists()
    assert Mirror(tmp_path / "work/run", str(tmp_path / "work")).uri is None


def test_a_storage_that_fails_is_a_warning_on_the_way_and_an_error_at_the_end(tmp_path, caplog):
    a_run(tmp_path / "a/run")
    (tmp_path / "file").touch()
    mirror = Mirror(tmp_path / "a/run", str(tmp_path / "file/disk"))
    mirror.push()
    assert "was not brought up to date (NotADirectoryError" in caplog.text
    with pytest.raises(OSError, match="the results are in .*a/run"):
        mirror.push(final=True)


def test_a_mirror_that_is_not_there_is_one_clear_error(bucket):
    with pytest.raises(FileNotFoundError, match="nothing there"):
        fetch(f"{bucket}/digits-directed/never")


def test_an_unknown_kind_of_storage_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        Mirror(tmp_path, "nowhere://bucket/folder")


def test_tune_writes_where_the_mirror_is(bucket, tmp_path):
    given = tune_storage(location(bucket, tmp_path / "digits-directed/now"))
    assert "s3://" + given["storage_path"] == f"{bucket}/digits-directed/now"
    with given["storage_filesystem"].open_output_stream(given["storage_path"] + "/sweep/record") as stream:
        stream.write(b"1")
    assert names(f"{bucket}/digits-directed/now") == {"sweep/record"}
    assert tune_storage(tmp_path) == {"storage_path": str(tmp_path.resolve())}


def test_what_all_nodes_must_reach_is_the_storage_or_the_folder_that_tune_writes_to(tmp_path):
    run, fixed = tmp_path / "a/run", QuantizationConfig(bits=4)
    storage, sweep = ClusterConfig(storage="s3://b/c"), SweepConfig(space={"seed": [1]})
    assert shared_folders(Config(), run) == [str(run)]
    assert shared_folders(Config(quantization=fixed), run) == []
    assert shared_folders(Config(cluster=storage), run) == ["s3://b/c/a/run"]
    # Trials write reports and checkpoints into the folder, wherever they run and whatever the storage.
    assert shared_folders(Config(quantization=fixed, sweep=sweep), run) == [str(run)]
    assert shared_folders(Config(cluster=storage, sweep=sweep), run) == ["s3://b/c/a/run", str(run)]


# Jobs.

def test_a_jobs_command_leaves_out_what_sent_it_and_quotes_the_rest():
    command = jobs.entrypoint(["+cluster=aws", "cluster.submit=true", "cluster.dashboard=http://a:1", "seed=3",
                               "problem.include=['fc 1', \"x\"]", "hydra.mode=RUN", "hydra.run.dir=out"])
    assert shlex.split(command) == ["python", "-m", "de_ray.launch", "+cluster=aws", "seed=3",
                                    "problem.include=['fc 1', \"x\"]", "hydra.run.dir=out"]


def test_a_password_on_the_command_line_is_not_sent_to_the_dashboard():
    with pytest.raises(ValueError, match="the command line holds a password") as error:
        jobs.entrypoint(["tracking.uri=https://somebody:planted-secret@host"])
    assert "planted-secret" not in str(error.value)


class Client:
    """A dashboard that writes down what it is sent."""

    def __init__(self):
        self.sent = []

    def list_jobs(self):
        return [SimpleNamespace(submission_id=job["submission_id"]) for job in self.sent]

    def submit_job(self, **job):
        self.sent.append(job)
        if len(self.sent) == 1:
            raise ConnectionError("the answer was lost")


def test_a_submission_whose_answer_is_lost_is_not_sent_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BACKOFF", (0.01, 0.01))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    connection, client = jobs.Connection(ClusterConfig(dashboard="http://a:1")), Client()
    connection._client = client
    job = jobs.submit(connection, "true", tmp_path)
    assert [sent["submission_id"] for sent in client.sent] == [job]
    assert client.sent[0]["runtime_env"]["env_vars"] == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert "planted-secret" not in json.dumps(client.sent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:planted-secret@mlflow:5000")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI holds a password") as error:
        jobs.submit(connection, "true", tmp_path)
    assert "planted-secret" not in str(error.value)


def test_the_package_travels_whole_and_outputs_data_and_secrets_stay(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    stay = ["outputs/a/student.der", "data/mnist/a", ".git/config", "mlflow.db", ".env", "deploy.pem", "a/.aws/b"]
    travel = ["launch.py", "de_ray/problem/data/yolov3.cfg", "conf/config.yaml", "de_ray/evaluation/build.py",
              "mine.py", "inputs.npy"]
    for name in stay + travel:
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("content")
    # What the client calls on the working folder.
    create_package(str(tmp_path / "work"), tmp_path / "package.zip", include_gitignore=True, excludes=jobs.EXCLUDES)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == set(travel)


def test_a_multirun_is_not_submitted():
    hydra = SimpleNamespace(mode=RunMode.MULTIRUN)
    with pytest.raises(ValueError, match="not --multirun"):
        jobs.run_job(ClusterConfig(submit=True, dashboard="http://a:1"), hydra)


# Tokens.

@pytest.mark.parametrize(("mode", "token", "expected"), [(None, True, "token"), (None, False, None),
                                                         ("disabled", True, "disabled")])
def test_a_token_is_offered_where_there_is_one_and_nobody_said_otherwise(mode, token, expected, tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("a")
    # Ray's own state, which the mode goes into beside the environment, is the whole process's.
    monkeypatch.setattr("de_ray.cluster.join._turn_tokens_on", lambda: monkeypatch.setenv("RAY_AUTH_MODE", "token"))
    use_token()
    assert os.environ.get("RAY_AUTH_MODE") == expected
