"""What a sweep has found: table, Pareto figure, and the best trial's command line."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from de_ray.command import command_line
from de_ray.config import Config
from de_ray.evaluation.members import EvaluationError
from de_ray.figures import draw_sweep
from de_ray.problem.base import Problem
from de_ray.quantization import pareto
from de_ray.report import print_sweep, write_json
from de_ray.results import read_report
from de_ray.sweep.space import Point, configure, label
from de_ray.sweep.trial import place
from de_ray.tracking import Tracker

log = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"
LOWER_IS_BETTER = ("divergence", "relative_error", "false_80", "mask_false_80")
"""Metrics that measure a distance, or count mistakes."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves."""

    report: dict
    """Of the best trial."""
    rows: list[dict]
    """A trial each, as `sweep.json` has them."""
    command: str
    """The command line of the best trial."""


def trial_row(folder: Path, number: int, point: Point, failure: str | None) -> dict:
    """What is told of a trial."""
    report = None if failure else read_report(place(folder, number))
    status = "failed" if failure else "stopped" if report is None else "finished"
    row = {"number": number, "point": point, "status": status} | ({"reason": failure} if failure else {})
    if report is not None:
        row |= {key: report[key] for key in ("sparsity", "ratio", "file_bytes", "bits_per_survivor")}
        row |= {"divergence": report["divergence"]["held_out"], "metrics": report["student"]}
    return row


def conclude(problem: Problem, config: Config, folder: Path, tracker: Tracker, rows: list[dict]) -> SweepResult:
    """Report the trials of a sweep.

    Raises:
        EvaluationError: none has finished.
    """
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        reason = next((row["reason"] for row in rows if "reason" in row), "all were stopped")
        raise EvaluationError(f"none of {len(rows)} trials has finished: {reason}")
    report = read_report(place(folder, finished[0]["number"]))
    metric = config.sweep.metric or next(iter(report["student"]), "divergence")
    teacher = 0.0 if metric == "divergence" else report["teacher"][metric]
    lower = metric in LOWER_IS_BETTER
    for row in finished:
        row["metric"] = row["divergence"] if metric == "divergence" else row["metrics"][metric]
    best = choose(finished, teacher, lower, config.sweep.tolerance)
    kept = {row["number"] for row in front(finished, lower)}
    for row in finished:
        row["front"] = row["number"] in kept
    labels = {row["number"]: label(row["point"]) for row in rows}
    command = command_line(configure(config, best["point"]))
    summary = {"problem": problem.name, "metric": metric, "lower_is_better": lower, "teacher": teacher,
               "best": best["number"], "command": command, "trials": rows}
    write_json(folder / SWEEP_FILE, summary)
    figure = draw_sweep(folder / "figures", summary, labels)
    tracker.log_metrics({"best_ratio": best["ratio"], f"best_{metric}": best["metric"], "trials": len(rows),
                         "trials_finished": len(finished)}, 0)
    tracker.log_table(_columns(rows), "trials.json")
    written = [folder / SWEEP_FILE, figure]
    for path in written:
        tracker.log_artifact(path, "figures" if path.suffix == ".png" else None)
    tracker.set_note(f"best: trial {best['number']}, {best['ratio']:.1f}x at {metric} {best['metric']:.4g}\n\n"
                     f"```\n{command}\n```")
    print_sweep(summary, labels, written)
    log.info("the best of %d trials: %s", len(rows), command)
    return SweepResult(read_report(place(folder, best["number"])), rows, command)


def front(rows: list[dict], lower: bool) -> list[dict]:
    """Trials that no other one beats in both ratio and metric, the largest ratio first."""
    sign = 1 if lower else -1
    return pareto.front(rows, lambda row: -row["ratio"], lambda row: sign * row["metric"])


def choose(rows: list[dict], teacher: float, lower: bool, tolerance: float) -> dict:
    """The smallest file whose metric is close enough to the teacher's; where there is none, the best metric."""
    allowed = tolerance * (abs(teacher) or 1.0)
    loss = [(row["metric"] - teacher) * (1 if lower else -1) for row in rows]
    close = [row for row, lost in zip(rows, loss, strict=True) if lost <= allowed]
    if close:
        return max(close, key=lambda row: row["ratio"])
    log.warning("no trial is within sweep.tolerance=%g of the teacher's metric: the best is the one with the best "
                "metric, whatever its size", tolerance)
    return rows[min(range(len(rows)), key=lambda index: (math.isnan(loss[index]), loss[index]))]


def _columns(rows: list[dict]) -> dict[str, list]:
    """Trials as a table; gaps where a trial has not finished."""
    keys = ["sparsity", "ratio", "file_bytes", "divergence"]
    table = {"trial": [row["number"] for row in rows], "status": [row["status"] for row in rows]}
    table |= {key: [row["point"].get(key) for row in rows] for key in rows[0]["point"]}
    table |= {key: [row.get(key) for row in rows] for key in keys}
    return table | {"metric": [row.get("metric") for row in rows], "front": [row.get("front", False) for row in rows]}
