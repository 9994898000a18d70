"""Images by folder and COCO's annotations, as detectors take them: letterboxed squares in bytes.

The layout is that of COCO 2017 (https://cocodataset.org): `train2017/`, `val2017/` and `annotations/` under one root.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from de_ray.problem.detection import Letterbox

log = logging.getLogger(__name__)

GREY = 114
"""Of the bars beside an image, in 0..255."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Of the files that count as images."""
TRAIN, VALIDATION, ANNOTATIONS = "train2017", "val2017", "annotations/instances_val2017.json"
"""Below the root."""


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
    def category_ids(self) -> list[int]:
        """Category of each class: networks count classes without gaps, in the order of COCO's ids, which have some."""
        return sorted(category["id"] for category in self.content["categories"])

    @property
    def class_names(self) -> list[str]:
        """Of each class."""
        names = {category["id"]: str(category.get("name", category["id"])) for category in self.content["categories"]}
        return [names[category_id] for category_id in self.category_ids]


def image_files(folder: Path, key: str) -> list[Path]:
    """The images directly in a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}={str(folder)!r}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{key}={str(folder)!r}: holds no image ({', '.join(SUFFIXES)})")
    return files


def read_annotations(path: Path, images: Path, classes: int) -> Annotations:
    """Read COCO's instances and find their images.

    Args:
        path: of the JSON file.
        images: folder of the images that it lists.
        classes: that the network tells apart.

    Raises:
        ValueError: for a file that is no such JSON, another number of categories, or images that are not there.
    """
    try:
        content = json.loads(path.read_text())
        names = [image["file_name"] for image in content["images"]]
        found = len({category["id"] for category in content["categories"]})
        known = {image["id"] for image in content["images"]}
        strangers = [a["id"] for a in content["annotations"] if a["image_id"] not in known]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not COCO instances, JSON with images, annotations and categories: "
                         f"{type(error).__name__} {error}") from error
    if found != classes:
        raise ValueError(f"{path}: has {found} categories: expected {classes}, one for each of the network's classes")
    if not names or strangers:
        raise ValueError(f"{path}: {len(names)} images, {len(strangers)} annotations of images that it does not list: "
                         "expected some images, and only annotations of theirs")
    files = tuple(images / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path}: lists {len(files)} images, of which {len(missing)} are not in {images}, "
                         f"{missing[0]} for one: expected them all; leave those out of the JSON that you do not have")
    return Annotations(content, files)


class LetterboxedImages(Dataset):
    """Images scaled into the middle of a square, the rest grey; readable by worker processes.

    An item is (pixels uint8 [3, size, size], width, height), RGB, or a message where the file is no image.

    Args:
        files: of the images.
        size: pixels of the square's side.
    """

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self._files = [str(file) for file in files]
        self._size = size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int] | str:
        try:
            with Image.open(self._files[index]) as image:
                image = image.convert("RGB")
                letterbox = Letterbox(*image.size, self._size)
                left, top = letterbox.corner
                square = np.full((self._size, self._size, 3), GREY, np.uint8)
                width, height = letterbox.inner
                square[top:top + height, left:left + width] = image.resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            return f"{self._files[index]}: not an image that can be read: {error}"
        return np.ascontiguousarray(square.transpose(2, 0, 1)), letterbox.width, letterbox.height


def load_images(files: Sequence[Path], size: int, workers: int) -> tuple[Tensor, list[Letterbox]]:
    """Read images into memory.

    Args:
        files: M images.
        size: pixels of the square's side.
        workers: processes that read them; 0: this one. The result does not depend on it.

    Returns:
        uint8 [M, 3, size, size], and how each was laid into its square.

    Raises:
        ValueError: naming a file that cannot be read.
    """
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    letterboxes = []
    # Unbatched and as NumPy arrays, which travel through pipes: shared memory is scarce in containers.
    loader = DataLoader(LetterboxedImages(files, size), batch_size=None, num_workers=min(workers, len(files)),
                        collate_fn=_as_it_is)
    for index, item in enumerate(loader):
        if isinstance(item, str):
            raise ValueError(item)
        pixels, width, height = item
        images[index] = torch.from_numpy(pixels)
        letterboxes.append(Letterbox(width, height, size))
    log.info("%d images read, %.0f MB", len(files), images.numel() / 2**20)
    return images, letterboxes


def _as_it_is(item: object) -> object:
    return item
