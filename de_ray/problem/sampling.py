"""Which of the training inputs are calibration inputs, and which may be used at all."""

import torch
from torch import Tensor

from de_ray.config import require


def draw_inputs(inputs: Tensor, calibration_size: int, inputs_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw without replacement, by one permutation of `inputs` a seed.

    Args:
        inputs: [M, ...] all training inputs.
        calibration_size: N, in 1..M.
        inputs_size: how many inputs saliency and refit may use, in N..M, or 0 for all.
        seed: of the permutation.

    Returns:
        inputs [M or inputs_size, ...] and calibration [N, ...], a subset of them.

    Raises:
        ValueError: for sizes outside their ranges.
    """
    total = len(inputs)
    require(1 <= calibration_size <= total, "problem.calibration_size", calibration_size,
            f"1 to {total}, the number of training inputs")
    require(inputs_size == 0 or calibration_size <= inputs_size <= total, "problem.inputs_size", inputs_size,
            f"0 for all, or problem.calibration_size ({calibration_size}) to {total}, the number of training inputs")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    usable = inputs[order[:inputs_size]] if inputs_size else inputs
    return usable, inputs[order[:calibration_size]]
