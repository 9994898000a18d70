"""Labelled image sets of the built-in classifiers, each as four tensors in memory."""

import gzip
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from de_ray.problem.cache import cache_folder

log = logging.getLogger(__name__)

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its gzipped idx files."""
NORMALISATION = {"MNIST": (0.1307, 0.3081), "FashionMNIST": (0.2860, 0.3530)}
"""Mean and standard deviation of the training pixels, scaled to [0, 1]."""
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIGITS_SEED = 0
"""Of the digits' split into training and held-out images: one split for every run."""


@dataclass(frozen=True)
class LabelledImages:
    """A classification set, split. Labels are for training the teacher and for the held-out metric alone."""

    train: Tensor
    """float32 [M, C, H, W], normalised."""
    train_labels: Tensor
    """int64 [M]."""
    test: Tensor
    """float32 [H, C, H, W], normalised."""
    test_labels: Tensor
    """int64 [H]."""


def load_digits() -> LabelledImages:
    """The 8 x 8 digits that scikit-learn ships: 1,437 training and 360 held-out images, values in [0, 1]."""
    from sklearn.datasets import load_digits as sklearn_digits  # a slow import that only this data set needs
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=0.2, stratify=labels,
                                                              random_state=DIGITS_SEED)
    as_images = [torch.from_numpy(x / 16).float().reshape(-1, 1, 8, 8) for x in (train, test)]
    as_labels = [torch.from_numpy(y).long() for y in (train_labels, test_labels)]
    return LabelledImages(as_images[0], as_labels[0], as_images[1], as_labels[1])


def load_mnist(name: str) -> LabelledImages:
    """MNIST or Fashion-MNIST, normalised to mean 0 and standard deviation 1 of the training pixels.

    Looked for under `DE_RAY_DATA` (torchvision's layout, files plain or gzipped), in Debian's package (Fashion-MNIST),
    and among earlier downloads in the cache folder; else it is downloaded there.

    Args:
        name: MNIST or FashionMNIST, torchvision's name.

    Raises:
        FileNotFoundError: when no way of finding the set works; the message names them all.
        ValueError: for files that are damaged.
    """
    raw, packed = _find(name)
    if raw is not None:
        return _read(name, raw)
    # torchvision recognises plain files only, and the folder that holds the gzipped ones may be read-only.
    with tempfile.TemporaryDirectory(prefix="de_ray_") as root:
        _unpack(packed, Path(root) / name / "raw")
        return _read(name, Path(root), packed)


def _holds(folder: Path, suffix: str = "") -> bool:
    return all((folder / (file + suffix)).is_file() for file in FILES)


def _find(name: str) -> tuple[Path | None, Path]:
    """(torchvision's root, or None, and the folder with the set's files, gzipped when there is no root)."""
    data = os.environ.get("DE_RAY_DATA")
    if data:
        root = Path(data).expanduser()
        raw = root / name / "raw"
        if _holds(raw):
            return root, raw
        if _holds(raw, ".gz"):
            return None, raw
        log.warning("DE_RAY_DATA=%s does not hold %s/raw with its four idx files: looking elsewhere", data, name)
    if name == "FashionMNIST" and _holds(DEBIAN_FASHION, ".gz"):
        return None, DEBIAN_FASHION
    root = cache_folder() / "datasets"
    if not _holds(root / name / "raw"):
        _download(name, root)
    return root, root / name / "raw"


def _download(name: str, root: Path) -> None:
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        # Into place only when complete: torchvision takes whatever files it finds for whole ones.
        with tempfile.TemporaryDirectory(dir=root) as partial:
            getattr(datasets, name)(partial, download=True)
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(Path(partial) / name, root / name)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} not found. Either point DE_RAY_DATA (now {os.environ.get('DE_RAY_DATA')!r}) at a folder that "
            f"holds {name}/raw with {', '.join(FILES)} (plain or .gz); or, for Fashion-MNIST, install Debian's "
            f"package dataset-fashion-mnist into {DEBIAN_FASHION}; or allow its download into {root} "
            f"(it failed: {' '.join(str(error).split())})") from error


def _unpack(packed: Path, raw: Path) -> None:
    raw.mkdir(parents=True)
    for file in FILES:
        source = packed / f"{file}.gz"
        try:
            with gzip.open(source) as compressed, open(raw / file, "wb") as plain:
                shutil.copyfileobj(compressed, plain)
        except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
            raise ValueError(f"{source} is damaged: {error}") from error


def _read(name: str, root: Path, source: Path | None = None) -> LabelledImages:
    from torchvision import datasets

    source = source or root / name / "raw"
    mean, deviation = NORMALISATION[name]
    parts = []
    for train in (True, False):
        try:
            split = getattr(datasets, name)(root, train=train)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the idx files of {source} are damaged: {error}") from error
        images, labels = split.data, split.targets
        if images.shape != (len(labels), 28, 28) or len(labels) == 0 or int(labels.max()) > 9:
            raise ValueError(f"the idx files of {source} do not hold 28 x 28 images with labels 0 to 9: "
                             f"{list(images.shape)} images, {len(labels)} labels")
        parts += [images.float().div_(255).sub_(mean).div_(deviation).unsqueeze(1), labels]
    return LabelledImages(*parts)
