"""Progress with rate and time left on a terminal; a line of log for each step elsewhere."""

import logging
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)


class Progress:
    """Use it as a context manager.

    Example:
        with Progress() as progress:
            progress.stage("evolve")
            progress.update(3, 20, "sparsity 40 %")
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True,
        ) if console.is_terminal else None
        self._task = None
        self._name = ""
        self._started = 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str) -> None:
        """Begin a stage, whose length is not known yet."""
        self._name, self._started = name, time.perf_counter()
        if self._bar is None:
            log.info("%s", name)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=None, note="", rate="")

    def update(self, done: int, total: int, note: str) -> None:
        """Tell of a finished step.

        Args:
            done: steps finished.
            total: steps of the stage.
            note: shown beside.
        """
        if self._bar is None:
            log.info("%s %d/%d: %s", self._name, done, total, note)
            return
        rate = f"{done / max(time.perf_counter() - self._started, 1e-9):.2f}/s"
        self._bar.update(self._task, completed=done, total=total, note=note, rate=rate, refresh=True)
