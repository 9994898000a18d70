"""Label-free augmentation for detectors: the teacher says what it sees on the changed images too."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from de_ray.device import moved
from de_ray.problem.augment import paste
from de_ray.problem.coco import GREY
from de_ray.problem.sampling import draw_batch

PASTED = 0.5
"""Share of the changed images that get a rectangle of another one."""
ZOOM = (0.6, 1.6)
"""Scale of an image, log-uniform; above 1 it is cropped, below it stands in grey."""
CONTRAST = (0.7, 1.4)
"""Factor of the distance from an image's mean, log-uniform."""
BRIGHTNESS = 0.15
"""Largest change of brightness, of a range of 1."""
TINT = 0.1
"""Largest relative change of a colour."""


@dataclass(frozen=True)
class Mosaics:
    """Of which images mosaics are made, and how often."""

    share: float
    """Of the changed images, in [0, 1]."""
    images: Tensor | None = None
    """[M, 3, S, S] that mosaics are of; None: the batch's own."""
    chances: Tensor | None = None
    """float32 [M] >= 0: how often each is taken, in proportion; None: all alike."""

    def draw(self, inputs: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """Mosaics of four in the place of some of the inputs [N, 3, S, S] in [0, 1]: a new tensor of their shape.

        `wanted` is bool [N], on the CPU.
        """
        images = inputs if self.images is None else self.images
        quarters = draw_batch(len(images), self.chances, 4 * len(inputs), generator).view(4, -1)[:, wanted]
        a, b, c, d = (avg_pool2d(_unit(moved(images[moved(quarter, images.device)], inputs.device)), 2)
                      for quarter in quarters)
        places = moved(wanted.nonzero().flatten(), inputs.device)
        return inputs.index_copy(0, places, torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2))


def augment_detection(inputs: Tensor, generator: torch.Generator, share: float, mosaics: Mosaics) -> Tensor:
    """Change each image with probability `share`: mosaic, flip, scale, crop, translate, contrast, brightness, colour,
    and a rectangle of another one.

    Args:
        inputs: [N, 3, S, S], uint8 or float in [0, 1].
        generator: of every draw; on the CPU.
        share: in (0, 1].
        mosaics: what the mosaics are of.

    Returns:
        [N, 3, S, S], a new tensor of the same type.

    Raises:
        ValueError: for inputs that are not square colour images of an even side.
    """
    if inputs.ndim != 4 or inputs.shape[1] != 3 or inputs.shape[2] != inputs.shape[3] or inputs.shape[2] % 2:
        raise ValueError(f"problem.augment='detection': expected images [N, 3, S, S] with S even, got inputs "
                         f"{list(inputs.shape)}")
    count = len(inputs)
    images = _unit(inputs)
    changed = _uniform(generator, count) < share
    mosaic = _uniform(generator, count) < mosaics.share
    images = mosaics.draw(images, mosaic, generator)
    images = _colours(images, generator)
    images = paste(_moved(images, generator), generator, PASTED)
    if not inputs.is_floating_point():
        images = images.mul_(255).round_().to(inputs.dtype)
    return torch.where(_shaped(changed, inputs), images, inputs)


def _unit(images: Tensor) -> Tensor:
    """In float32 in [0, 1]."""
    return images.float() if images.is_floating_point() else images.float() / 255


def _uniform(generator: torch.Generator, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """[count] uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


def _log_uniform(generator: torch.Generator, count: int, bounds: tuple[float, float]) -> Tensor:
    return _uniform(generator, count, *map(math.log, bounds)).exp()


def _shaped(values: Tensor, images: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1], beside the images."""
    return moved(values, images.device)[:, None, None, None]


def _colours(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    contrast = _shaped(_log_uniform(generator, count, CONTRAST), images)
    brightness = _shaped(_uniform(generator, count, -BRIGHTNESS, BRIGHTNESS), images)
    tint = 1 + TINT * moved(2 * torch.rand((count, 3, 1, 1), generator=generator) - 1, images.device)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (((images - mean) * contrast + mean + brightness) * tint).clamp_(0, 1)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped, scaled and translated; what comes in is the letterbox's grey."""
    count = len(images)
    zoom = _log_uniform(generator, count, ZOOM)
    flip = torch.where(_uniform(generator, count) < 0.5, -1.0, 1.0)
    # Of the square's half side: the window stays inside a larger image, and a smaller image inside the square.
    reach = (1 - 1 / zoom).abs()
    shift = reach * (2 * torch.rand((2, count), generator=generator) - 1)
    matrix = torch.zeros(count, 2, 3)  # from the result's coordinates in [-1, 1] to the image's
    matrix[:, 0, 0], matrix[:, 1, 1] = flip / zoom, 1 / zoom
    matrix[:, 0, 2], matrix[:, 1, 2] = shift
    grid = affine_grid(moved(matrix, images.device), list(images.shape), align_corners=False)
    grey = GREY / 255  # zeros come in from outside
    return (grid_sample(images - grey, grid, align_corners=False) + grey).clamp_(0, 1)
