"""MLflow tracking with one writer, the driver. A failure warns once and ends tracking, never the run."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.config import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own defaults keep a run waiting for minutes on a dead server. What the user has set stays."""


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


class Tracker:
    """A run of an experiment, or nothing at all once tracking has failed or where it is turned off."""

    def __init__(self, client: "MlflowClient | None", experiment: str = "", run: str = "") -> None:
        self._client, self._experiment, self._run = client, experiment, run

    @classmethod
    def start(cls, config: TrackingConfig, name: str, tags: dict[str, str]) -> "Tracker":
        """Open a run.

        Args:
            config: where to.
            name: of the run.
            tags: of the run.
        """
        if not config.enabled:
            return cls(None)
        for key, value in HTTP_SETTINGS.items():
            os.environ.setdefault(key, value)
        tracker = cls(None)
        with tracker._guarded():
            from mlflow import MlflowClient

            for chatty in ("mlflow", "alembic"):  # after the import, which sets their levels itself
                logging.getLogger(chatty).setLevel(logging.WARNING)

            uri = config.uri or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(config.experiment)
            experiment = found.experiment_id if found else client.create_experiment(
                config.experiment, None if config.uri else (Path.cwd() / "mlartifacts").as_uri())
            run = client.create_run(experiment, tags=tags, run_name=name)
            tracker = cls(client, experiment, run.info.run_id)
        return tracker

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn tracking off at its first failure, with a warning."""
        try:
            yield
        # Whatever MLflow, its database or its server may raise: none of it is worth a run.
        except Exception as error:
            self._client = None
            # A URI may carry a password before its @.
            reason = re.sub(r"//[^/@\s]*@", "//", f"{type(error).__name__}: {error}")
            log.warning("tracking with MLflow failed and is off for the rest of this run, which goes on: %s", reason)

    def _do(self, action: Callable[["MlflowClient"], object]) -> None:
        if self._client is not None:
            with self._guarded():
                action(self._client)

    def log_params(self, params: dict[str, object]) -> None:
        """Log parameters in one call."""
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import Param

            client.log_batch(self._run, params=[Param(key, str(value)) for key, value in params.items()])
        self._do(action)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics of a step in one call."""
        def action(client: "MlflowClient") -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(self._run, metrics=[Metric(key, float(value), now, step)
                                                 for key, value in metrics.items()])
        self._do(action)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, under a folder of the run's artifacts."""
        self._do(lambda client: client.log_artifact(self._run, str(path), folder))

    @contextlib.contextmanager
    def child(self, name: str) -> Iterator["Tracker"]:
        """A nested run, ended with the context."""
        nested = Tracker(None)

        def action(client: "MlflowClient") -> None:
            run = client.create_run(self._experiment, tags={"mlflow.parentRunId": self._run}, run_name=name)
            nested.__init__(client, self._experiment, run.info.run_id)
        self._do(action)
        try:
            yield nested
        finally:
            nested.end("FINISHED")

    def end(self, status: str) -> None:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        self._do(lambda client: client.set_terminated(self._run, status))
