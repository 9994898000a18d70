"""What a report says of a module: its metrics and its mean divergence from the teacher."""

import torch
from torch import Tensor, nn

from de_ray.problem.base import Problem

BATCH = 256
"""Most inputs of a forward pass."""
PASS_NUMBERS = 2**22
"""Most input numbers of a pass: eight images of 416 x 416. Activations of large images fill memory and caches."""


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
        for part in inputs.split(max(1, min(BATCH, PASS_NUMBERS // max(1, inputs[0].numel())))):
            part = part.to(device)
            total += float(problem.divergence(problem.teacher(part), module(part)).double().sum())
    return total / len(inputs)


def measure(problem: Problem, module: nn.Module) -> dict:
    """A module's metrics and divergences.

    Returns:
        {"metrics": {...}, "divergence": {"calibration": ..., "held_out": ...}}.
    """
    return {"metrics": problem.metrics(module),
            "divergence": {"calibration": mean_divergence(problem, module, problem.calibration),
                           "held_out": mean_divergence(problem, module, problem.held_out)}}
