"""Fixtures that all tests share."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.commands import Python

# Before torch is imported here or in a process that a test starts: threads beside other work wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `ensure_ray` has it: sessions that tests start by themselves would else let actors starve beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")

POOLS = {"test_evaluation.py", "test_faults.py", "test_parallel_refit.py", "test_sweep.py"}
"""Modules of pools and trials, which share a session of Ray. They follow each other."""
CLUSTERS = {"test_cluster_nodes.py", *POOLS}
"""Modules that keep Ray at work from within pytest."""
READY = pytest.StashKey[Callable[[], None]]()
"""Waits for what the processes that test side by side share."""


def pytest_configure(config: pytest.Config) -> None:
    """Start what they share while they collect."""
    if getattr(config.option, "tx", None) and not hasattr(config, "workerinput"):
        from tests.warm import start_shared

        config.stash[READY] = start_shared()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Have none of them begin before it is there."""
    node.config.stash[READY]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Three processes test side by side, since Ray's starts leave cores idle. A module stays in one of them, and so do
    all of `POOLS`.

    `--dist loadgroup` would do the same by marks, but does not keep groups together under pytest 9.2, silently: it puts
    their names into node ids, which do not change any more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = Path(nodeid.partition("::")[0]).name
            return "pools" if module in POOLS else module

    return Modules(config, log)


def pytest_collection_finish() -> None:
    """Spare looks for garbage what all test modules have imported; each run would look once, half a second long."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # fixtures are taken down before
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Modules that keep Ray at work may leave it running for each other, but for nobody else."""
    if item.path.name in CLUSTERS and (nextitem is None or nextitem.path.name not in CLUSTERS):
        import ray

        ray.shutdown()


@pytest.fixture
def session() -> None:
    """Ray in this process, in a session that tests share."""
    from tests.clusters import shared_session

    shared_session()


@pytest.fixture(scope="session")
def python() -> Iterator["Python"]:
    """Starts commands."""
    from tests.commands import Python

    started = Python()
    yield started
    started.close()


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
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16; PyTorch makes up for it where there is none."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in place of the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DE_RAY_CACHE", str(folder))
    return folder
