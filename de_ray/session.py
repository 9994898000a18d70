"""One run as a user sees it: a folder, progress, tracking, figures, the final table."""

import logging
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.cluster.prepare import prepare
from de_ray.cluster.storage import Mirror
from de_ray.codec import decode
from de_ray.command import argument, command_line
from de_ray.config import Config
from de_ray.device import resolve_device
from de_ray.evaluation.members import EvaluationError
from de_ray.evolve import Record
from de_ray.minutes import with_minutes
from de_ray.pipeline import Result, run
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.progress import Progress
from de_ray.rate import size_limit
from de_ray.report import print_report
from de_ray.results import STUDENT_FILE, require_free, require_own, save_config, track_result, write_result
from de_ray.serving import saver
from de_ray.signals import ended_by_sigterm
from de_ray.tracking import RUN_FILE, Parent, Tracker, flatten
from de_ray.workload import with_threads

if TYPE_CHECKING:
    from de_ray.sweep.run import SweepResult

log = logging.getLogger(__name__)

UNKNOWN = "unknown"


def run_session(config: Config, folder: Path, parent: Parent | None = None) -> "Result | SweepResult":
    """Compress as configured and leave everything in a folder; with a sweep, do so at each of its points.

    Args:
        config: checked.
        folder: of the run; made where it is missing, continued where it holds checkpoints.
        parent: of the tracked run, where it is one of several.

    Raises:
        ValueError, OSError: the problem cannot be built, the folder is another run's, or the cluster or its storage
            cannot be used.
    """
    require_free(folder)
    config = with_what_is_there(config)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = prepare(config, folder)
    with ended_by_sigterm():
        problem = build_problem(config.problem, config.seed, config.device)
        size_limit(problem, config)  # a size that no file can have is told before anything is tracked
        # Before it is saved: a run may continue where there are other cores.
        config = with_minutes(problem, with_threads(problem, config), folder)
        require_own(problem, config, folder)
        save_config(config, folder)
        tracker = Tracker.start(config.tracking, _name(problem, config), _tags(problem, config),
                                f"de-ray {problem.name}", parent, folder / RUN_FILE)
        status = "FAILED"
        try:
            tracker.log_params(flatten(config))
            if config.sweep is not None:
                from de_ray.sweep.run import run_sweep

                result = run_sweep(problem, config, folder, tracker)
            else:
                result = _compress(problem, config, folder, tracker, mirror)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, EvaluationError, ConnectionError) as error:
            status, ended = ("FAILED", "stopped") if isinstance(error, Exception) else ("KILLED", "interrupted")
            elsewhere = f"; elsewhere with resume={mirror.uri}" if mirror.uri else ""
            log.error("%s; continue with: python launch.py %s%s", ended, argument("resume", folder), elsewhere)
            raise
        finally:
            tracker.end(status)
    mirror.push(final=True)
    return result


def _compress(problem: Problem, config: Config, folder: Path, tracker: Tracker, mirror: Mirror) -> Result:
    """One compression, tracked and mirrored as it goes on."""
    with Progress() as progress:
        def on_record(record: Record, total: int) -> None:
            progress.update(record.cycle, total, str(record))
            tracker.log_metrics({key: value for key, value in asdict(record).items()
                                 if isinstance(value, int | float) and key != "cycle"}, record.cycle)
            mirror.push()

        result = run(problem, config, folder, on_record, progress.stage)
    written = write_result(result, problem, folder)
    track_result(tracker, result.report, written)
    if config.tracking.model:
        tracker.log_model("student", saver(problem, folder / STUDENT_FILE, result.model, config.problem),
                          config.tracking.register)
    print_report(result.report, written)
    return result


def with_what_is_there(config: Config) -> Config:
    """The configuration, its start by a path that holds wherever a run's processes work and wherever it is resumed.

    Raises:
        ValueError: this machine has no such device, or the file to start from is missing or damaged. It is decoded
            once more when it is needed, which costs less than a teacher that was trained for nothing.
    """
    resolve_device(config.device)
    if config.start is None:
        return config
    path = Path(config.start).resolve()
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"start={config.start!r}: {error}; expected a compressed file of this teacher") from error
    return replace(config, start=str(path))


def _name(problem: Problem, config: Config) -> str:
    """What sets runs of a problem apart, as they are called in lists."""
    if config.sweep is not None:
        return f"{problem.name} {config.evolution.method} sweep seed {config.seed}"
    bits, aim = config.quantization.bits, f"{config.evolution.sparsity:.4g}"
    if config.target_ratio is not None:
        aim = f"to {config.target_ratio:g}x"
    elif config.target_bytes is not None:
        aim = f"to {config.target_bytes} bytes"
    return (f"{problem.name} {config.evolution.method} {aim} {'swept' if bits is None else bits} bits "
            f"seed {config.seed}")


def _tags(problem: Problem, config: Config) -> dict[str, str]:
    """Tags of a run; MLflow shows its own of them in columns and in the run's description."""
    commit = _commit()
    tags = {"problem": problem.name, "method": config.evolution.method, "commit": commit[:7],
            "mlflow.source.type": "LOCAL", "mlflow.source.name": "launch.py"}
    if commit != UNKNOWN:
        tags["mlflow.source.git.commit"] = commit
    if config.sweep is None:
        tags["mlflow.note.content"] = f"```\n{command_line(config)}\n```"
    return tags


def _commit() -> str:
    """The working folder's git commit, or "unknown"."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
