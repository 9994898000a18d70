"""Trials of a sweep and their Pareto front."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


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


def front(items: Iterable[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """Items that no other beats in cost without losing more, by ascending cost; of equal ones the first."""
    kept: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), loss(item))):
        if not kept or loss(item) < loss(kept[-1]):
            kept.append(item)
    return kept


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The front of bytes and divergence; failed trials are out."""
    finite = sorted((trial for trial in trials if math.isfinite(trial.divergence)), key=lambda trial: trial.widths)
    return front(finite, lambda trial: trial.bytes, lambda trial: trial.divergence)
