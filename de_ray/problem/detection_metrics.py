"""What a report says of a detector: COCO's average precision, and agreement with the teacher."""

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from de_ray.problem.annotations import Annotations
from de_ray.problem.base import Output
from de_ray.problem.detection import Detections, Letterbox
from de_ray.problem.masks import mask_iou

CONFIDENT = 0.8
"""Score above which an object must be kept: the paper's claim (Franca-Neto, arXiv:2206.05859)."""
LIKELY = 0.5
"""The same, of a stricter count."""
SEEN = 0.25
"""Score from which on the other network has the object."""
SAME = 0.5
"""IoU from which on two boxes, or masks, of one class are one object."""
BATCH = 8
"""Images a forward pass."""

Overlap = Callable[[Detections, Detections], Tensor]
"""IoU of each pair of detections: [D, D']."""


class DetectionMetrics:
    """Metrics of a detector on held-out images; the teacher's detections are computed once, when first needed.

    Args:
        teacher: agreement is measured against it.
        detect: outputs of teacher or student for N images -> N detections, in pixels of the input.
        images: uint8 or float [H, 3, S, S], letterboxed.
        letterboxes: one an image.
        annotations: of the same images in the same order.
    """

    def __init__(self, teacher: nn.Module, detect: Callable[[Output], list[Detections]], images: Tensor,
                 letterboxes: Sequence[Letterbox], annotations: Annotations) -> None:
        self._teacher, self._detect = teacher, detect
        self._images, self._letterboxes, self._annotations = images, tuple(letterboxes), annotations

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a module in eval mode, on its device.

        Returns:
            AP (mean over IoU 0.5 to 0.95) and AP50, as pycocotools has them, in [0, 1], see `average_precision`;
            agreement_80 and agreement_50, the share in [0, 1] of the objects_80 and objects_50 objects that the teacher
            finds with a score above 0.8 and 0.5, which the model finds too (1 where there are none); false_80, the
            number of objects that the model is sure of, above 0.8, and that the teacher does not have. Of a segmenter
            the same by masks in place of boxes, as mask_AP and so on.
        """
        found = self.expected if model is self._teacher else self.detections(model)
        result = {**average_precision(found, self._annotations), **agreement(self.expected, found)}
        if all(each.masks is not None for each in self.expected):
            by_mask = {**average_precision(found, self._annotations, "segm"),
                       **agreement(self.expected, found, mask_overlap)}
            result |= {f"mask_{key}": value for key, value in by_mask.items() if not key.startswith("objects")}
        return result

    @cached_property
    def expected(self) -> list[Detections]:
        """The teacher's detections."""
        return self.detections(self._teacher)

    def detections(self, model: nn.Module, rows: Sequence[int] | None = None) -> list[Detections]:
        """A model's detections in the images of some rows, None: in all, in pixels of the image."""
        images = self._images if rows is None else self._images[torch.tensor(rows)]
        rows = range(len(self._images)) if rows is None else rows
        found = find(model, self._detect, images)
        return [self._letterboxes[row].undo(each) for row, each in zip(rows, found, strict=True)]


@torch.inference_mode()
def find(model: nn.Module, detect: Callable[[Output], list[Detections]], images: Tensor) -> list[Detections]:
    """A model's detections in images [N, 3, S, S], one entry each, in pixels of the input; a few images at a time."""
    device = next(model.parameters()).device
    return [each for part in images.split(BATCH) for each in detect(model(part.to(device)))]


def box_overlap(a: Detections, b: Detections) -> Tensor:
    """[D, D'] by boxes."""
    return box_iou(a.boxes, b.boxes)


def mask_overlap(a: Detections, b: Detections) -> Tensor:
    """[D, D'] by masks."""
    return mask_iou(a.masks, b.masks)


def average_precision(found: Sequence[Detections], annotations: Annotations, kind: str = "bbox") -> dict[str, float]:
    """COCO's AP and AP50 by pycocotools.

    Args:
        found: an entry an image, in pixels of the image.
        annotations: of these images.
        kind: bbox, or segm of masks.

    Returns:
        Both in [0, 1]; -1 where nothing of the kind is annotated.
    """
    from pycocotools.coco import COCO  # needed for detectors alone
    from pycocotools.cocoeval import COCOeval

    if not annotations.content["annotations"] or (kind == "segm" and not annotations.masked):
        return {"AP": -1.0, "AP50": -1.0}
    rows = _boxes(found, annotations) if kind == "bbox" else _masks(found, annotations)
    if not len(rows):  # pycocotools cannot tell nothing from a mistake
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = COCO()
        truth.dataset = {"info": {}, **annotations.content}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.params.imgIds = annotations.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": float(evaluation.stats[0]), "AP50": float(evaluation.stats[1])}


def _boxes(found: Sequence[Detections], annotations: Annotations) -> np.ndarray:
    """[all, 7]: image, left, top, width, height, score, category."""
    categories = np.array(annotations.category_ids)
    return np.concatenate([
        np.column_stack([np.full(len(each), image_id), each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2],
                         each.scores, categories[each.classes]])
        for image_id, each in zip(annotations.image_ids, found, strict=True)])


def _masks(found: Sequence[Detections], annotations: Annotations) -> list[dict]:
    categories = annotations.category_ids
    return [{"image_id": image_id, "category_id": categories[kind], "score": score, "segmentation": mask}
            for image_id, each in zip(annotations.image_ids, found, strict=True)
            for kind, score, mask in zip(each.classes.tolist(), each.scores.tolist(), each.masks, strict=True)]


def agreement(expected: Sequence[Detections], found: Sequence[Detections],
              overlap: Overlap = box_overlap) -> dict[str, float]:
    """How far a student keeps what a teacher finds, without labels; see `DetectionMetrics`.

    Args:
        expected: the teacher's, an entry an image.
        found: the student's.
        overlap: by which two detections are one object.
    """
    # Of what lies in the grey bars nothing is left in the image, not even to overlap with itself.
    expected, found = ([each.visible(overlap is mask_overlap) for each in every] for every in (expected, found))
    result = {}
    for name, score in (("80", CONFIDENT), ("50", LIKELY)):
        objects = [each.above(score) for each in expected]
        kept = sum(int(matched(e, f.at(f.scores >= SEEN), overlap).sum()) for e, f in zip(objects, found, strict=True))
        total = sum(map(len, objects))
        result |= {f"agreement_{name}": kept / total if total else 1.0, f"objects_{name}": float(total)}
    invented = 0
    for e, f in zip(expected, found, strict=True):
        sure = f.above(CONFIDENT)
        invented += len(sure) - int(_same(sure, e.at(e.scores >= SEEN), overlap).gt(0).any(1).sum())
    return {**result, "false_80": float(invented)}


def matched(objects: Detections, found: Detections, overlap: Overlap = box_overlap) -> Tensor:
    """bool [D]: which have a detection of their own, as many of them as can."""
    from scipy.optimize import linear_sum_assignment  # takes half a second, which only detectors need

    pairs = (_same(objects, found, overlap) > 0).numpy()
    result = torch.zeros(len(objects), dtype=torch.bool)
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    result[rows[pairs[rows, columns]]] = True
    return result


def _same(a: Detections, b: Detections, overlap: Overlap) -> Tensor:
    """[D, D']: IoU of pairs of one class that overlap enough to be one object, 0 of others."""
    iou = overlap(a, b)
    return torch.where((a.classes[:, None] == b.classes) & (iou >= SAME), iou, 0)
