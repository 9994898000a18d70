"""What a compression leaves: the files of its folder, and its run in MLflow."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from de_ray.checkpoint import FOLDER, require_same, told
from de_ray.config import Config
from de_ray.figures import draw_all
from de_ray.files import write_atomically
from de_ray.fingerprint import fingerprint
from de_ray.pipeline import Result
from de_ray.problem.base import Problem
from de_ray.redact import scrub
from de_ray.report import write_json
from de_ray.schema import CONFIG_FILE, saved_config
from de_ray.tracking import Tracker

log = logging.getLogger(__name__)

STUDENT_FILE = "student.der"
REPORT_FILE = "report.json"
FIGURES = "figures"


def track_result(tracker: Tracker, report: dict, written: list[Path]) -> None:
    """Log what a finished compression is compared by, its layers, the trials of its widths and its files."""
    tracker.log_metrics(_final_metrics(report), len(report["history"]))
    layers = report["layers"]
    tracker.log_table({key: [layer[key] for layer in layers] for key in layers[0]}, "layers.json")
    for number, trial in enumerate(report["trials"]):
        with tracker.child(f"widths {number}") as child:
            child.log_params({"widths": ",".join(map(str, trial["widths"]))})
            child.log_metrics({"bytes": trial["bytes"], "divergence": trial["divergence"]}, 0)
    for path in written:
        tracker.log_artifact(path, FIGURES if path.suffix == ".png" else None)


def write_result(result: Result, problem: Problem, folder: Path) -> list[Path]:
    """Write the file, the figures and, at last, the report; returns the paths, the configuration's among them."""
    file = result.save(folder / STUDENT_FILE)
    figures = []
    try:
        pictures = problem.pictures and problem.pictures({"student": result.student, "decoded file": result.model})
        figures = draw_all(folder / FIGURES, result.report, result.survivors, pictures)
    except Exception:  # of matplotlib on the user's names and images: no figure is worth the report
        log.exception("the figures could not be drawn; the file and the report are written without them")
    write_json(folder / REPORT_FILE, result.report)
    return [file, folder / REPORT_FILE, folder / CONFIG_FILE, *figures]


def read_report(folder: Path) -> dict | None:
    """The report of a finished compression; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / REPORT_FILE
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; expected what a run wrote there. Removed, it is written "
                         "again when the run continues") from error


def require_free(folder: Path) -> Config | None:
    """Refuse a folder in which somebody else's files would be replaced, before anything in it changes.

    Returns:
        The configuration of the run that it holds; None: nothing was begun there.

    Raises:
        ValueError: saying which file is in the way.
    """
    if not (folder / CONFIG_FILE).is_file():  # a run writes it before anything that it could lose
        _require_none(folder, STUDENT_FILE, REPORT_FILE, FIGURES)
        return None
    begun = read_report(folder) is not None or (folder / FOLDER).is_dir()
    if not begun:
        _require_none(folder, STUDENT_FILE)
    earlier = saved_config(folder / CONFIG_FILE)  # raises for a file that no run wrote
    return earlier if begun else None


def _require_none(folder: Path, *names: str) -> None:
    for path in (folder / name for name in names):
        if path.exists():
            raise ValueError(f"{path} is there, and no run that made it: it would be replaced. Start in a new folder")


def require_own(problem: Problem, config: Config, folder: Path) -> None:
    """The same of a folder in which another run has finished or left checkpoints.

    Raises:
        ValueError: saying in what the runs differ, or as `require_free`.
    """
    earlier, finished = require_free(folder), read_report(folder) is not None
    if earlier is None:
        return
    then, now = fingerprint(problem, earlier), fingerprint(problem, config)
    if finished:  # its file depends on all of it
        then["quantization"], now["quantization"] = asdict(earlier.quantization), asdict(config.quantization)
        if different := told(then, now):
            raise ValueError(f"{folder} holds another run, which has finished: {different}. Start in a new folder")
    else:
        require_same({"fingerprint": then}, now)


def save_config(config: Config, folder: Path) -> None:
    """Write the configuration without the credentials that an address may carry: the file is tracked too."""
    write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(scrub(asdict(config)))).encode())


def _final_metrics(report: dict) -> dict[str, float]:
    """What runs are compared by."""
    metrics = {key: report[key] for key in ("sparsity", "ratio", "file_bytes", "bits_per_survivor", "evaluations")}
    metrics |= {f"divergence_{key}": value for key, value in report["divergence"].items()}
    for who in ("teacher", "student"):
        metrics |= {f"{who}_{key}": value for key, value in report[who].items()}
    return metrics
