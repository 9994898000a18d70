"""The jobs of `python launch.py -m ...` under one run of MLflow.

Hydra calls `MultirunParent` in the process that launches the jobs; these find their parent through a file in the
sweep's folder, so that it does not matter whether they share that process.
"""

import atexit
import json
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from de_ray.files import write_atomically
from de_ray.redact import scrub, without_credentials
from de_ray.schema import to_config
from de_ray.signals import exit_on_sigterm
from de_ray.tracking import Parent, Tracker

PARENT_FILE = "mlflow_parent.json"
HYDRAS_FILE = "multirun.yaml"
"""What Hydra writes into the sweep's folder: the overrides as they were typed."""


class MultirunParent(Callback):
    """Opens the parent run before the first job and ends it after the last, or as the process exits."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Open the parent."""
        overrides = list(config.hydra.overrides.task)
        parsed = OverridesParser.create().parse_overrides(overrides)
        swept = [override for override in parsed if override.is_sweep_override()]
        if config.hydra.sweeper._target_.endswith(BasicSweeper.__name__):
            _check_jobs(config.hydra.job.config_name, parsed)
        problem = None if any(override.get_key_element() == "problem" for override in swept) else config.problem.name
        name = " ".join([problem or "", *(override.input_line for override in swept)]).strip()
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PARENT_FILE).unlink(missing_ok=True)  # of an earlier sweep into this folder
        exit_on_sigterm()
        self._tracker = Tracker.start(
            OmegaConf.to_object(config.tracking), without_credentials(name), {
                "mlflow.source.type": "LOCAL", "mlflow.source.name": "launch.py",
                "mlflow.note.content": without_credentials(f"```\npython launch.py -m {' '.join(overrides)}\n```")},
            f"de-ray {problem}" if problem else "de-ray")
        atexit.register(self._end, None)
        identity = self._tracker.identity
        if identity is not None:
            write_atomically(folder / PARENT_FILE, json.dumps(vars(identity)).encode())

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Take credentials out of Hydra's own file, which it has written by now."""
        path = Path(config.hydra.sweep.dir) / HYDRAS_FILE
        if config.hydra.mode == RunMode.MULTIRUN and path.is_file():
            written = OmegaConf.to_container(OmegaConf.load(path))
            clean = scrub(written)
            if clean != written:
                write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(clean)).encode())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All jobs have ended well: one that does not ends the process."""
        self._end("FINISHED")

    def _end(self, status: str | None) -> None:
        """End the parent, once; without a status as its jobs tell."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.end(status or ("KILLED" if "KILLED" in tracker.child_statuses() else "FAILED"))


def _check_jobs(name: str, overrides: list[Override]) -> None:
    """End the process unless the configurations of all jobs are allowed: the last may start in a day."""
    from de_ray.session import with_what_is_there  # which imports torch

    loader, there = GlobalHydra.instance().config_loader(), set()
    for job in BasicSweeper.split_arguments(overrides, None)[0]:
        try:
            composed = loader.load_configuration(name, job, RunMode.RUN)
            with open_dict(composed):
                del composed["hydra"]
            config = to_config(composed)
            if (config.device, config.start) not in there:  # a start takes its time to decode
                with_what_is_there(config)
                there.add((config.device, config.start))
        except (ValueError, OmegaConfBaseException, HydraException) as error:
            # Hydra takes any other exception of a callback for a warning.
            sys.exit(without_credentials(f"error: {' '.join(job)}: {error}"))


def parent_of(hydra_config: DictConfig) -> Parent | None:
    """The parent of a multirun's job; None for a run of its own, or where nothing is tracked."""
    if hydra_config.mode != RunMode.MULTIRUN:
        return None
    path = Path(hydra_config.sweep.dir) / PARENT_FILE
    return Parent(**json.loads(path.read_text())) if path.is_file() else None
