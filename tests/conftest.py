"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest
import torch

RAY = {"test_cluster.py", "test_commands.py", "test_evaluation.py", "test_faults.py", "test_parallel_refit.py",
       "test_sweep.py", "test_sweep_tune.py"}
"""Modules that keep Ray at work. One process runs them all: two sessions at a time would wait for each other's actors
longer than they compute."""

torch.set_num_threads(1)  # two processes test side by side


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests of a module stay in one process, which makes its fixtures once."""
    item.add_marker(pytest.mark.xdist_group("ray" if item.path.name in RAY else item.path.name))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets. Without it tests are skipped, but not in continuous integration: there it fails."""
    data = os.environ.get("DE_RAY_DATA")
    if data and Path(data).is_dir():
        return Path(data)
    reason = f"needs real data sets: DE_RAY_DATA={data!r} is no folder"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in place of the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DE_RAY_CACHE", str(folder))
    return folder
