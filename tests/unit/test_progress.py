"""Progress as people see it, on a terminal and elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from de_ray import progress
from de_ray.progress import Progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def log_of(caplog, clock, steps, stage="evolve"):
    """What is logged of steps (seconds it took, done, total) where there is no terminal."""
    caplog.set_level(logging.INFO)
    with Progress(Console(file=io.StringIO(), force_terminal=False), clock) as progress:
        progress.stage(stage)
        for seconds, done, total in steps:
            clock.now += seconds
            progress.update(done, total, "sparsity 40 %")
    return [record.getMessage() for record in caplog.records]


def test_without_a_terminal_a_step_is_a_line_of_log_and_nothing_is_drawn(caplog):
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(console) as progress:
        progress.stage("evolve")
        progress.update(3, 20, "sparsity 40 %")
    assert len(caplog.records) == 2 and "evolve 3/20: sparsity 40 %" in caplog.text
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_bar_where_it_has_widgets_and_a_log_elsewhere(caplog, monkeypatch, widgets):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets and name == "ipywidgets" else None)
    drawn = []
    monkeypatch.setattr("rich.live.Live.refresh", lambda live: drawn.append(live.renderable))
    with Progress(Console(file=io.StringIO(), force_jupyter=True)) as shown:
        shown.stage("evolve")
        shown.update(3, 20, "sparsity 40 %")
    assert bool(drawn) == widgets and ("evolve 3/20" in caplog.text) != widgets


def test_rate_and_time_left_follow_from_the_steps_made(caplog):
    lines = log_of(caplog, Clock(), [(2.0, 1, 20), (4.0, 2, 20)])
    assert lines[1:] == ["evolve 1/20: sparsity 40 % (2.0 s each, 0:38 left)",
                         "evolve 2/20: sparsity 40 % (3.0 s each, 0:54 left)"]


def test_a_resumed_run_does_not_count_the_steps_of_its_earlier_sitting(caplog):
    lines = log_of(caplog, Clock(), [(2.0, 16, 20), (2.0, 17, 20)])
    assert lines[-1].endswith("(2.0 s each, 0:06 left)")


@pytest.mark.parametrize(("seconds", "total", "pace"), [
    (0.1, 11, "10.0/s, 0:01 left"), (90.0, 3, "90.0 s each, 3:00 left"), (3661.0, 2, "3661.0 s each, 1:01:01 left")])
def test_fast_and_slow_steps_are_told_in_units_that_fit(caplog, seconds, total, pace):
    assert log_of(caplog, Clock(), [(seconds, 1, total)])[-1].endswith(f"({pace})")


def test_a_step_that_took_no_measurable_time_is_told_too(caplog):
    assert log_of(caplog, Clock(), [(0.0, 1, 2)])[-1].endswith("0:00 left)")


def test_a_terminal_shows_stage_bar_rate_and_time_left():
    clock, console = Clock(), Console(file=io.StringIO(), force_terminal=True, width=140)
    with Progress(console, clock) as progress:
        progress.stage("evolve")
        clock.now += 6
        progress.update(1, 3, "sparsity 40 %")
        progress.stage("quantize")
    text = console.file.getvalue()
    for expected in ("evolve", "1/3", "6.0 s each, 0:12 left", "sparsity 40 %", "quantize"):
        assert expected in text


def test_a_terminal_is_left_in_order_when_the_run_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with pytest.raises(RuntimeError), Progress(console) as progress:
        progress.stage("evolve")
        raise RuntimeError
    text = console.file.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
