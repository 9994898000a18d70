"""COCO's instances, checked and completed as they are read: a run must not end in what metrics stumble over."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from de_ray.checks import require

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotations:
    """Labels of held-out images; for metrics alone."""

    content: dict
    """COCO's JSON: images, annotations and categories."""
    files: tuple[Path, ...]
    """One an image, in the order of `content["images"]`; none where images were made in memory."""

    @property
    def image_ids(self) -> list[int]:
        """In the order of the files."""
        return [image["id"] for image in self.content["images"]]

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """Width and height of each image in whose pixels its boxes are; None where the JSON does not say."""
        pairs = [(image.get("width"), image.get("height")) for image in self.content["images"]]
        return [None if None in pair else pair for pair in pairs]

    @property
    def category_ids(self) -> list[int]:
        """Category of each class: networks count classes without gaps, in the order of COCO's ids, which have some."""
        return sorted(category["id"] for category in self.content["categories"])

    @property
    def class_names(self) -> list[str]:
        """Of each class."""
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.content["categories"]}
        return [names[category_id] for category_id in self.category_ids]

    @property
    def masked(self) -> bool:
        """Whether every annotation has the outline that average precision of masks needs, and every image its size."""
        return all(a.get("segmentation") for a in self.content["annotations"]) and None not in self.sizes


def read_annotations(path: Path, images: Path, classes: int) -> Annotations:
    """Read COCO's instances and find their images.

    Args:
        path: of the JSON file. `iscrowd` and `area` may be missing: 0, and that of the box.
        images: folder of the images that it lists.
        classes: that the network tells apart.

    Raises:
        ValueError: for a file that is no such JSON, another number of categories, or images that are not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        listed, found = list(content["images"]), list(content["annotations"])
        categories = [_whole(category, "id") for category in content["categories"]]
        known = [_whole(image, "id") for image in listed]
        files = tuple(images / _text(image, "file_name") for image in listed)
        for image in listed:
            for key in ("width", "height"):
                if image.get(key) is not None:
                    _whole(image, key)
        # Numbered anew: pycocotools takes an annotation of number 0 for none, and two of one number for one.
        sizes = {image["id"]: (image.get("height"), image.get("width")) for image in listed}
        content["annotations"] = [_completed(a, number, sizes) for number, a in enumerate(found, start=1)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not COCO instances, JSON with images, annotations and categories: "
                         f"{type(error).__name__} {error}") from error
    for name, ids in (("images", known), ("categories", categories)):
        require(len(set(ids)) == len(ids), f"{path}: {name}", len(ids), f"distinct ids, found {len(set(ids))}")
    spoilt = sum(bool(before.get("segmentation")) and not after["segmentation"]
                 for before, after in zip(found, content["annotations"], strict=True))
    if spoilt:
        log.warning("%s: %d of %d annotations have no outline that encloses anything, in the image's size: average "
                    "precision of masks is not measured", path, spoilt, len(found))
    if len(categories) != classes:
        raise ValueError(f"{path}: has {len(categories)} categories: expected {classes}, one for each of the network's "
                         "classes")
    for name, key, ids in (("images", "image_id", set(known)), ("categories", "category_id", set(categories))):
        strangers = sum(a[key] not in ids for a in content["annotations"])
        if not ids or strangers:
            raise ValueError(f"{path}: {len(ids)} {name}, {strangers} annotations of {name} that it does not list: "
                             f"expected some {name}, and only annotations of theirs")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path}: lists {len(files)} images, of which {len(missing)} are not in {images}, "
                         f"{missing[0]} for one: expected them all; leave those out of the JSON that you do not have")
    return Annotations(content, files)


def _completed(annotation: Mapping[str, Any], number: int, sizes: Mapping[int, tuple]) -> dict:
    box = annotation["bbox"]
    if len(box) != 4 or not all(math.isfinite(side) for side in box):
        raise ValueError(f"annotation {annotation.get('id', number)} has the bbox {box}, expected 4 numbers")
    for key in ("image_id", "category_id"):
        _whole(annotation, key)
    area = annotation.get("area")
    return {**annotation, "id": number, "iscrowd": int(annotation.get("iscrowd") or 0),
            "area": float(box[2] * box[3] if area is None else area),
            "segmentation": _outline(annotation.get("segmentation"), sizes.get(annotation["image_id"]))}


def _outline(outline: Any, size: tuple[int, int] | None) -> list | dict | None:
    """What is valid of an outline: polygons of three points or more, or run lengths that fill the image's height and
    width; None where nothing is. pycocotools checks neither, and counts on for hours where run lengths do not fit."""
    if isinstance(outline, list):
        return [polygon for polygon in outline if isinstance(polygon, list) and len(polygon) >= 6
                and len(polygon) % 2 == 0 and all(isinstance(at, int | float) and math.isfinite(at) for at in polygon)]
    if isinstance(outline, Mapping) and size is not None and list(outline.get("size") or []) == list(size):
        counts = outline.get("counts")
        if isinstance(counts, str | bytes):
            return dict(outline)
        if isinstance(counts, list) and all(isinstance(run, int) and run >= 0 for run in counts) and (
                sum(counts) == math.prod(size)):
            return dict(outline)
    return None


def _whole(entry: Mapping[str, Any], key: str) -> int:
    if not isinstance(entry[key], int):
        raise ValueError(f"{key}={entry[key]!r}, expected a whole number")
    return entry[key]


def _text(entry: Mapping[str, Any], key: str) -> str:
    if not isinstance(entry[key], str):
        raise ValueError(f"{key}={entry[key]!r}, expected text")
    return entry[key]
