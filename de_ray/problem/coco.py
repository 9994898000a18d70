"""Images by folder, as detectors take them: letterboxed squares in bytes.

The layout is that of COCO 2017 (https://cocodataset.org): `train2017/`, `val2017/` and `annotations/` under one root.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
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


class LetterboxedImages(Dataset):
    """Images scaled into the middle of a square, the rest grey; readable by worker processes.

    An item is (pixels uint8 [3, size, size], width, height), RGB, or a message where the file is no image.

    Args:
        files: of the images.
        size: pixels of the square's side.
        known: width and height that each must have, as it is stored or as its camera says to turn it; None: as its
            camera says.
    """

    def __init__(self, files: Sequence[Path], size: int, known: Sequence[tuple[int, int] | None]) -> None:
        self._files = [str(file) for file in files]
        self._size, self._known = size, known

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int] | str:
        try:
            with Image.open(self._files[index]) as image:
                image = _as_seen(image, self._known[index])
                letterbox = Letterbox(*image.size, self._size)
                left, top = letterbox.corner
                square = np.full((self._size, self._size, 3), GREY, np.uint8)
                width, height = letterbox.inner
                square[top:top + height, left:left + width] = image.resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            return f"{self._files[index]}: not an image that can be read: {error}"
        return np.ascontiguousarray(square.transpose(2, 0, 1)), letterbox.width, letterbox.height


def _as_seen(image: Image.Image, known: tuple[int, int] | None) -> Image.Image:
    """Upright, of a size that is known, and in eight bits a colour.

    Raises:
        ValueError: it is of another size, or of a kind whose white is not known.
    """
    turned = ImageOps.exif_transpose(image)
    if known not in (None, turned.size, image.size):
        raise ValueError(f"it has {image.width} x {image.height} pixels, its annotations are of {known[0]} x "
                         f"{known[1]}: expected the image that was annotated")
    image = image if known == image.size else turned
    if image.mode.startswith("I;16"):  # Pillow would take all above 255 for white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of Pillow's kind {image.mode}: expected 8 or 16 bits; convert it")
    return image.convert("RGB")


def load_images(files: Sequence[Path], size: int, workers: int,
                known: Sequence[tuple[int, int] | None] | None = None) -> tuple[Tensor, list[Letterbox]]:
    """Read images into memory.

    Args:
        files: M images.
        size: pixels of the square's side.
        workers: processes that read them; 0: this one. The result does not depend on it.
        known: M sizes, see `LetterboxedImages`.

    Returns:
        uint8 [M, 3, size, size], and how each was laid into its square.

    Raises:
        ValueError: naming a file that cannot be read, or is of another size.
    """
    images = torch.empty((len(files), 3, size, size), dtype=torch.uint8)
    letterboxes = []
    # Unbatched and as NumPy arrays, which travel through pipes: shared memory is scarce in containers.
    dataset = LetterboxedImages(files, size, known or [None] * len(files))
    loader = DataLoader(dataset, batch_size=None, num_workers=min(workers, len(files)), collate_fn=_as_it_is)
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
