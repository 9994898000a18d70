"""Trials of a sweep and their Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
