"""Trials of a sweep, their Pareto front and the one to take."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """An assignment of widths and what it measured."""

    widths: tuple[int, ...]
    """By layer."""
    bytes: int
    """Coded payload of the layers."""
    divergence: float
    """Over all calibration batches; infinite where evaluation gave no finite number."""


def make_trial(widths: Sequence[int], payload: int, divergence: float) -> Trial:
    """A trial in which every divergence that is not finite is infinite, so that equal trials compare equal."""
    return Trial(tuple(widths), int(payload), float(divergence) if math.isfinite(divergence) else math.inf)


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in bytes without losing in divergence, by ascending bytes; failed ones are out."""
    front: list[Trial] = []
    finite = (trial for trial in trials if math.isfinite(trial.divergence))
    for trial in sorted(finite, key=lambda t: (t.bytes, t.divergence, t.widths)):
        if not front or trial.divergence < front[-1].divergence:
            front.append(trial)
    return front


def pick(trials: Sequence[Trial], limit: float) -> Trial:
    """The trial of fewest bytes whose divergence is at most `limit`.

    When there is none, that of least divergence, and a warning is logged.

    Raises:
        ValueError: every trial failed.
    """
    front = pareto(trials)
    if not front:
        raise ValueError(f"none of {len(trials)} assignments of widths gave a finite divergence: expected at least "
                         "one; widen quantization.max_bits, or look for a student that diverged before quantization")
    for trial in front:
        if trial.divergence <= limit:
            return trial
    best = front[-1]
    log.warning("no assignment of widths keeps the divergence within %.6g; taking the best one, %.6g at %d bytes",
                limit, best.divergence, best.bytes)
    return best
