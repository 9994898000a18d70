"""Label-free distillation: survivors follow the teacher's outputs by gradient descent on the divergence."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from de_ray.problem.base import Problem
from de_ray.student import Student

CACHE_BYTES = 256 * 2**20
"""Teacher outputs up to this size are computed once and kept; larger ones are computed for each batch."""


class TeacherOutputs:
    """The teacher's outputs on a problem's inputs, kept where they are small and the inputs do not change.

    Args:
        problem: gives the teacher and the inputs.
        device: where the teacher runs.
        batch: inputs a pass while the outputs are collected.
    """

    def __init__(self, problem: Problem, device: torch.device, batch: int = 512) -> None:
        self._teacher: nn.Module = problem.teacher.to(device)
        self._kept: list[Tensor] | None = None
        if problem.augment is not None:
            return
        with torch.no_grad():
            first, self._structure = tree_flatten(self._teacher(problem.inputs[:1].to(device)))
            if sum(leaf.numel() * leaf.element_size() for leaf in first) * len(problem.inputs) <= CACHE_BYTES:
                parts = [tree_flatten(self._teacher(part.to(device)))[0] for part in problem.inputs.split(batch)]
                self._kept = [torch.cat(leaves) for leaves in zip(*parts, strict=True)]

    def __call__(self, inputs: Tensor, indices: Tensor) -> object:
        """Outputs for a batch of inputs with these indices, in the structure that the teacher returns."""
        if self._kept is not None:
            return tree_unflatten([leaf[indices] for leaf in self._kept], self._structure)
        with torch.no_grad():
            return self._teacher(inputs)


class Distiller:
    """Adam on a student's survivors and other parameters; its moments outlive a cycle.

    Args:
        student: changed in place; masks are held.
        problem: inputs, teacher, divergence, augmentation.
        batch: inputs a step.
    """

    def __init__(self, student: Student, problem: Problem, batch: int) -> None:
        self._student, self._problem, self._batch = student, problem, batch
        self._device = student.weights[0].device
        self._outputs = TeacherOutputs(problem, self._device)
        self._parameters = [p for p in student.module.parameters() if p.is_floating_point()]
        self._optimizer = torch.optim.Adam(self._parameters, fused=True)

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, on the CPU."""
        return {f"adam.{index}.{key}": value.detach().cpu().clone()
                for index, entry in self._optimizer.state_dict()["state"].items() for key, value in entry.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value.clone()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})

    def run(self, steps: int, learning_rate: Callable[[int], float], generator: torch.Generator) -> float:
        """Take steps; returns the mean divergence of the last tenth of them (NaN where there are no steps).

        Args:
            steps: number of steps, >= 0.
            learning_rate: step in [0, steps) -> learning rate.
            generator: draws batches and augmentation; on the CPU.

        Raises:
            FloatingPointError: the divergence became NaN or infinite.
        """
        student, problem = self._student, self._problem
        masks = [mask.to(weight.dtype) for mask, weight in zip(student.masks, student.weights, strict=True)]
        losses = []
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            for step in range(steps):
                indices = torch.randint(len(problem.inputs), (self._batch,), generator=generator)
                inputs = problem.inputs[indices]
                if problem.augment is not None:
                    inputs = problem.augment(inputs, generator)
                inputs = inputs.to(self._device, non_blocking=True)
                loss = problem.divergence(self._outputs(inputs, indices.to(self._device)),
                                          student.module(inputs)).mean()
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for group in self._optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                self._optimizer.step()
                for weight, mask in zip(student.weights, masks, strict=True):
                    weight.data.mul_(mask)
                losses.append(loss.detach())
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        if not losses:
            return float("nan")
        last = float(torch.stack(losses[-max(1, steps // 10):]).mean())
        if not last < float("inf"):
            raise FloatingPointError(f"distillation diverged: mean divergence {last} after {steps} steps; lower "
                                     "refit.learning_rate")
        return last
