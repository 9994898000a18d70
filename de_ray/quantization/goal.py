"""What a sweep of widths is after: the least bytes within a divergence, or the least divergence within bytes."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from de_ray.quantization.pareto import Trial, pareto
from de_ray.quantization.table import SensitivityTable

log = logging.getLogger(__name__)


class Goal(Protocol):
    """Where on the front of (bytes, divergence) a sweep searches and ends."""

    def distance(self, table: SensitivityTable, widths: Sequence[int]) -> float:
        """How far an assignment is from the goal by the table's prediction, >= 0; infinite where it has none."""
        ...

    def pick(self, trials: Sequence[Trial]) -> Trial:
        """The trial to take.

        Raises:
            ValueError: every trial failed.
        """
        ...


@dataclass(frozen=True)
class WithinDivergence:
    """The fewest bytes of a divergence of at most `limit`."""

    limit: float
    base: float
    """Divergence before quantization."""

    def distance(self, table: SensitivityTable, widths: Sequence[int]) -> float:
        """Of the predicted rise from the one that the limit allows, in its logarithm."""
        allowed = max(self.limit - self.base, 1e-300)  # a millionth of it is still above 0
        rise = table.predicted(widths) - table.base
        return abs(math.log(max(rise, allowed * 1e-6) / allowed)) if math.isfinite(rise) else math.inf

    def pick(self, trials: Sequence[Trial]) -> Trial:
        """See `Goal.pick`; the trial of least divergence, and a warning, when none is within the limit."""
        front = _front(trials)
        for trial in front:
            if trial.divergence <= self.limit:
                return trial
        best = front[-1]
        log.warning("no assignment of widths keeps the divergence within %.6g; taking the best one, %.6g at %d bytes",
                    self.limit, best.divergence, best.bytes)
        return best


@dataclass(frozen=True)
class WithinBytes:
    """The least divergence of layers that take at most `limit` bytes."""

    limit: float

    def distance(self, table: SensitivityTable, widths: Sequence[int]) -> float:
        """Of the bytes from the limit, in their logarithm."""
        return abs(math.log(max(table.payload(widths), 1) / self.limit))

    def pick(self, trials: Sequence[Trial]) -> Trial:
        """See `Goal.pick`; the trial of fewest bytes, and a warning, when none is within the limit."""
        front = _front(trials)
        within = [trial for trial in front if trial.bytes <= self.limit]
        if within:
            return within[-1]
        log.warning("no assignment of widths keeps the layers within %d bytes; taking the smallest one, %d",
                    self.limit, front[0].bytes)
        return front[0]


def _front(trials: Sequence[Trial]) -> list[Trial]:
    front = pareto(trials)
    if not front:
        raise ValueError(f"none of {len(trials)} assignments of widths gave a finite divergence: expected at least "
                         "one; widen quantization.max_bits, or look for a student that diverged before quantization")
    return front
