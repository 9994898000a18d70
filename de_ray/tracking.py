"""MLflow tracking with one writer, the driver. A failure warns once and ends tracking, never the run."""

import contextlib
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.config import TrackingConfig
from de_ray.files import write_atomically
from de_ray.redact import without_credentials
from de_ray.signals import uninterrupted
from de_ray.tracking_store import address, end_orphans, experiment_id, open_store, process_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import Model
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""MLflow's own defaults keep a run waiting for minutes on a dead server, report its use to its makers, and print a
server's address, with the password in it, as each run ends. What the user has set stays."""
RUN_FILE = "mlflow_run.json"
"""In a run's folder: its run of MLflow, with which a later sitting goes on."""
NOTE = "mlflow.note.content"
"""The tag that is shown as a run's description."""
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


@dataclass(frozen=True)
class Parent:
    """A run that others are nested under, the jobs of a multirun say."""

    experiment: str
    """The experiment's id."""
    run: str
    """The run's id."""


class Connection:
    """A store and an experiment in it, shared by a run and its children; off after the first failure."""

    def __init__(self) -> None:
        self.client: MlflowClient | None = None
        self.lost: MlflowClient | None = None
        """What `client` was before the failure."""
        self.experiment = ""

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn tracking off when something fails, with a warning; what interrupts the run waits for the store."""
        try:
            with uninterrupted():
                yield
        # Whatever MLflow, its database or its server may raise: none of it is worth a run.
        except Exception as error:  # noqa: BLE001
            self.client, self.lost = None, self.client
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
        self._params = frozenset(run.data.params) if run is not None else frozenset()  # of an earlier sitting
        self._monitor: SystemMetricsMonitor | None = None

    @classmethod
    def start(cls, config: TrackingConfig, name: str, tags: Mapping[str, str], experiment: str = "de-ray",
              parent: Parent | None = None, record: Path | None = None) -> "Tracker":
        """Open a run, or go on with the one that an earlier sitting has opened.

        Args:
            config: where to.
            name: of the run.
            tags: of the run.
            experiment: its name, where the configuration gives none.
            parent: what the run is nested under; in that one's experiment.
            record: a file that names the run for later sittings; None: there will be none.
        """
        connection, run = Connection(), None
        if not config.enabled:
            return cls(connection, None)
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        nested = {"mlflow.parentRunId": parent.run} if parent else {}
        with connection.guarded():
            uri = address(config)
            client = open_store(uri)
            connection.experiment = (parent.experiment if parent else
                                     experiment_id(client, config.experiment or experiment, uri))
            end_orphans(client, connection.experiment)
            run = (_resumed(client, record, connection.experiment) or
                   client.create_run(connection.experiment, tags={**tags, **nested, **process_tag()}, run_name=name))
            connection.client = client
        tracker = cls(connection, run)
        tracker._write(record)
        if config.system_metrics:
            tracker._watch_system()
        return tracker

    def _write(self, record: Path | None) -> None:
        if record is not None and self.identity is not None:
            write_atomically(record, json.dumps(vars(self.identity)).encode())

    @property
    def identity(self) -> Parent | None:
        """The run as others' parent; None where nothing is tracked."""
        return Parent(self._connection.experiment, self._run) if self._run else None

    def _do(self, action: Callable[["MlflowClient"], "Run | None"]) -> "Run | None":
        if self._connection.client is not None:
            with self._connection.guarded():
                return action(self._connection.client)
        return None

    def _watch_system(self) -> None:
        """Processors, memory, disk and network, sampled by MLflow's own thread."""
        def action(client: "MlflowClient") -> None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._run, resume_logging=bool(self._params),
                                                 tracking_uri=client.tracking_uri)
            self._monitor.start()
        self._do(action)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters; credentials are left out, and so is what is not set, since a "None" among numbers would keep
        MLflow from comparing them. What an earlier sitting logged stays: MLflow lets no parameter change."""
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import Param

            entries = [Param(_key(key), without_credentials(str(value))) for key, value in params.items()
                       if value is not None and _key(key) not in self._params]
            for start in range(0, len(entries), PARAMS_A_CALL):
                client.log_batch(self._run, params=entries[start:start + PARAMS_A_CALL])
        self._do(action)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
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

    def log_table(self, columns: Mapping[str, Sequence[object]], file: str) -> None:
        """Log a table that MLflow's pages show as one, and join with the tables of other runs.

        Args:
            columns: of equal length.
            file: its name, ending in `.json`.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # between MLflow's pandas and the installed one
            self._do(lambda client: client.log_table(self._run, dict(columns), file))

    def log_model(self, name: str, save: Callable[[Path, "Model"], None], register: str | None = None) -> None:
        """Log a model with the run.

        Args:
            name: of the model.
            save: writes it into a folder, as MLflow's flavours do.
            register: a name in the model registry, of which it becomes a new version.
        """
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import LoggedModelOutput
            from mlflow.models import Model

            # `pyfunc.log_model` would need the process's one global store, which jobs of a multirun share.
            logged = client.create_logged_model(self._connection.experiment, name, self._run)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model"
                save(path, Model(artifact_path=logged.artifact_location, run_id=self._run,
                                 model_uuid=logged.model_id, model_id=logged.model_id))
                client.log_model_artifacts(logged.model_id, str(path))
            client.finalize_logged_model(logged.model_id, "READY")
            client.log_outputs(self._run, [LoggedModelOutput(logged.model_id, 0)])
            if register is not None:
                _register(client, register, logged.model_id, self._run)
        self._do(action)

    def set_note(self, text: str) -> None:
        """Set what MLflow's pages show as the run's description, in Markdown."""
        self._do(lambda client: client.set_tag(self._run, NOTE, text))

    def open_child(self, name: str, tags: Mapping[str, str] | None = None, record: Path | None = None) -> "Tracker":
        """A nested run, to be ended by `end`; see `start` for `record`."""
        def action(client: "MlflowClient") -> "Run":
            return _resumed(client, record, self._connection.experiment) or client.create_run(
                self._connection.experiment, run_name=name,
                tags={**(tags or {}), "mlflow.parentRunId": self._run, **process_tag()})

        child = Tracker(self._connection, self._do(action))
        child._write(record)
        return child

    @contextlib.contextmanager
    def child(self, name: str) -> Iterator["Tracker"]:
        """A nested run, ended with the context: FINISHED, or FAILED where an exception leaves it."""
        nested = self.open_child(name)
        status = "FAILED"
        try:
            yield nested
            status = "FINISHED"
        finally:
            nested.end(status)

    def child_statuses(self) -> set[str]:
        """Statuses of the nested runs; none where nothing is tracked."""
        found: set[str] = set()

        def action(client: "MlflowClient") -> None:
            runs = client.search_runs([self._connection.experiment], f"tags.`mlflow.parentRunId` = '{self._run}'")
            found.update(run.info.status for run in runs)
        self._do(action)
        return found

    def end(self, status: str) -> None:
        """End the run, after a failure too if the store answers again: a run must not seem to go on for ever.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._monitor is not None:
            with contextlib.suppress(Exception):  # what it has not written is not worth a word
                self._monitor.finish()
            self._monitor = None
        if self._run and self._connection.lost is not None:
            with contextlib.suppress(Exception):  # that tracking has failed was told
                self._connection.lost.set_terminated(self._run, status)
            return
        self._do(lambda client: client.set_terminated(self._run, status))


def _resumed(client: "MlflowClient", record: Path | None, experiment: str) -> "Run | None":
    """The run that a file names, running again; None where there is no such file, or the store has no such run."""
    from mlflow import MlflowException

    if record is None or not record.is_file():
        return None
    named = Parent(**json.loads(record.read_text()))
    if named.experiment != experiment:
        return None
    try:
        run = client.get_run(named.run)
        client.update_run(named.run, status="RUNNING")
    except MlflowException:  # another store, or the run was deleted
        return None
    for key, value in process_tag().items():
        client.set_tag(named.run, key, value)
    return run


def _register(client: "MlflowClient", name: str, model: str, run: str) -> None:
    """Make a logged model a new version of a registered one, which is made where it is missing."""
    from mlflow import MlflowException

    with contextlib.suppress(MlflowException):  # it is there; any other reason is told by the next call
        client.create_registered_model(name)
    client.create_model_version(name, f"models:/{model}", run, model_id=model)


def _key(name: str) -> str:
    """A name of a parameter or metric that MLflow accepts: a layer's glob, say, has characters that it refuses."""
    return re.sub(r"[^\w.:/ -]", "_", name)
