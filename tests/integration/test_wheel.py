"""The package as an image installs it: a wheel in an environment that knows nothing of the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as the Dockerfile does: nothing of an earlier build may help."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("conf", "de_ray"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels",
                    "."], cwd=source, check=True, capture_output=True)
    found, = (source / "wheels").iterdir()
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of an environment with the wheel in it, and this one's other packages beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel],
                   check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A folder on the path, whose own .pth files, such as an editable install's, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Kernels that are compiled in the repository already are taken over; they belong to sources of the same age.
    for path in (REPOSITORY / "de_ray").rglob("*"):
        installed = site / path.relative_to(REPOSITORY)
        if path.suffix == ".py":
            shutil.copystat(path, installed)
        elif path.suffix in (".nbi", ".nbc"):
            shutil.copy(path, installed)
    return python


def test_the_wheel_holds_every_configuration_and_nothing_of_the_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {f"de_ray/conf/{path.relative_to(REPOSITORY / 'conf')}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert ours and ours <= names and "de_ray/problem/data/yolov3.cfg" in names
    assert not [name for name in names if name.startswith(("tests", "conf/", "build"))]


def test_a_run_from_a_folder_that_is_not_the_repository(environment, tmp_path):
    shutil.copy(REPOSITORY / "launch.py", tmp_path)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run([environment, "-c", "import de_ray.schema as s; print(s.CONF)"], cwd=tmp_path, text=True,
                           env=variables, capture_output=True, check=True).stdout
    assert Path(where.strip()).is_relative_to(environment.parents[1])
    (tmp_path / "mine.py").write_text("from torch import nn\n\n"
                                      "def build():\n    return nn.Sequential(nn.Linear(8, 4))\n")
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).normal(size=(80, 8)).astype("f4"))
    ended = subprocess.run([environment, "launch.py", "problem=custom", "problem.model=mine:build",
                            "problem.calibration=inputs.npy", "evolution.sparsity=0.5", "evolution.cycles=2",
                            "refit.final_steps=20", "quantization.bits=4", "quantization.refit_steps=10", "pool=serial",
                            "hydra.run.dir=run", "tracking.enabled=false", "+cluster=local"], cwd=tmp_path,
                           env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run/report.json").read_text())["decoded_equals_student"]


@pytest.mark.parametrize("command", [["-m", "de_ray.launch"], ["bin/de-ray"]])
def test_the_commands_need_no_launch_py(environment, tmp_path, command):
    run = [environment, *command] if command[0] == "-m" else [environment.with_name("de-ray")]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([*run, "cluster=aws"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: cluster=aws: type +cluster=aws")
    assert ended.stderr.count("\n") == 1
