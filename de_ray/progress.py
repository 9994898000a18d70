"""Progress with rate and time left on a terminal or in a notebook; a line of log for each step elsewhere."""

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)


class Progress:
    """Use it as a context manager.

    Example:
        with Progress() as progress:
            progress.stage("evolve")
            progress.update(3, 20, "sparsity 40 %")
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        console = console or Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
            TextColumn("{task.fields[note]}"), console=console, transient=True,
            refresh_per_second=1 if console.is_jupyter else 10,  # notebooks are sent, and keep, each of them
        ) if _draws(console) else None
        self._task = None
        self._clock = clock
        self._name = ""
        self._started = 0.0
        self._before: int | None = None
        """Steps that were finished before the stage began: a resumed run has made them in an earlier sitting."""

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str) -> None:
        """Begin a stage, whose length is not known yet."""
        self._name, self._started, self._before = name, self._clock(), None
        if self._bar is None:
            log.info("%s", name)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=None, note="", pace="")

    def update(self, done: int, total: int, note: str) -> None:
        """Tell of a finished step; each of them is told of.

        Args:
            done: steps finished.
            total: steps of the stage.
            note: shown beside.
        """
        if self._before is None:
            self._before = done - 1
        seconds = max(self._clock() - self._started, 1e-9) / (done - self._before)  # per step
        pace = f"{_rate(seconds)}, {_duration((total - done) * seconds)} left"
        if self._bar is None:
            log.info("%s %d/%d: %s (%s)", self._name, done, total, note, pace)
            return
        self._bar.update(self._task, completed=done, total=total, note=note, pace=pace, refresh=True)


def _draws(console: Console) -> bool:
    """Whether a bar can be drawn and drawn again; in notebooks rich takes a widget for that."""
    return find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal


def _rate(seconds: float) -> str:
    """Steps a second, or seconds a step where those are the larger number."""
    return f"{1 / seconds:.1f}/s" if seconds < 1 else f"{seconds:.1f} s each"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
