"""What a report says of a detector: COCO's average precision, and agreement with the teacher."""

import contextlib
import io
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from de_ray.problem.coco import Annotations
from de_ray.problem.darknet import Head
from de_ray.problem.detection import Detections, Letterbox, detect

CONFIDENT = 0.8
"""Score above which an object must be kept: the paper's claim (Franca-Neto, arXiv:2206.05859)."""
LIKELY = 0.5
"""The same, of a stricter count."""
SEEN = 0.25
"""Score from which on the other network has the object."""
SAME = 0.5
"""IoU from which on two boxes of one class are one object."""
BATCH = 8
"""Images a forward pass."""


class DetectionMetrics:
    """Metrics of a detector on held-out images; the teacher's detections are computed once, when first needed.

    Args:
        teacher: agreement is measured against it.
        heads: of teacher and students.
        images: uint8 or float [H, 3, S, S], letterboxed.
        letterboxes: one an image.
        annotations: of the same images in the same order.
    """

    def __init__(self, teacher: nn.Module, heads: Sequence[Head], images: Tensor, letterboxes: Sequence[Letterbox],
                 annotations: Annotations) -> None:
        self._teacher, self._heads = teacher, tuple(heads)
        self._images, self._letterboxes, self._annotations = images, tuple(letterboxes), annotations

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a module in eval mode, on its device.

        Returns:
            AP (mean over IoU 0.5 to 0.95) and AP50, as pycocotools has them, in [0, 1] (-1: nothing is annotated);
            agreement_80 and agreement_50, the share in [0, 1] of the objects_80 and objects_50 objects that the teacher
            finds with a score above 0.8 and 0.5, which the model finds too (1 where there are none); false_80, the
            number of objects that the model is sure of, above 0.8, and that the teacher does not have.
        """
        found = self.expected if model is self._teacher else self.detections(model)
        return {**average_precision(found, self._annotations), **agreement(self.expected, found)}

    @cached_property
    def expected(self) -> list[Detections]:
        """The teacher's detections."""
        return self.detections(self._teacher)

    @torch.inference_mode()
    def detections(self, model: nn.Module, rows: Sequence[int] | None = None) -> list[Detections]:
        """A model's detections in the images of some rows, None: in all, in pixels of the image."""
        device = next(model.parameters()).device
        rows = range(len(self._images)) if rows is None else rows
        found: list[Detections] = []
        for part in torch.tensor(rows).split(BATCH):
            found += detect(model(self._images[part].to(device)), self._heads)
        return [self._letterboxes[row].undo(each) for row, each in zip(rows, found, strict=True)]


def average_precision(found: Sequence[Detections], annotations: Annotations) -> dict[str, float]:
    """COCO's box AP and AP50 by pycocotools.

    Args:
        found: an entry an image, in pixels of the image.
        annotations: of these images.
    """
    from pycocotools.coco import COCO  # needed for detectors alone
    from pycocotools.cocoeval import COCOeval

    categories = np.array(annotations.category_ids)
    rows = [np.column_stack([np.full(len(each), image_id), each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2],
                             each.scores, categories[each.classes]])
            for image_id, each in zip(annotations.image_ids, found, strict=True)]
    rows = np.concatenate(rows)  # [all, 7]: image, left, top, width, height, score, category
    if not len(rows):  # pycocotools cannot tell nothing from a mistake
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = COCO()
        truth.dataset = {"info": {}, **annotations.content}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.imgIds = annotations.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": float(evaluation.stats[0]), "AP50": float(evaluation.stats[1])}


def agreement(expected: Sequence[Detections], found: Sequence[Detections]) -> dict[str, float]:
    """How far a student keeps what a teacher finds, without labels; see `DetectionMetrics`.

    Args:
        expected: the teacher's, an entry an image.
        found: the student's.
    """
    result = {}
    for name, score in (("80", CONFIDENT), ("50", LIKELY)):
        objects = [each.above(score) for each in expected]
        kept = sum(int(matched(e, f.at(f.scores >= SEEN)).sum()) for e, f in zip(objects, found, strict=True))
        total = sum(map(len, objects))
        result |= {f"agreement_{name}": kept / total if total else 1.0, f"objects_{name}": float(total)}
    invented = 0
    for e, f in zip(expected, found, strict=True):
        sure = f.above(CONFIDENT)
        invented += len(sure) - int(_same(sure, e.at(e.scores >= SEEN)).any(1).sum())
    return {**result, "false_80": float(invented)}


def matched(objects: Detections, found: Detections) -> Tensor:
    """bool [D]: which have a detection of their own; best first, each takes the free one that overlaps it most."""
    overlap = torch.where(_same(objects, found), box_iou(objects.boxes, found.boxes), 0)  # [D, D']
    result = torch.zeros(len(objects), dtype=torch.bool)
    for index, row in enumerate(overlap):
        if len(row) and row.max() > 0:
            result[index] = True
            overlap[:, row.argmax()] = 0  # taken
    return result


def _same(a: Detections, b: Detections) -> Tensor:
    """bool [D, D']: same class, and boxes that overlap."""
    return (a.classes[:, None] == b.classes) & (box_iou(a.boxes, b.boxes) >= SAME)
