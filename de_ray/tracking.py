"""MLflow tracking with one writer, the driver. A failure warns once and ends tracking, never the run."""

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.config import TrackingConfig
from de_ray.files import write_atomically

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""MLflow's own defaults keep a run waiting for minutes on a dead server, report its use to its makers, and print a
server's address, with the password in it, as each run ends. What the user has set stays."""
CONNECT_SECONDS = 10
"""Patience with a database server."""
QUIET = {"mlflow": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL, "alembic": logging.WARNING,
         "urllib3.connectionpool": logging.ERROR}
"""Loggers that would tell of each migration, of each retry, and with a traceback of what is raised anyway."""
PARAMS_A_CALL = 100
"""MLflow's limit."""


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """A dataclass's fields with dotted keys, nested ones included; lists as comma-separated text."""
    flat: dict[str, object] = {}
    for key, value in (config if isinstance(config, dict) else asdict(config)).items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


class Connection:
    """A store and an experiment in it, shared by a run and its children; off after the first failure."""

    def __init__(self) -> None:
        self.client: MlflowClient | None = None
        self.experiment = ""

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn tracking off when something fails, with a warning."""
        try:
            yield
        # Whatever MLflow, its database or its server may raise: none of it is worth a run.
        except Exception as error:  # noqa: BLE001
            self.client = None
            reason = str(error).strip().partition("\n")[0]
            log.warning("tracking with MLflow failed and is off for the rest of this run, which goes on: %s: %s",
                        type(error).__name__, without_credentials(reason))


class Tracker:
    """A run of an experiment, or nothing at all once tracking has failed or where it is turned off.

    Example:
        tracker = Tracker.start(config.tracking, "digits", {"method": "directed"})
        tracker.log_metrics({"divergence": 0.01}, step=1)
        with tracker.child("trial 0") as trial:
            trial.log_params({"widths": "4,4,3"})
        tracker.end("FINISHED")
    """

    def __init__(self, connection: Connection, run: "Run | None") -> None:
        self._connection = connection
        self._run = run.info.run_id if run is not None else ""

    @classmethod
    def start(cls, config: TrackingConfig, name: str, tags: dict[str, str]) -> "Tracker":
        """Open a run.

        Args:
            config: where to.
            name: of the run.
            tags: of the run.
        """
        connection, run = Connection(), None
        if config.enabled:
            for key, value in SETTINGS.items():
                os.environ.setdefault(key, value)
            with connection.guarded():
                client = _client(config.uri)
                connection.experiment = _experiment(client, config)
                run = client.create_run(connection.experiment, tags=tags, run_name=name)
                connection.client = client
        return cls(connection, run)

    def _do(self, action: Callable[["MlflowClient"], "Run | None"]) -> "Run | None":
        if self._connection.client is not None:
            with self._connection.guarded():
                return action(self._connection.client)
        return None

    def log_params(self, params: dict[str, object]) -> None:
        """Log parameters; credentials in addresses are left out."""
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import Param

            named = {_key(key): without_credentials(str(value)) for key, value in params.items()}
            entries = [Param(key, value) for key, value in named.items()]
            for start in range(0, len(entries), PARAMS_A_CALL):
                client.log_batch(self._run, params=entries[start:start + PARAMS_A_CALL])
        self._do(action)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics of a step in one call."""
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(self._run, metrics=[Metric(_key(key), float(value), now, step)
                                                 for key, value in metrics.items()])
        self._do(action)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, under a folder of the run's artifacts."""
        self._do(lambda client: client.log_artifact(self._run, str(path), folder))

    @contextlib.contextmanager
    def child(self, name: str) -> Iterator["Tracker"]:
        """A nested run, ended with the context: FINISHED, or FAILED where an exception leaves it."""
        nested = Tracker(self._connection, self._do(lambda client: client.create_run(
            self._connection.experiment, tags={"mlflow.parentRunId": self._run}, run_name=name)))
        status = "FAILED"
        try:
            yield nested
            status = "FINISHED"
        finally:
            nested.end(status)

    def end(self, status: str) -> None:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        self._do(lambda client: client.set_terminated(self._run, status))


def without_credentials(text: str) -> str:
    """A text whose addresses have lost what stands before their @, and passwords and tokens in their queries."""
    return re.sub(r"(?i)((?:password|passwd|pwd|token|secret)=)[^&\s'\"]*", r"\1...", re.sub(r"//\S*@", "//", text))


def _key(name: str) -> str:
    """A name of a parameter or metric that MLflow accepts: a layer's glob, say, has characters that it refuses."""
    return re.sub(r"[^\w.:/ -]", "_", name)


def _client(uri: str | None) -> "MlflowClient":
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


def _experiment(client: "MlflowClient", config: TrackingConfig) -> str:
    """The experiment's id; it is made where it is missing."""
    from mlflow import MlflowException

    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return found.experiment_id
    # A server knows where its artifacts go; beside the default store they go into the working folder.
    artifacts = None if config.uri else (Path.cwd() / "mlartifacts").as_uri()
    try:
        return client.create_experiment(config.experiment, artifacts)
    except MlflowException:
        found = client.get_experiment_by_name(config.experiment)
        if found is None:
            raise
        return found.experiment_id  # another run made it in between
