"""Scenes of Fashion-MNIST items on a larger canvas, with the exact boxes and masks of what is visible of each.

Items are drawn one over the other, each of a random class, size, side, place and tint, before a noisy background. What
later items cover of an earlier one is no longer part of its mask, as in COCO.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from de_ray.checks import require
from de_ray.problem.datasets import NORMALISATION

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""Of Fashion-MNIST, by label."""
ITEM = 28
"""Pixels of the side of an item as it comes."""
ITEMS = (2, 5)
"""Fewest and most items that are tried a scene."""
SIDES = (0.25, 0.45)
"""Shortest and longest side of an item, of the canvas's."""
VISIBLE = 0.75
"""Share of what is visible of an item that the next one must leave so; a placement that hides more is not made."""
TRIES = 16
"""Placements that are tried before an item is left out."""
FAINT = 16 / 255
"""Up to where a pixel of an item is none of its shape: the images have faint edges."""
DIMMEST = 90
"""Brightness of an item's blackest pixel, of 255."""
BACKGROUND = 50
"""Brightest mean of a background, of 255."""
NOISE = 10
"""Standard deviation of its pixels."""


@dataclass(frozen=True)
class Scenes:
    """M scenes with T objects in all, those of the first scene first."""

    images: Tensor
    """uint8 [M, 3, S, S]."""
    instances: Tensor
    """uint8 [M, S, S]: 0 for the background, k for the scene's k-th object, counted from 1."""
    rows: Tensor
    """int64 [T]: scene of each object."""
    classes: Tensor
    """int64 [T]."""
    boxes: Tensor
    """float32 [T, 4]: left, top, right, bottom in pixels, tight around what is visible."""

    def __len__(self) -> int:
        return len(self.images)

    def coco(self) -> dict:
        """As COCO's JSON has it: images, annotations with run-length encoded masks, and categories."""
        from pycocotools import mask as rle  # needed for metrics alone

        size = self.images.shape[-1]
        images = [{"id": row, "file_name": f"{row}.png", "width": size, "height": size} for row in range(len(self))]
        annotations, number = [], 0
        for index, (row, kind, box) in enumerate(zip(self.rows.tolist(), self.classes.tolist(), self.boxes.tolist(),
                                                     strict=True)):
            number = number + 1 if index and row == self.rows[index - 1] else 1
            mask = (self.instances[row] == number).numpy()
            left, top, right, bottom = box
            annotations.append({"id": index + 1, "image_id": row, "category_id": kind, "iscrowd": 0,
                                "bbox": [left, top, right - left, bottom - top], "area": float(mask.sum()),
                                "segmentation": rle.encode(mask.astype("uint8", order="F"))})
        return {"images": images, "annotations": annotations,
                "categories": [{"id": kind, "name": name} for kind, name in enumerate(CLASSES)]}


def compose_scenes(items: Tensor, labels: Tensor, count: int, size: int, seed: int) -> Scenes:
    """Draw scenes.

    Args:
        items: [I, 1, 28, 28] as `load_mnist("FashionMNIST")` returns them.
        labels: int64 [I].
        count: M, >= 1.
        size: S, at least 64, so that the smallest item keeps its features.
        seed: of every draw.

    Raises:
        ValueError: for sizes outside their ranges.
    """
    require(count >= 1, "problem.data.scenes", count, "at least 1")
    require(size >= 64, "problem.data.size", size, "at least 64 for scenes")
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty((count, 3, size, size), dtype=torch.uint8)
    instances = torch.zeros((count, size, size), dtype=torch.uint8)
    rows, classes, boxes = [], [], []
    for row in range(count):
        canvas = _background((3, size, size), generator)
        visible: list[Tensor] = []  # bool [S, S] each
        kinds: list[int] = []
        wanted = int(torch.randint(ITEMS[0], ITEMS[1] + 1, (1,), generator=generator))
        for index in torch.randint(len(items), (wanted,), generator=generator).tolist():
            value, shape = _scaled(_pixels(items[index, 0]), size, generator)
            place = _placed(shape, visible, size, generator)
            if place is None:
                continue
            top, left = place
            side = len(shape)
            over = torch.zeros((size, size), dtype=torch.bool)
            over[top:top + side, left:left + side] = shape
            canvas[:, over] = _painted(value[shape], (3, 1), generator)
            visible = [mask & ~over for mask in visible] + [over]
            kinds.append(int(labels[index]))
        images[row] = canvas.clamp(0, 255).to(torch.uint8)
        for number, mask in enumerate(visible, start=1):
            instances[row][mask] = number
            boxes.append(_tight(mask))
        rows += [row] * len(kinds)
        classes += kinds
    return Scenes(images, instances, torch.tensor(rows), torch.tensor(classes), torch.tensor(boxes).float())


def single_items(items: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Items by themselves, painted as scenes have them: of one random size, each in a place of its own.

    Args:
        items: [N, 1, 28, 28] as `load_mnist("FashionMNIST")` returns them.
        size: S, pixels of the side of the result, at least 28.
        generator: of every draw.

    Returns:
        float [N, 3, S, S] in [0, 1].
    """
    side = int(torch.randint(ITEM, size + 1, (1,), generator=generator))
    pixels = _pixels(items)
    both = torch.cat([pixels, (pixels > 0).float()], 1)
    mirrored = torch.rand(len(items), generator=generator) < 0.5
    both = torch.where(mirrored[:, None, None, None], both.flip(3), both)
    value, shape = interpolate(both, (side, side), mode="bilinear").unbind(1)  # [N, s, s]
    images = _background((len(items), 3, size, size), generator)
    painted = _painted(value[:, None], (len(items), 3, 1, 1), generator)
    for image, item, over, place in zip(images, painted, shape > 0.5, torch.randint(
            size - side + 1, (len(items), 2), generator=generator).tolist(), strict=True):
        window = image[:, place[0]:place[0] + side, place[1]:place[1] + side]
        window.copy_(torch.where(over, item, window))
    return images.clamp_(0, 255) / 255


def _pixels(items: Tensor) -> Tensor:
    """Normalised images back in [0, 1], with exact zeros outside their shape."""
    mean, deviation = NORMALISATION["FashionMNIST"]
    pixels = items * deviation + mean
    return pixels * (pixels > FAINT)


def _background(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise about a colour: [..., 3, S, S] in 0..255, and a little beyond."""
    base = BACKGROUND * torch.rand((*shape[:-2], 1, 1), generator=generator)
    return base + NOISE * torch.randn(shape, generator=generator)


def _painted(value: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Pixels in [0, 1] in a random tint: in 0..255, bright enough to be told from the background.

    Args:
        value: broadcast against `shape`.
        shape: of the tints, with 3 for the colours.
        generator: of the tints.
    """
    tint = 0.6 + 0.4 * torch.rand(shape, generator=generator)
    return (DIMMEST + (255 - DIMMEST) * value) * tint


def _scaled(pixels: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An item at a random size, perhaps mirrored: its pixels [s, s] in [0, 1] and its shape bool [s, s]."""
    low, high = SIDES
    side = round(size * (low + (high - low) * float(torch.rand(1, generator=generator))))
    layers = torch.stack([pixels, (pixels > 0).float()])[None]  # [1, 2, 28, 28]
    if torch.rand(1, generator=generator) < 0.5:
        layers = layers.flip(3)
    value, shape = interpolate(layers, (side, side), mode="bilinear", antialias=side < ITEM)[0]
    return value, shape > 0.5


def _placed(shape: Tensor, visible: Sequence[Tensor], size: int, generator: torch.Generator) -> tuple[int, int] | None:
    """Top and left of a place where enough of every earlier item stays visible, None where none was found."""
    side = len(shape)
    whole = [int(mask.sum()) for mask in visible]
    for _ in range(TRIES):
        top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
        hidden = [int((mask[top:top + side, left:left + side] & shape).sum()) for mask in visible]
        if all(h <= (1 - VISIBLE) * w for h, w in zip(hidden, whole, strict=True)):
            return top, left
    return None


def _tight(mask: Tensor) -> list[int]:
    """Left, top, right, bottom of a mask that is not empty."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
