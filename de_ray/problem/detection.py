"""From raw YOLOv3 heads to detections: boxes, scores, non-maximum suppression (Redmon & Farhadi, arXiv:1804.02767)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from de_ray.problem.darknet import Head
from de_ray.problem.masks import areas, cropped

LEAST_SCORE = 0.001
"""Lowest score of a detection, as COCO evaluations have it."""
OVERLAP = 0.45
"""IoU with a better detection of the same class from which on one is suppressed."""
MOST = 300
"""Detections an image."""
CANDIDATES = 20_000
"""Best candidates an image that suppression looks at: a broken student's many thousands would take it minutes."""
LARGEST = 8.0
"""Of log(size / anchor): e^8 anchors are beyond any image, and larger numbers would overflow."""


@dataclass(frozen=True)
class Detections:
    """Of one image, best first; on the CPU."""

    boxes: Tensor
    """float32 [D, 4]: left, top, right, bottom in pixels."""
    scores: Tensor
    """float32 [D], objectness x class, in (0, 1]."""
    classes: Tensor
    """int64 [D]."""
    masks: np.ndarray | None = None
    """object [D], run-length encoded over the whole image as `masks.encode` does it; None: of a detector without."""

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Detections":
        """Those with a higher score."""
        return self.at(self.scores > score)

    def visible(self, by_mask: bool = False) -> "Detections":
        """Those whose box, or mask, has an area."""
        return self.at(areas(self.masks) > 0 if by_mask else (self.boxes[:, 2:] > self.boxes[:, :2]).all(1))

    def at(self, index: Tensor | slice) -> "Detections":
        """Those that an index, a slice or a mask names."""
        masks = self.masks
        if masks is not None:
            masks = masks[index if isinstance(index, slice) else index.numpy()]
        return Detections(self.boxes[index], self.scores[index], self.classes[index], masks)


def decode(outputs: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, Tensor]:
    """Boxes and scores of every anchor.

    Args:
        outputs: a head each [N, A x (5 + C), H, W], as `Darknet` returns them.
        heads: what each is.

    Returns:
        boxes [N, B, 4], left, top, right, bottom in pixels of the input, not clipped, and scores [N, B, C], where B
        counts the anchors of all heads' cells.
    """
    boxes, scores = [], []
    for output, head in zip(outputs, heads, strict=True):
        x = split_anchors(output.float(), head.classes)  # [N, A, 5 + C, H, W]
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
        anchors = torch.tensor(head.anchors, device=x.device)[:, :, None, None]  # [A, 2, 1, 1]
        centre_x = (x[:, :, 0].sigmoid() + columns) * head.stride  # [N, A, H, W]
        centre_y = (x[:, :, 1].sigmoid() + rows[:, None]) * head.stride
        half = x[:, :, 2:4].clamp(max=LARGEST).exp() * anchors / 2  # [N, A, 2, H, W]
        corners = torch.stack([centre_x - half[:, :, 0], centre_y - half[:, :, 1],
                               centre_x + half[:, :, 0], centre_y + half[:, :, 1]], -1)  # [N, A, H, W, 4]
        boxes.append(corners.flatten(1, 3))
        score = x[:, :, 4:5].sigmoid() * x[:, :, 5:].sigmoid()  # [N, A, C, H, W]
        scores.append(score.permute(0, 1, 3, 4, 2).flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def detect(outputs: Sequence[Tensor], heads: Sequence[Head], least: float = LEAST_SCORE) -> list[Detections]:
    """Detections in pixels of the input, not clipped; an anchor may give several, one a class.

    Args:
        outputs: a head each [N, A x (5 + C), H, W].
        heads: what each is.
        least: score that detections exceed.
    """
    boxes, scores = (tensor.cpu() for tensor in decode(outputs, heads))
    return [suppress(b, s, least)[0] for b, s in zip(boxes, scores, strict=True)]


def split_anchors(output: Tensor, classes: int) -> Tensor:
    """[N, A x (5 + C), H, W] -> [N, A, 5 + C, H, W], a view where it can be one.

    Raises:
        ValueError: for other shapes.
    """
    if output.ndim != 4 or output.shape[1] % (5 + classes) or output.shape[1] == 0:
        raise ValueError(f"a head's output is {list(output.shape)}: expected [N, A x {5 + classes}, H, W], for "
                         f"{classes} classes")
    return output.unflatten(1, (-1, 5 + classes))


def suppress(boxes: Tensor, scores: Tensor, least: float, overlap: float = OVERLAP) -> tuple[Detections, Tensor]:
    """The best detections that do not overlap.

    Args:
        boxes: [B, 4].
        scores: [B, C].
        least: score that detections exceed.
        overlap: IoU with a better one of the same class from which on one is suppressed.

    Returns:
        Up to `MOST` detections, and the row of `boxes` that each came from.
    """
    usable = boxes.isfinite().all(1, keepdim=True)  # of a broken student, not all
    anchor, kind = ((scores > least) & usable).nonzero(as_tuple=True)  # NaN is not above anything
    found = scores[anchor, kind]
    if len(found) > CANDIDATES:
        best = found.topk(CANDIDATES).indices
        anchor, kind, found = anchor[best], kind[best], found[best]
    # Classes are told apart by shifts of the largest coordinate: in float32 those of a broken student's boxes would
    # round the others' to nothing.
    kept = batched_nms(boxes[anchor].double(), found.double(), kind, overlap)[:MOST]
    return Detections(boxes[anchor[kept]], found[kept], kind[kept]), anchor[kept]


@dataclass(frozen=True)
class Letterbox:
    """How an image was laid into the network's square input: scaled, centred, the rest grey."""

    width: int
    """Pixels of the image."""
    height: int
    size: int
    """Pixels of the square's side."""

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height of the scaled image, at least 1."""
        scale = self.size / max(self.width, self.height)
        return max(1, math.floor(self.width * scale + 0.5)), max(1, math.floor(self.height * scale + 0.5))

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the scaled image in the square."""
        return (self.size - self.inner[0]) // 2, (self.size - self.inner[1]) // 2

    def crop(self, square: Tensor) -> Tensor:
        """[C, size, size] -> [C, height, width] of the scaled image, without the grey."""
        (left, top), (width, height) = self.corner, self.inner
        return square[:, top:top + height, left:left + width]

    def undo(self, found: Detections) -> Detections:
        """Detections in pixels of the image, clipped to it."""
        (left, top), (width, height) = self.corner, self.inner
        shift = torch.tensor([left, top, left, top])
        scale = torch.tensor([self.width / width, self.height / height] * 2)
        limit = torch.tensor([self.width, self.height] * 2)
        boxes = ((found.boxes - shift) * scale).clamp(min=torch.zeros(4), max=limit)
        masks = None
        if found.masks is not None:
            masks = cropped(found.masks, self.corner, self.inner, (self.width, self.height))
        return Detections(boxes, found.scores, found.classes, masks)
