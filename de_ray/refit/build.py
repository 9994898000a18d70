"""Refit methods behind one contract."""

import math
from typing import Protocol

import torch
from torch import Tensor

from de_ray.config import PoolConfig, RefitConfig
from de_ray.problem.base import Problem
from de_ray.problem.sampling import draw_sample
from de_ray.refit.columns import refit_columns
from de_ray.refit.distill import Distiller
from de_ray.refit.least_squares import refit_rows
from de_ray.student import Student

SERIAL = PoolConfig(kind="serial")
CLOSED = {"least_squares": refit_rows, "obs": refit_columns}
"""Methods in closed form."""
CLOSED_INPUTS = 4096
"""Inputs of a closed-form refit: several times the number of unknowns of the widest row of a LeNet."""
CUT, RAISE = 4.0, 2.0
"""Factors of the rate where refit slows down and speeds up."""
LEAST_SHARE = 2.0**-10
"""Of `refit.learning_rate`, however often refit slows down."""
FINAL = 4.0
"""How much larger than between cycles the peak of the last steps may be, which anneal."""


class Refit(Protocol):
    """Brings a student's survivors back to the teacher; changes the student in place."""

    backs_off: bool
    """Whether a refit that does harm is to be undone."""

    def after_cycle(self, generator: torch.Generator) -> None:
        """Refit between two cycles."""
        ...

    def slow_down(self) -> bool:
        """Take smaller steps from here on; False where they are the smallest already."""
        ...

    def speed_up(self) -> None:
        """Take larger steps from here on, up to the configured ones."""
        ...

    def anneal(self) -> None:
        """The last steps begin, which may be larger."""
        ...

    def final(self, start: int, stop: int, generator: torch.Generator) -> None:
        """Steps [start, stop) of the refit after the last cycle."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to continue."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state."""
        ...


class NoRefit:
    """Leaves survivors as they are."""

    backs_off = False

    def after_cycle(self, generator: torch.Generator) -> None:
        """See `Refit.after_cycle`."""

    def slow_down(self) -> bool:
        """See `Refit.slow_down`."""
        return False

    def speed_up(self) -> None:
        """See `Refit.speed_up`."""

    def anneal(self) -> None:
        """See `Refit.anneal`."""

    def final(self, start: int, stop: int, generator: torch.Generator) -> None:
        """See `Refit.final`."""

    def state(self) -> dict[str, Tensor]:
        """See `Refit.state`."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Refit.load_state`."""


class ClosedRefit(NoRefit):
    """Closed form after each cycle; has no state and nothing left to do at the end."""

    def __init__(self, student: Student, problem: Problem, config: RefitConfig) -> None:
        self._student, self._problem, self._config = student, problem, config
        self._solve = CLOSED[config.method]
        problem.teacher.to(student.weights[0].device)

    def after_cycle(self, generator: torch.Generator) -> None:
        """See `Refit.after_cycle`."""
        problem = self._problem
        indices = draw_sample(len(problem.inputs), problem.chances, CLOSED_INPUTS, generator)
        self._solve(problem, self._student, problem.inputs[indices], self._config.damping, self._config.batch)


class DistillRefit:
    """Distillation steps at a constant rate between cycles and along a cosine after the last.

    No rate suits all networks: what a LeNet needs tears a detector apart. With `backoff` the rate is found on the way
    (after Vogl et al., Biological Cybernetics 59, 1988): a refit that leaves the student much farther from the teacher
    than it was is undone (see `de_ray.backoff`), and the next are slower; after one that helps much they may speed up
    again.
    """

    def __init__(self, student: Student, problem: Problem, config: RefitConfig, threads: int,
                 pool: PoolConfig) -> None:
        self._config = config
        self.backs_off = config.backoff
        self._share = 1.0  # of the configured rate
        if config.workers == 1:
            self._distiller = Distiller(student, problem, config)
        else:
            from de_ray.refit.parallel import ParallelDistiller  # Ray Train takes seconds to import

            self._distiller = ParallelDistiller(student, problem, config, threads, pool)

    def after_cycle(self, generator: torch.Generator) -> None:
        """See `Refit.after_cycle`."""
        self._distiller.run(self._config.steps, lambda _: self._share * self._config.learning_rate, generator)

    def slow_down(self) -> bool:
        """See `Refit.slow_down`."""
        former, self._share = self._share, max(LEAST_SHARE, self._share / CUT)
        return self._share < former

    def speed_up(self) -> None:
        """See `Refit.speed_up`."""
        self._share = min(1.0, self._share * RAISE)

    def anneal(self) -> None:
        """See `Refit.anneal`."""
        self._share = min(1.0, self._share * FINAL) if self._config.final_learning_rate is None else 1.0

    def final(self, start: int, stop: int, generator: torch.Generator) -> None:
        """See `Refit.final`."""
        config, total = self._config, self._config.final_steps
        peak = self._share * (config.final_learning_rate or config.learning_rate)
        self._distiller.run(stop - start, lambda step: peak * (1 + math.cos(math.pi * (start + step) / total)) / 2,
                            generator)

    def state(self) -> dict[str, Tensor]:
        """See `Refit.state`."""
        return {**self._distiller.state(), "refit.share": torch.tensor(self._share, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Refit.load_state`."""
        self._distiller.load_state(state)
        self._share = float(state["refit.share"])


def build_refit(student: Student, problem: Problem, config: RefitConfig, threads: int = 1,
                pool: PoolConfig = SERIAL) -> Refit:
    """The configured refit of a student; several workers have `threads` each, or the GPUs that the pool leaves."""
    if config.method == "none":
        return NoRefit()
    if config.method in CLOSED:
        return ClosedRefit(student, problem, config)
    return DistillRefit(student, problem, config, threads, pool)
