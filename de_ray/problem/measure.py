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


def mean_divergence(problem: Problem, module: nn.Module, inputs: Tensor) -> float:
    """Mean over samples of the problem's divergence, float64.

    Args:
        problem: gives the teacher and the divergence; the teacher must be on the module's device.
        module: in eval mode.
        inputs: [N, ...].
    """
    device = next(module.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for part in inputs.split(pass_size(inputs, module(inputs[:1].to(device)))):
            part = part.to(device)
            total += float(problem.divergence(problem.teacher(part), module(part)).double().sum())
    return total / len(inputs)


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
