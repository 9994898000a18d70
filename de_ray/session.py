"""One run as a user sees it: a folder, progress, tracking, figures, the final table."""

import dataclasses
import logging
import subprocess
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from de_ray.cluster.prepare import prepare
from de_ray.config import Config
from de_ray.evolve import Record
from de_ray.figures import draw_all
from de_ray.files import write_atomically
from de_ray.pipeline import Result, run
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.progress import Progress
from de_ray.report import print_report, write_json
from de_ray.schema import CONFIG_FILE
from de_ray.tracking import Tracker, flatten, without_credentials

log = logging.getLogger(__name__)

STUDENT_FILE = "student.der"
REPORT_FILE = "report.json"


def run_session(config: Config, folder: Path) -> Result:
    """Compress as configured and leave everything in a folder.

    Args:
        config: checked.
        folder: of the run; made where it is missing, continued where it holds checkpoints.

    Raises:
        ValueError, OSError: the problem cannot be built, the folder is another run's, or the cluster or its storage
            cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mirror = prepare(config, folder)
    problem = build_problem(config.problem, config.seed)
    write_atomically(folder / CONFIG_FILE, _saved(config).encode())
    name = f"{problem.name} {config.evolution.method} {config.evolution.sparsity:.4g} seed {config.seed}"
    tracker = Tracker.start(config.tracking, name, {"problem": problem.name, "method": config.evolution.method,
                                                    "commit": _commit()})
    status = "FAILED"
    try:
        tracker.log_params(flatten(config))
        with Progress() as progress:
            def on_record(record: Record, total: int) -> None:
                progress.update(record.cycle, total,
                                f"sparsity {record.sparsity:.2%}, divergence {record.divergence:.4g}")
                tracker.log_metrics({key: value for key, value in asdict(record).items()
                                     if isinstance(value, int | float) and key != "cycle"}, record.cycle)
                mirror.push()

            result = run(problem, config, folder, on_record, progress.stage)
        written = _write(result, problem, folder)
        tracker.log_metrics(_final_metrics(result.report), len(result.report["history"]))
        for number, trial in enumerate(result.report["trials"]):
            with tracker.child(f"trial {number}") as child:
                child.log_params({"widths": ",".join(map(str, trial["widths"]))})
                child.log_metrics({"bytes": trial["bytes"], "divergence": trial["divergence"]}, 0)
        for path in written:
            tracker.log_artifact(path, "figures" if path.suffix == ".png" else None)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        elsewhere = f"; elsewhere with resume={mirror.uri}" if mirror.uri else ""
        log.error("interrupted; continue with: python launch.py resume=%s%s", folder, elsewhere)
        raise
    finally:
        tracker.end(status)
    print_report(result.report, written)
    mirror.push(final=True)
    return result


def _write(result: Result, problem: Problem, folder: Path) -> list[Path]:
    """Write the file, the report and the figures; returns the paths, the configuration's among them."""
    report = folder / REPORT_FILE
    write_json(report, result.report)
    file = result.save(folder / STUDENT_FILE)
    pictures = problem.pictures and problem.pictures({"student": result.student, "decoded file": result.model})
    return [file, report, folder / CONFIG_FILE,
            *draw_all(folder / "figures", result.report, result.survivors, pictures)]


def _saved(config: Config) -> str:
    """The configuration as YAML, without the password that a tracking URI may carry: the file is tracked too."""
    uri = config.tracking.uri and without_credentials(config.tracking.uri)
    shown = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=uri))
    return OmegaConf.to_yaml(OmegaConf.structured(shown))


def _final_metrics(report: dict) -> dict[str, float]:
    """What runs are compared by."""
    metrics = {key: report[key] for key in ("sparsity", "ratio", "file_bytes", "bits_per_survivor", "evaluations")}
    metrics |= {f"divergence_{key}": value for key, value in report["divergence"].items()}
    for who in ("teacher", "student"):
        metrics |= {f"{who}_{key}": value for key, value in report[who].items()}
    return metrics


def _commit() -> str:
    """The working folder's git commit, or "unknown"."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
