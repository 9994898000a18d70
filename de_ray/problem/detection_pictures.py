"""A detector's teacher and its compressed forms side by side on held-out images, and what they miss."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from de_ray.problem.detection import Detections, Letterbox
from de_ray.problem.detection_metrics import CONFIDENT, SEEN, DetectionMetrics, matched
from de_ray.problem.masks import decode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from de_ray.problem.drawing import Mark

ROWS = 6
"""Images."""
MOST = 40
"""Detections of a network in an image, the best: a broken student's hundreds would hide it, and take minutes."""


class DetectionPictures:
    """Draws the held-out images in which the teacher finds the most confident objects: the teacher alone chooses.

    Args:
        metrics: of the same images; knows what models detect.
        images: uint8 or float in [0, 1], [H, 3, S, S], letterboxed.
        letterboxes: one an image.
        names: of the classes.
    """

    def __init__(self, metrics: DetectionMetrics, images: Tensor, letterboxes: Sequence[Letterbox],
                 names: Sequence[str]) -> None:
        self._metrics, self._images = metrics, images
        self._letterboxes, self._names = tuple(letterboxes), tuple(names)

    def __call__(self, models: Mapping[str, nn.Module]) -> "Figure":
        """A row an image, the teacher in the first column.

        Args:
            models: by the title of their columns; in eval mode, on their devices.
        """
        # matplotlib is slow to import, and only pictures need it.
        from de_ray.problem.drawing import Scene, draw_scenes

        expected = self._metrics.expected
        confident = torch.tensor([len(each.above(CONFIDENT)) for each in expected])
        chosen = confident.argsort(descending=True, stable=True)[:ROWS].tolist()
        columns = [[self._marks(expected[row]) for row in chosen]]
        total = int(confident[chosen].sum())
        titles = [f"teacher: {_objects(total)} above {CONFIDENT}"]
        for name, model in models.items():
            found = self._metrics.detections(model, chosen)
            missed = [_missed(expected[row], each) for row, each in zip(chosen, found, strict=True)]
            columns.append([self._marks(each, lost) for each, lost in zip(found, missed, strict=True)])
            titles.append(f"{name}: {total - sum(map(len, missed))} of them found")
        scenes = []
        for row, *marks in zip(chosen, *columns, strict=True):
            letterbox = self._letterboxes[row]
            scenes.append(Scene(self._pixels(row), (letterbox.width, letterbox.height), tuple(marks)))
        return draw_scenes(titles, scenes, f"Scores from {SEEN}. Dashed red: what the teacher finds with a score above "
                           f"{CONFIDENT} and this network does not (same class, from {SEEN}).")

    def _pixels(self, row: int) -> object:
        """uint8 [height, width, 3], without the letterbox's bars."""
        square = self._images[row]
        if square.is_floating_point():
            square = (255 * square).round().to(torch.uint8)
        return self._letterboxes[row].crop(square).permute(1, 2, 0).numpy()

    def _marks(self, found: Detections, missed: Detections | None = None) -> list["Mark"]:
        from de_ray.problem.drawing import Mark

        lost = [] if missed is None else self._listed(missed)
        seen = self._listed(found.at(found.scores >= SEEN).at(slice(MOST)))
        return [Mark(box, kind, f"missed: {label}", missed=True) for box, kind, label, _ in lost] + [
            Mark(box, kind, label, mask=mask) for box, kind, label, mask in seen]

    def _listed(self, found: Detections) -> list[tuple]:
        """Box, class, label and mask, if any, of each."""
        masks = [None] * len(found)
        if found.masks is not None and len(found):
            masks = list(decode(found.masks).numpy())
        return [(tuple(box), kind, f"{self._names[kind]} {score:.2f}", mask) for box, score, kind, mask in
                zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), masks, strict=True)]


def _missed(expected: Detections, found: Detections) -> Detections:
    """The teacher's confident objects that have no detection of their own."""
    objects = expected.above(CONFIDENT)
    return objects.at(~matched(objects, found.at(found.scores >= SEEN)))


def _objects(count: int) -> str:
    return f"{count} object{'' if count == 1 else 's'}"
