"""Masks of detections, run-length encoded as COCO has them: as bits they would fill the memory."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

TOGETHER = 8
"""Masks that are scaled at a time."""


def encode(masks: Tensor) -> np.ndarray:
    """bool [D, H, W] -> object [D], pycocotools' encoding of each."""
    from pycocotools import mask as rle  # needed for segmenters alone

    found = np.empty(len(masks), dtype=object)
    if len(masks):
        found[:] = rle.encode(np.asfortranarray(masks.permute(1, 2, 0).to(torch.uint8).numpy()))
    return found


def decode(masks: Sequence[dict] | np.ndarray) -> Tensor:
    """What `encode` encoded, D >= 1: bool [D, H, W]."""
    from pycocotools import mask as rle

    return torch.from_numpy(rle.decode(list(masks))).permute(2, 0, 1).bool()


def areas(masks: np.ndarray) -> Tensor:
    """Pixels of each of D masks: [D]."""
    from pycocotools import mask as rle

    return torch.from_numpy(rle.area(list(masks)).astype(np.int64)) if len(masks) else torch.zeros(0)


def mask_iou(a: np.ndarray, b: np.ndarray) -> Tensor:
    """float32 [D, D']: intersection over union of each pair."""
    from pycocotools import mask as rle

    if not len(a) or not len(b):
        return torch.zeros(len(a), len(b))
    return torch.from_numpy(rle.iou(list(a), list(b), [0] * len(b))).float()


def cropped(masks: np.ndarray, corner: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A window of each mask, scaled.

    Args:
        masks: object [D].
        corner: left and top of the window.
        inner: width and height of the window.
        size: width and height of the result.
    """
    if not len(masks):
        return masks
    (left, top), (width, height) = corner, inner
    found = []
    for start in range(0, len(masks), TOGETHER):  # as numbers, 300 of a large photograph would fill the memory
        window = decode(masks[start:start + TOGETHER])[:, top:top + height, left:left + width]
        if (width, height) != size:
            window = interpolate(window[:, None].float(), size[::-1], mode="bilinear")[:, 0] >= 0.5
        found.append(encode(window))
    return np.concatenate(found)
