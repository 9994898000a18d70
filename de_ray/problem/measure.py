"""What a report says of a module: its metrics and its mean divergence from the teacher."""

import torch
from torch import Tensor, nn

from de_ray.problem.base import Output, Problem
from de_ray.problem.outputs import flatten

BATCH = 256
"""Most inputs of a forward pass."""
PASS_NUMBERS = 2**22
"""Most numbers of a pass, of its inputs or of its outputs: eight images of 416 x 416. Activations of large images, and
what language models say of each token, fill memory and caches."""
KEPT_BYTES = 2**29
"""Of a teacher's outputs."""


def mean_divergence(problem: Problem, module: nn.Module, inputs: Tensor) -> float:
    """Mean over samples of the problem's divergence, float64.

    Args:
        problem: gives the teacher and the divergence; the teacher must be on the module's device.
        module: in eval mode.
        inputs: [N, ...].
    """
    return Yardstick(problem, inputs, keep=0)(module)


class Yardstick:
    """`mean_divergence` of one module after another on the same inputs: the teacher's outputs are worked out once.

    Args:
        problem: see `mean_divergence`; of its teacher nothing may change, its device neither.
        inputs: [N, ...].
        keep: bytes of outputs that are kept, at most; the others are worked out each time.
    """

    def __init__(self, problem: Problem, inputs: Tensor, keep: int = KEPT_BYTES) -> None:
        self._problem, self._inputs, self._room = problem, inputs, keep
        self._kept: dict[int, Output] = {}

    def __call__(self, module: nn.Module) -> float:
        """Mean over samples, float64; the module is in eval mode, on the teacher's device."""
        inputs, device = self._inputs, next(module.parameters()).device
        start, total = 0, 0.0
        with torch.inference_mode():
            for part in inputs.split(pass_size(inputs, module(inputs[:1].to(device)))):
                part = part.to(device)
                total += float(self._problem.divergence(self._expected(start, part), module(part)).double().sum())
                start += len(part)
        return total / len(inputs)

    def _expected(self, start: int, part: Tensor) -> Output:
        if start in self._kept:
            return self._kept[start]
        output = self._problem.teacher(part)
        size = sum(tensor.nbytes for tensor in flatten(output))
        if size <= self._room:
            self._kept[start] = output
            self._room -= size
        return output


def pass_size(inputs: Tensor, of_one: Output) -> int:
    """How many inputs [N, ...] a pass may have; `of_one` is what one of them is turned into."""
    numbers = max(inputs[0].numel(), sum(tensor.numel() for tensor in flatten(of_one)))
    return max(1, min(BATCH, PASS_NUMBERS // max(1, numbers)))


def measure(problem: Problem, module: nn.Module) -> dict:
    """A module's metrics and divergences.

    Returns:
        {"metrics": {...}, "divergence": {"calibration": ..., "held_out": ...}}.
    """
    return {"metrics": problem.metrics(module),
            "divergence": {"calibration": mean_divergence(problem, module, problem.calibration),
                           "held_out": mean_divergence(problem, module, problem.held_out)}}
