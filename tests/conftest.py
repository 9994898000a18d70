"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

# Before torch is imported here or in a process that a test starts: several threads beside other work wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
