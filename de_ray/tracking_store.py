"""Which MLflow store a run is tracked in, opened at once or not at all."""

import contextlib
import logging
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.config import TrackingConfig
from de_ray.files import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONNECT_SECONDS = 10
"""Patience with a database server."""
URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable, which decides where the configuration does not."""
QUIET = {"mlflow": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL, "alembic": logging.WARNING,
         "mlflow.system_metrics": logging.CRITICAL, "urllib3.connectionpool": logging.ERROR}
"""Loggers that would tell of each migration, of each retry, and with a traceback of what is raised anyway. The one of
system metrics warns for itself when tracking has failed, which is told once already."""


PROCESS = "process"
"""The tag that tells which process writes a run: host, process id, second of its start."""


def address(config: TrackingConfig) -> str | None:
    """The tracking URI that the configuration or the environment gives; None: the store in the working folder."""
    return config.uri or os.environ.get(URI) or None


def open_store(uri: str | None) -> "MlflowClient":
    """A client of a store, which is made where it is the working folder's and missing.

    Raises:
        Whatever MLflow, SQLAlchemy or a server's driver raises.
    """
    from mlflow import MlflowClient

    for name, level in QUIET.items():  # after the import, which sets levels itself
        logging.getLogger(name).setLevel(level)
    if uri is None:
        path = Path.cwd() / "mlflow.db"
        uri = _sqlite(path)
        if not path.exists():
            _create_store(path)
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        _try_database(uri)
    return MlflowClient(uri)


def _sqlite(path: Path) -> str:
    """The address of an SQLite file.

    Raises:
        ValueError: it would be read as another file's, at which MLflow would try for 100 seconds.
    """
    from sqlalchemy.engine import make_url

    uri = f"sqlite:///{path}"
    if make_url(uri).database != str(path):
        raise ValueError(f"{str(path)!r}: expected a path without ? and %; run in another folder, or set tracking.uri")
    return uri


def _create_store(path: Path) -> None:
    """Make an SQLite store in an instant and as a whole.

    MLflow migrates a new store through its schema's history with a flush to disk at each step, which takes seconds, and
    two runs that do so to one file at once break it. Hence it is made aside, without flushes, and then put into place.
    """
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def no_flush(connection: object, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        draft, complete = Path(folder) / "draft.db", Path(folder) / "complete.db"
        event.listen(Engine, "connect", no_flush)
        try:
            MlflowClient(_sqlite(draft)).get_experiment_by_name("Default")
        finally:
            event.remove(Engine, "connect", no_flush)
        write_atomically(complete, draft.read_bytes())
        # Unlike a rename, a link leaves alone what another run may have put there meanwhile. On a file system without
        # links MLflow makes the store in its own slow way.
        with contextlib.suppress(OSError):
            os.link(complete, path)


def _try_database(uri: str) -> None:
    """Raise at once where a database cannot be opened: MLflow would try again for 100 seconds."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    patience = {"connect_timeout": CONNECT_SECONDS} if uri.startswith(("postgresql", "mysql")) else {}
    with create_engine(uri, poolclass=NullPool, connect_args=patience).connect():
        pass


def experiment_id(client: "MlflowClient", name: str, uri: str | None) -> str:
    """The id of the experiment with a name; it is made where it is missing."""
    from mlflow import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # A server knows where its artifacts go; beside the default store they go into the working folder.
    artifacts = None if uri else (Path.cwd() / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifacts)
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id  # another run made it in between


def process_tag() -> dict[str, str]:
    """Names this process."""
    import psutil

    return {PROCESS: f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.0f}"}


def end_orphans(client: "MlflowClient", experiment: str) -> None:
    """Mark as killed what this machine's processes were writing when they were killed without a chance to say so."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        host, _, process = run.data.tags.get(PROCESS, "").partition("/")
        if host == socket.gethostname() and not _alive(*process.split("/")):
            client.set_terminated(run.info.run_id, "KILLED")


def _alive(process: str, started: str) -> bool:
    import psutil

    try:
        return abs(psutil.Process(int(process)).create_time() - float(started)) <= 1  # numbers are used again
    except psutil.NoSuchProcess:
        return False
