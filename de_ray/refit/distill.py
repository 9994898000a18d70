"""Label-free distillation: survivors follow the teacher's outputs by gradient descent on the divergence."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from de_ray.config import RefitConfig
from de_ray.problem.base import Problem
from de_ray.refit.objective import Objective
from de_ray.refit.optimizer import Adam
from de_ray.student import Student


class Distiller:
    """Adam on a student's survivors and other parameters; its moments outlive a cycle.

    Args:
        student: changed in place; masks are held.
        problem: inputs, teacher, divergence, augmentation.
        config: `batch`, `precision`, `memory_mb` and `relative` are used.
        share: see `Objective`.
        wrap: the student's module -> what runs in its place, such as one that averages gradients over workers.
    """

    def __init__(self, student: Student, problem: Problem, config: RefitConfig, share: tuple[int, int] = (0, 1),
                 wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        self._student, self._wrap = student, wrap
        self._objective = Objective(problem, config, student.weights[0].device, share)
        self._parameters = [p for p in student.module.parameters() if p.is_floating_point()]
        self._optimizer = Adam(self._parameters, config.relative)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to continue."""
        return self._optimizer.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        self._optimizer.load_state(state)

    def run(self, steps: int, learning_rate: Callable[[int], float], generator: torch.Generator) -> float:
        """Take steps; returns the mean divergence of the last tenth of them (NaN where there are no steps).

        Args:
            steps: number of steps, >= 0.
            learning_rate: step in [0, steps) -> learning rate.
            generator: draws batches and augmentation; on the CPU.

        Raises:
            FloatingPointError: the divergence became NaN or infinite.
        """
        student = self._student
        masks = [mask.to(weight.dtype) for mask, weight in zip(student.masks, student.weights, strict=True)]
        losses = []
        self._optimizer.measure()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            module = self._wrap(student.module) if steps else student.module
            with self._objective.products():
                for step in range(steps):
                    self._optimizer.zero_grad()
                    losses.append(self._objective.backward(module, generator))
                    self._optimizer.step(learning_rate(step))
                    for weight, mask in zip(student.weights, masks, strict=True):
                        weight.data.mul_(mask)
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        if not losses:
            return float("nan")
        last = float(torch.stack(losses[-max(1, steps // 10):]).mean())
        if not last < float("inf"):
            raise diverged(last, steps)
        return last


def diverged(last: float, steps: int) -> FloatingPointError:
    """What a run of steps raises that ended at a divergence of NaN or infinity."""
    return FloatingPointError(f"distillation diverged: mean divergence {last} after {steps} steps; lower "
                              "refit.learning_rate")
