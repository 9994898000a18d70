"""Refits that do harm are undone, and the next ones take smaller steps."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from de_ray.evaluation.pool import Pool, students_divergence
from de_ray.refit.build import Refit
from de_ray.student import Student

log = logging.getLogger(__name__)

HARM = 4.0
"""How many times the divergence before it a refit may leave, as long as others follow. Steps of a constant size stir a
student that is still close to its teacher, which does it good in the end; too large ones raise its divergence a
hundredfold."""
MUCH = 0.5
"""Of the divergence before it, what a refit that helps much leaves at most."""
TRIALS = 4
"""How often, at most, the same steps of the final refit are taken, each time at a smaller rate."""
KEY, DIVERGENCE = "backoff.", "backoff"
"""Of the student as it was before the final refit, in a checkpoint."""


def allowed(divergence: float, negligible: float) -> float:
    """What a refit may leave; anything, where the student is so far off that its divergence is not finite."""
    return max(divergence, negligible) if math.isfinite(divergence) else math.inf


class Backoff:
    """Runs a refit and measures what it did to the student.

    Args:
        refit: of the student.
        student: changed in place.
        pool: replicas of the student; they follow it.
        negligible: a divergence that no refit is undone for.
    """

    def __init__(self, refit: Refit, student: Student, pool: Pool, negligible: float) -> None:
        self._refit, self._student, self._pool, self._negligible = refit, student, pool, negligible
        self._before: tuple[dict[str, Tensor], float] | None = None
        """The student's values and divergence before the final refit, once that has begun."""

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to continue."""
        if self._before is None:
            return {}
        values, divergence = self._before
        return {KEY + name: value for name, value in values.items()} | {
            DIVERGENCE: torch.tensor(divergence, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        if DIVERGENCE in state:
            values = {name.removeprefix(KEY): value for name, value in state.items() if name.startswith(KEY)}
            self._before = values, float(state[DIVERGENCE])

    def after_cycle(self, generator: torch.Generator) -> float:
        """Refit between cycles; where it does harm it is undone, and the next ones take smaller steps.

        Returns:
            The divergence on all batches.

        Raises:
            FloatingPointError: the divergence became NaN or infinite, and the refit does not back off.
        """
        refit = self._refit
        if not refit.backs_off:
            refit.after_cycle(generator)
            return self._measured()
        before = students_divergence(self._pool)
        after = self._tried(lambda: refit.after_cycle(generator), allowed(HARM * before, self._negligible))
        if after is None:
            refit.slow_down()
            return before
        if after < MUCH * before:
            refit.speed_up()
        return after

    def final(self, start: int, stop: int, last: bool, before: float, generator: torch.Generator) -> float:
        """Steps [start, stop) of the refit after the last cycle, taken again at smaller rates where they do harm.

        Steps that anneal have done what they can once they are over: where the last ones leave the student worse than
        it was before the first, it becomes that again.

        Args:
            start, stop: see `Refit.final`.
            last: whether no steps follow.
            before: the divergence on all batches.
            generator: of the draws; every trial draws the same.

        Returns:
            The divergence on all batches.

        Raises:
            FloatingPointError: see `after_cycle`.
        """
        refit = self._refit
        if not start:
            refit.anneal()
        if not refit.backs_off:
            refit.final(start, stop, generator)
            return self._measured()
        if self._before is None:
            self._before = self._student.values(), before
        most = allowed((1.0 if last else HARM) * self._before[1], self._negligible)
        drawn = generator.get_state()
        for _ in range(TRIALS):
            generator.set_state(drawn)
            after = self._tried(lambda: refit.final(start, stop, generator), most)
            if after is not None:
                return after
            if not refit.slow_down():
                break
        if last:
            log.warning("the refit after the last cycle is left out: it did harm at each rate that was tried")
            self._student.set_values(self._before[0])
            self._pool.refresh(self._student)
        return students_divergence(self._pool)

    def _tried(self, change: Callable[[], None], most: float) -> float | None:
        """Carry out a change; returns the divergence, or None where that is more than `most` and it was undone."""
        values, state = self._student.values(), self._refit.state()
        try:
            change()
            after = self._measured()
        except FloatingPointError:
            after = math.inf
        if after <= most:
            return after
        log.info("undid a refit that raised the divergence to %.4g, where %.4g was allowed", after, most)
        self._student.set_values(values)
        self._refit.load_state(state)
        self._pool.refresh(self._student)
        return None

    def _measured(self) -> float:
        """The divergence of the refitted student on all batches."""
        self._pool.refresh(self._student)
        return students_divergence(self._pool)
