"""Which of the training inputs are calibration inputs, which may be used at all, and which come next."""

import torch
from torch import Tensor

from de_ray.checks import require
from de_ray.problem.base import Augment


def draw_inputs(inputs: Tensor, calibration_size: int, inputs_size: int, seed: int,
                augment: Augment | None = None) -> tuple[Tensor, Tensor]:
    """Draw without replacement, by one permutation of `inputs` a seed.

    Calibration inputs are augmented as refit's are: candidates are judged on the inputs that survivors will be refitted
    to, and where the teacher, which has learned the training inputs, is less sure of itself.

    Args:
        inputs: [M, ...] all training inputs.
        calibration_size: N, in 1..M.
        inputs_size: how many inputs saliency and refit may use, in N..M, or 0 for all.
        seed: of the permutation and of the augmentation.
        augment: of the calibration inputs; None: they stay as they are.

    Returns:
        inputs [M or inputs_size, ...] and calibration [N, ...], drawn from them.

    Raises:
        ValueError: for sizes outside their ranges.
    """
    total = len(inputs)
    require(1 <= calibration_size <= total, "problem.calibration_size", calibration_size,
            f"1 to {total}, the number of training inputs")
    require(inputs_size == 0 or calibration_size <= inputs_size <= total, "problem.inputs_size", inputs_size,
            f"0 for all, or problem.calibration_size ({calibration_size}) to {total}, the number of training inputs")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    usable = inputs[order[:inputs_size]] if inputs_size else inputs
    calibration = inputs[order[:calibration_size]]
    return usable, calibration if augment is None else augment(calibration, generator)


def draw_batch(total: int, chances: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count] in 0..total - 1, with replacement, by chances [total] >= 0; None: all alike."""
    if chances is None:
        return torch.randint(total, (count,), generator=generator)
    return torch.multinomial(chances, count, replacement=True, generator=generator)


def draw_sample(total: int, chances: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """int64 [<= count], distinct, in 0..total - 1, by chances [total] >= 0 as `draw_batch`; as many as there are."""
    if chances is None:
        return torch.randperm(total, generator=generator)[:count]
    return torch.multinomial(chances, min(count, int(chances.count_nonzero())), generator=generator)
