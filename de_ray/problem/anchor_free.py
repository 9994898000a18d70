"""From raw anchor-free heads to detections with boxes, scores and masks.

A cell says of each side of its box how far it is, in strides, as a distribution over whole distances 0..R - 1, whose
expectation is the distance (Li et al., "Generalized focal loss", arXiv:2006.04388). The score of a class is the sigmoid
of its logit; there is no objectness. A mask's logits are a linear combination of prototypes that the image's cells
share (Bolya et al., "YOLACT", arXiv:1904.02689), cut to the box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from de_ray.problem.detection import LEAST_SCORE, Detections, suppress
from de_ray.problem.masks import encode

OVERLAP = 0.7
"""IoU with a better detection of the same class from which on one is suppressed, as evaluations of these networks have
it."""

Heads = Mapping[str, Tensor | Sequence[Tensor]]
"""As `ultralytics.RawHeads` returns them."""


@dataclass(frozen=True)
class AnchorFree:
    """What decoding needs to know of the heads."""

    classes: int
    """C."""
    bins: int
    """R: distances that a box's side is distributed over."""
    strides: tuple[int, ...]
    """Pixels of the input a cell, by scale."""
    coefficients: int = 0
    """M: prototypes of masks; 0: no masks."""


def cells(maps: Sequence[Tensor], channels: int, what: str) -> Tensor:
    """Maps a scale each [N, channels, H, W] -> [N, channels, A], where A counts the cells of all scales, in float32.

    Raises:
        ValueError: for other numbers of channels.
    """
    for one in maps:
        if one.ndim != 4 or one.shape[1] != channels:
            raise ValueError(f"a head's {what} are {list(one.shape)}: expected [N, {channels}, H, W]")
    return torch.cat([one.flatten(2) for one in maps], 2).float()


def decode(output: Heads, head: AnchorFree) -> tuple[Tensor, Tensor]:
    """Boxes and scores of every cell.

    Returns:
        boxes [N, A, 4], left, top, right, bottom in pixels of the input, not clipped, and scores [N, A, C].
    """
    logits = cells(output["boxes"], 4 * head.bins, "boxes").unflatten(1, (4, head.bins))  # [N, 4, R, A]
    far = torch.arange(head.bins, device=logits.device).float()
    distances = torch.einsum("nsra,r->nas", logits.softmax(2), far)  # [N, A, 4] in strides
    centres, strides = _grid(output["boxes"], head.strides)
    corners = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2)
    scores = cells(output["scores"], head.classes, "scores").sigmoid()
    return corners * strides, scores.transpose(1, 2)


def detect(output: Heads, head: AnchorFree, least: float = LEAST_SCORE) -> list[Detections]:
    """Detections in pixels of the input; a cell may give several, one a class. Boxes are not clipped.

    Args:
        output: of N images.
        head: what it is.
        least: score that detections exceed.
    """
    boxes, scores = (tensor.cpu() for tensor in decode(output, head))
    found = [suppress(b, s, least, OVERLAP) for b, s in zip(boxes, scores, strict=True)]
    if not head.coefficients:
        return [detections for detections, _ in found]
    coefficients = cells(output["coefficients"], head.coefficients, "coefficients").cpu()
    prototypes = output["prototypes"].float().cpu()  # [N, M, h, w]
    size = tuple(side * head.strides[0] for side in output["boxes"][0].shape[-2:])
    return [Detections(each.boxes, each.scores, each.classes,
                       encode(draw_masks(c[:, cell].T, p, each.boxes, size)))
            for (each, cell), c, p in zip(found, coefficients, prototypes, strict=True)]


def draw_masks(coefficients: Tensor, prototypes: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at the input's resolution, cut to their boxes.

    Args:
        coefficients: [D, M].
        prototypes: [M, h, w].
        boxes: [D, 4] in pixels.
        size: height and width in pixels.

    Returns:
        bool [D, H, W].
    """
    logits = torch.einsum("dm,mhw->dhw", coefficients, prototypes)
    if not len(logits):
        return torch.zeros((0, *size), dtype=torch.bool)
    return (interpolate(logits[:, None], size, mode="bilinear")[:, 0] > 0) & inside(boxes, size, size)


def inside(boxes: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which pixels of a map have their centre in a box.

    Args:
        boxes: [..., 4] in pixels of the input.
        shape: height and width of the map, which covers the input.
        size: height and width of the input.

    Returns:
        bool [..., h, w].
    """
    rows, columns = ((torch.arange(n, device=boxes.device) + 0.5) * (whole / n)
                     for n, whole in zip(shape, size, strict=True))
    left, top, right, bottom = (side[..., None] for side in boxes.unbind(-1))
    return (((rows >= top) & (rows < bottom))[..., :, None] & ((columns >= left) & (columns < right))[..., None, :])


def _grid(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres of the cells [A, 2], x and y in strides, and their strides [A, 1]."""
    centres, sizes = [], []
    for one, stride in zip(maps, strides, strict=True):
        height, width = one.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height, device=one.device) + 0.5,
                              torch.arange(width, device=one.device) + 0.5, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
        sizes.append(torch.full((height * width, 1), float(stride), device=one.device))
    return torch.cat(centres), torch.cat(sizes)
