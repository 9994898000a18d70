"""The driver's eye on the trials: a line of log, and a run of MLflow, for each.

Tune pickles its callbacks with the experiment and, in a resumed one, takes them from there. A tracker neither can be
pickled nor may be, for the address that it holds; so a callback travels as the name of its sweep's folder.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from ray.tune import Callback
from ray.tune.experiment import Trial

from de_ray.checks import last_line
from de_ray.config import Config
from de_ray.results import REPORT_FILE, STUDENT_FILE, read_report, track_result
from de_ray.schema import CONFIG_FILE
from de_ray.sweep.space import Point, label
from de_ray.sweep.trial import CYCLE, HALVINGS, place
from de_ray.tracking import RUN_FILE, Tracker, flatten

log = logging.getLogger(__name__)

STOPPED_FILE = "stopped"
"""Of a trial's folder: ASHA has stopped it, and it is not taken up again."""
_LIVE: dict[str, "Watch"] = {}
"""By folder, of the sweeps that this process is running."""


class Watch(Callback):
    """Use it as a context manager, around the sweep.

    Args:
        folder: of the sweep.
        tracker: of the sweep's run.
        points: by number.
        config: of a point.
    """

    def __init__(self, folder: Path, tracker: Tracker, points: list[Point], config: Callable[[Point], Config]) -> None:
        self._folder, self._tracker, self._points, self._config = folder, tracker, points, config
        self._open: dict[int, Tracker] = {}
        self.ended: set[int] = set()
        """Numbers of the trials that ended while this watched."""
        self.failed: dict[int, str] = {}
        """Why a trial failed, by number."""

    def __reduce__(self) -> tuple:
        return _find, (str(self._folder),)

    def __enter__(self) -> "Watch":
        _LIVE[str(self._folder)] = self
        return self

    def __exit__(self, *_: object) -> None:
        del _LIVE[str(self._folder)]
        for number in list(self._open):
            self._end(number, "KILLED")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        """See `Callback`, here and below."""
        self.track(trial.config["number"])

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **_: object) -> None:
        if CYCLE in result and HALVINGS not in result:
            kept = {key: result[key] for key in ("sparsity", "divergence", "evaluations", "seconds")}
            self.track(trial.config["number"]).log_metrics(kept, result[CYCLE])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        self.finish(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: object) -> None:
        number = trial.config["number"]
        # Tune's own reading of it, `get_error`, finds nothing before the file has been copied to the trial's folder.
        told = trial.error_file
        reason = last_line(told and Path(told).read_text().strip() or "no reason is known")
        self.failed[number] = reason
        log.warning("trial %d failed: %s (%s)", number, reason, label(self._points[number]))
        self._end(number, "FAILED")

    def has_ended(self, number: int) -> bool:
        """Whether a trial has come to an end, now or in an earlier sitting."""
        folder = place(self._folder, number)
        return number in self.ended or read_report(folder) is not None or (folder / STOPPED_FILE).exists()

    def track(self, number: int) -> Tracker:
        """The run of a trial."""
        if number not in self._open:
            point, folder = self._points[number], place(self._folder, number)
            folder.mkdir(parents=True, exist_ok=True)  # the trial itself may not have come so far
            self._open[number] = self._tracker.open_child(label(point), {"trial": str(number)}, folder / RUN_FILE)
            self._open[number].log_params(flatten(self._config(point)))
        return self._open[number]

    def finish(self, number: int) -> None:
        """Track a trial's result, or that it was stopped."""
        folder, told = place(self._folder, number), label(self._points[number])
        report = read_report(folder)
        if report is None:
            log.info("trial %d stopped at a rung (%s)", number, told)
            (folder / STOPPED_FILE).touch()
            self._end(number, "KILLED")
            return
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in report["student"].items())
        log.info("trial %d: ratio %.1fx, %s (%s)", number, report["ratio"], metrics, told)
        figures = sorted((folder / "figures").glob("*.png"))
        track_result(self.track(number), report, [folder / STUDENT_FILE, folder / REPORT_FILE, folder / CONFIG_FILE,
                                                  *figures])
        self._end(number, "FINISHED")

    def _end(self, number: int, status: str) -> None:
        self.track(number).end(status)
        del self._open[number]
        self.ended.add(number)


def _find(folder: str) -> Callback:
    """What stands for a watch in a pickle: the one that is running, or none where Tune's record is read elsewhere."""
    return _LIVE.get(folder, Callback())
