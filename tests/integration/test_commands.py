"""The commands as a user types them, each in a process and a working folder of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from de_ray.__main__ import main

LAUNCH = Path(__file__).parents[2] / "launch.py"
TEACHER = "problem.teacher.epochs=10"
QUICK = ["evolution.cycles=3", "evolution.population=6", "evolution.generations=2", "refit.steps=20",
         "refit.final_steps=40", "quantization.trials=4", "quantization.max_bits=4", "quantization.refit_steps=20",
         TEACHER]
PLANTED = "hunter2-planted"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder; the teacher's cache in it is shared by the module's tests."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def start(python, folder):
    """A function that starts `python ARGUMENTS` in the working folder."""
    def begin(*arguments, **options):
        return python.start(*arguments, cwd=folder, env=os.environ | {"DE_RAY_CACHE": f"{folder}/cache"}, **options)
    return begin


@pytest.fixture(scope="module")
def command(start):
    """A function that waits for `python ARGUMENTS`, checks how it ended, and returns what it printed."""
    def run(*arguments, expect=0):
        process = start(*arguments)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, err
        return out, err
    return run


@pytest.fixture(scope="module")
def launch(command):
    """The same for `python launch.py OVERRIDES`."""
    return lambda *overrides, expect=0: command(LAUNCH, *overrides, expect=expect)


def replicas_of(folder):
    """Processes of actors that a command in this folder has started with workers of its own: they have its
    environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (b"ray::Replica" in (process / "cmdline").read_bytes()
                    and f"DE_RAY_CACHE={folder}/cache".encode() in (process / "environ").read_bytes()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def serial_run(launch, folder):
    """The output folder of a quick run in one process."""
    launch("pool=serial", "hydra.run.dir=serial", *QUICK)
    return folder / "serial"


def test_a_run_leaves_its_file_report_configuration_and_figures(serial_run):
    report = json.loads((serial_run / "report.json").read_text())
    assert report["decoded_equals_student"] and report["file_bytes"] == (serial_run / "student.der").stat().st_size
    assert (serial_run / "config.yaml").exists()
    assert {path.stem for path in (serial_run / "figures").iterdir()} == {"course", "layers", "levels", "pareto"}


def test_a_run_is_tracked_with_parameters_metrics_by_cycle_and_artifacts(serial_run, folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("de-ray digits").experiment_id])
    parent = next(run for run in found if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED" and parent.data.params["evolution.cycles"] == "3"
    assert {"ratio", "sparsity", "student_accuracy", "divergence_held_out"} <= parent.data.metrics.keys()
    assert len(client.get_metric_history(parent.info.run_id, "divergence")) == 4
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert names == {"student.der", "report.json", "config.yaml", "figures", "layers.json"}
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, "layers.json", folder)).read_text())
    assert [row[table["columns"].index("name")] for row in table["data"]] == ["fc1", "fc2", "fc3"]
    assert parent.info.run_name == "digits directed 0.9 swept bits seed 0"
    assert {"problem", "method", "commit"} <= parent.data.tags.keys()
    note = parent.data.tags["mlflow.note.content"]
    assert "python launch.py problem=digits problem.teacher.epochs=10 evolution.cycles=3" in note
    assert sum(run.data.tags.get("mlflow.parentRunId") == parent.info.run_id for run in found) == 4


@pytest.fixture(scope="module")
def multirun(start, folder):
    """The folder of a sweep with credentials planted in its address and its environment, and what it printed."""
    work = folder / "multirun_work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "DE_RAY_TEST_SECRET"):
            patch.setenv(name, PLANTED)
        process = start(LAUNCH, "-m", "evolution.sparsity=0.5,0.8", "pool=serial", f"hydra.sweep.dir={work}/sweep",
                        f"tracking.uri='sqlite:///{work}/runs.db?password={PLANTED}'", *QUICK)
        printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed[1]
    return work, printed


def test_a_multirun_shares_one_process_and_writes_a_folder_a_job(multirun):
    reports = [json.loads((multirun[0] / f"sweep/{job}/report.json").read_text()) for job in (0, 1)]
    assert reports[0]["sparsity"] < reports[1]["sparsity"]


def statuses(store):
    """(name, status, parent's name) of every run."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("de-ray digits").experiment_id])
    names = {run.info.run_id: run.info.run_name for run in found}
    return {(run.info.run_name, run.info.status, names.get(run.data.tags.get("mlflow.parentRunId"))) for run in found}


def test_the_jobs_of_a_multirun_are_grouped_under_one_run_and_their_widths_under_each(multirun):
    sweep, jobs = "digits evolution.sparsity=0.5,0.8", [f"digits directed {s} swept bits seed 0" for s in (0.5, 0.8)]
    found = statuses(f"sqlite:///{multirun[0]}/runs.db")
    assert {(sweep, "FINISHED", None), *((job, "FINISHED", sweep) for job in jobs)} <= found
    assert {(f"widths {number}", "FINISHED", job) for number in range(4) for job in jobs} <= found and len(found) == 11


def test_planted_credentials_are_in_nothing_that_a_run_writes_or_prints(multirun):
    work, printed = multirun
    assert PLANTED not in printed[0] + printed[1]
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {"multirun.yaml", "config.yaml", "report.json", "launch.log", "runs.db"} <= {path.name for path in files}
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    assert "password=..." in (work / "sweep/multirun.yaml").read_text()


def test_checkpoints_and_compressed_files_are_safetensors(multirun):
    files = [path for suffix in ("der", "safetensors") for path in multirun[0].rglob(f"*.{suffix}")]
    assert len(files) >= 6
    for path in files:
        data = path.read_bytes()
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        assert all("data_offsets" in entry for name, entry in header.items() if name != "__metadata__")


def test_a_multirun_that_is_killed_leaves_no_run_running(start, folder):
    process = start(LAUNCH, "-m", "seed=0,1", "pool=serial", "hydra.sweep.dir=killed",
                    f"tracking.uri=sqlite:///{folder}/killed.db", TEACHER)
    deadline = time.monotonic() + 120
    while not list(folder.glob("killed/0/checkpoint/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 143, err
    assert statuses(f"sqlite:///{folder}/killed.db") == {
        ("digits seed=0,1", "KILLED", None), ("digits directed 0.9 swept bits seed 0", "KILLED", "digits seed=0,1")}


def test_ctrl_c_leaves_no_processes_and_a_run_that_ray_and_tune_continue_to_the_serial_runs_file(
        start, launch, serial_run, folder):
    process = start(LAUNCH, "pool.actors=2", "tracking.enabled=false", "hydra.run.dir=broken", *QUICK, own_workers=True)
    deadline = time.monotonic() + 120
    while not replicas_of(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert replicas_of(folder), "seen, so that their absence means something"
    while not list((folder / "broken/checkpoint").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130, out + err
    assert "resume=" in out and not (folder / "broken/student.der").exists()
    assert not replicas_of(folder)
    made, log = set((folder / "outputs").glob("*/*")), folder / "broken/launch.log"
    before = log.read_text()
    launch("resume=broken")
    assert set((folder / "outputs").glob("*/*")) == made, "a folder beside the run's own"
    assert log.read_text().startswith(before) and len(log.read_text()) > len(before)
    assert (folder / "broken/student.der").read_bytes() == (serial_run / "student.der").read_bytes()
    assert list((folder / "broken/sweep").glob("WidthTrial*")), "Tune's records"


def test_inspect_shows_each_tensor_and_the_totals(command, serial_run):
    out, _ = command("-m", "de_ray", "inspect", serial_run / "student.der")
    size = (serial_run / "student.der").stat().st_size
    assert "fc1.weight" in out and "64" in out and f"{size:,}" in out and "ratio" in out


@pytest.fixture
def here(folder, monkeypatch):
    """This process in the working folder, for commands that need none of their own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DE_RAY_CACHE", str(folder / "cache"))


def test_evaluate_tells_what_the_report_told(serial_run, here, capsys):
    main(["evaluate", str(serial_run / "student.der"), "problem=digits", TEACHER])
    told, report = json.loads(capsys.readouterr().out), json.loads((serial_run / "report.json").read_text())
    assert told["decoded"]["metrics"] == report["decoded"] and told["teacher"]["metrics"] == report["teacher"]
    assert told["decoded"]["divergence"]["held_out"] == pytest.approx(report["divergence"]["held_out"])
    assert told["ratio"] == report["ratio"]


def test_evaluate_refuses_a_device_that_is_not_there(serial_run, here):
    with pytest.raises(SystemExit, match="^error: device='cuda:99': expected a GPU of this machine"):
        main(["evaluate", str(serial_run / "student.der"), "problem=digits", TEACHER, "device=cuda:99"])


def test_evaluate_on_a_gpu_without_room_is_one_clear_error(serial_run, here, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr("de_ray.problem.measure.measure", full)
    with pytest.raises(SystemExit, match=r"^error: CUDA out of memory\. .* 2\.00 GiB\. Take device=cpu$"):
        main(["evaluate", str(serial_run / "student.der"), "problem=digits", TEACHER])


def test_pictures_of_a_problem_that_has_none_are_one_clear_error(serial_run, here):
    with pytest.raises(SystemExit, match="^error: --pictures='digits.png'"):
        main(["evaluate", str(serial_run / "student.der"), "problem=digits", TEACHER, "--pictures", "digits.png"])


def test_a_folder_for_pictures_that_is_not_there_is_an_error_before_anything_is_read():
    with pytest.raises(SystemExit, match=r"error: --pictures='absent/a.png': no such folder"):
        main(["evaluate", "no.der", "problem=yolov3_tiny", "--pictures", "absent/a.png"])


def test_pictures_replace_no_file(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"error: --pictures='.*mine.png': there is such a file already"):
        main(["evaluate", "no.der", "problem=yolov3_tiny", "--pictures", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize(("overrides", "message"), [
    (["evolution.sparsity=1.5"], "evolution.sparsity=1.5: expected a number in [0, 1)"),
    (["evolution.sparsty=0.5"], "sparsty"),
    (["problem.include=[conv*]"], "conv*"),
    (["problem.teacher.checkpoint=missing.safetensors"], "missing.safetensors"),
    (["problem=custom", "problem.model=nowhere:build", "problem.calibration=inputs.npy"], "nowhere"),
    (["resume=nowhere"], "resume=nowhere"),
])
def test_a_mistake_is_one_clear_error_before_ray_starts(launch, overrides, message):
    _, err = launch(*overrides, expect=1)
    assert message in err and "Traceback" not in err
    assert "Ray" not in err


def test_a_mistyped_key_is_told_without_advice_that_fails_and_without_credentials(launch, folder):
    _, err = launch("evolution.sparsty=0.5", expect=1)
    assert err == "error: evolution.sparsty=0.5: no such key; did you mean evolution.sparsity?\n"
    _, err = launch("-m", f"tracking.url=http://user:{PLANTED}@host,x", expect=1)
    assert err == "error: tracking.url=http://host,x: no such key; did you mean tracking.uri?\n"


def test_a_refused_command_leaves_no_folder(launch, folder):
    launch("evolution.sparsity=1.5", "hydra.run.dir=refused", expect=1)
    assert not (folder / "refused").exists()


def test_a_command_refused_for_what_is_in_its_folder_leaves_that_as_it_was(launch, folder):
    (folder / "precious").mkdir()
    for name in ("student.der", "report.json", "empty.log"):
        (folder / "precious" / name).write_text("" if name == "empty.log" else "precious")
    before = {path: path.read_bytes() for path in (folder / "precious").iterdir()}
    _, err = launch("pool=serial", "hydra.run.dir=precious", expect=1)
    assert "student.der is there, and no run that made it" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in (folder / "precious").iterdir()} == before


def test_a_multirun_refuses_its_last_job_before_the_first_one_starts(launch, folder):
    _, err = launch("-m", "seed=0,1", "evolution.sparsity=0.5,1.5", "hydra.sweep.dir=half", expect=1)
    assert err == "error: seed=0 evolution.sparsity=1.5: evolution.sparsity=1.5: expected a number in [0, 1)\n"
    assert not (folder / "half").exists()


def test_a_multirun_refuses_a_device_or_a_start_of_its_last_job_before_the_first_one_starts(launch, folder):
    for override, told in (("device=cpu,cuda:99", r"error: device=cuda\:99: device='cuda:99': expected a GPU"),
                           ("start=null,absent.der", "error: start=absent.der: start='absent.der': no such file")):
        _, err = launch("-m", override, "hydra.sweep.dir=half", expect=1)
        assert err.startswith(told) and err.count("\n") == 1
    assert not (folder / "half").exists()


def test_a_file_that_is_not_ours_is_one_clear_error(command, folder):
    (folder / "other.der").write_bytes(b"something else")
    _, err = command("-m", "de_ray", "inspect", "other.der", expect=1)
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_users_own_model_is_compressed_from_the_command_line(command, launch, folder):
    (folder / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))\n")
    script = "import numpy as np; np.save('inputs.npy', np.random.default_rng(0).normal(size=(80, 2, 8)).astype('f4'))"
    command("-c", script)
    launch("problem=custom", "problem.model=mine:build", "problem.calibration=inputs.npy",
           "evolution.sparsity=0.5", "pool.actors=1", "tracking.enabled=false", "hydra.run.dir=mine",
           "quantization.bits=4", *QUICK[:-1])
    load = "import de_ray, mine; print(de_ray.load('mine/student.der', model=mine.build())[0].weight.shape)"
    assert "[6, 2, 3]" in command("-c", load)[0]
    assert json.loads((folder / "mine/report.json").read_text())["problem"] == "custom"


def test_reading_a_file_imports_no_heavy_package(serial_run, folder):
    code = ("import sys\nfor name in ('ray', 'hydra', 'omegaconf', 'mlflow', 'ultralytics'):\n"
            "    sys.modules[name] = None\n"
            "import de_ray\nprint(len(de_ray.load('serial/student.der')))")
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ended.stdout.strip() == "6", ended.stderr
