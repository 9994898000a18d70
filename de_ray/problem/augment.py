"""Label-free augmentation of image inputs."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from de_ray.config import AUGMENTATIONS, require_choice
from de_ray.problem.base import Augment

REACH = 1
"""Pixels, at most, that `shift` moves an image along each axis."""


def shift(inputs: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Move each image, with probability `share`, by its own whole pixels, uniform in -REACH..REACH along each axis.

    Moved images keep survivors from fitting the teacher's outputs by heart; images that stay where the teacher learned
    them carry its surest answers.

    What comes in at the edges is background, which is the batch's smallest value: black, however inputs were scaled.

    Args:
        inputs: [N, C, H, W].
        generator: of the offsets; on any device.
        share: in (0, 1].

    Returns:
        [N, C, H, W], a new tensor.

    Raises:
        ValueError: for inputs that are not images.
    """
    _require_images(inputs)
    n, _, height, width = inputs.shape
    padded = pad(inputs, (REACH,) * 4, value=float(inputs.min()))  # [N, C, H + 2 REACH, W + 2 REACH]
    offsets = torch.randint(2 * REACH + 1, (2, n, 1), generator=generator, device=generator.device).to(inputs.device)
    still = torch.rand((n, 1), generator=generator, device=generator.device).to(inputs.device) >= share
    offsets = torch.where(still, REACH, offsets)
    rows = offsets[0] + torch.arange(height, device=inputs.device)  # [N, H]
    columns = offsets[1] + torch.arange(width, device=inputs.device)  # [N, W]
    sample = torch.arange(n, device=inputs.device)[:, None, None]
    # Advanced indices around a slice come first in the result: [N, H, W, C].
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def augmentation(name: str, inputs: Tensor, share: float = 0.5) -> Augment | None:
    """The augmentation called none or shift of a share of inputs, checked against the inputs [M, ...] to come.

    Raises:
        ValueError: for another name, or for inputs that are not images.
    """
    require_choice("problem.augment", name, AUGMENTATIONS)
    if name == "none":
        return None
    _require_images(inputs)
    return partial(shift, share=share)


def _require_images(inputs: Tensor) -> None:
    if inputs.ndim != 4 or not inputs.is_floating_point():
        raise ValueError(f"problem.augment='shift': expected images [N, C, H, W], got inputs {list(inputs.shape)} "
                         f"of {inputs.dtype}")
