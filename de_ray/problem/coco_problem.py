"""A detector on COCO as a problem, whatever network it is."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from de_ray.checks import require
from de_ray.config import ProblemConfig
from de_ray.device import resolve_device
from de_ray.problem.annotations import read_annotations
from de_ray.problem.base import Divergence, Output, Problem
from de_ray.problem.cache import cache_folder, kept
from de_ray.problem.coco import ANNOTATIONS, TRAIN, VALIDATION, image_files, load_images
from de_ray.problem.detection import Detections
from de_ray.problem.detection_augment import Mosaics, augment_detection
from de_ray.problem.detection_metrics import DetectionMetrics, find
from de_ray.problem.detection_pictures import DetectionPictures
from de_ray.problem.divergence import make_divergence
from de_ray.problem.layers import find_layers
from de_ray.problem.sampling import draw_inputs, draw_sample

log = logging.getLogger(__name__)

COCO_URLS = "http://images.cocodataset.org/zips/{train2017,val2017}.zip and " \
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
"""Where COCO can be downloaded."""

OBJECTS_RECIPE = "1"
"""Version of how objects are found and counted; raised whenever what is kept in the cache would change."""
LEAST_CHANCE = 0.1
"""Of an image without any object, where one with one object has 1 more."""


@dataclass(frozen=True)
class Detector:
    """A trained network and how its outputs are read."""

    teacher: nn.Module
    """In eval mode, no gradients; from images [N, 3, S, S], uint8 or float in [0, 1], to raw heads."""
    architecture: str
    """As the file's header has it."""
    classes: int
    detect: Callable[[Output], list[Detections]]
    """Outputs for N images -> N detections, in pixels of the input."""
    divergence: Divergence
    """Of `problem.divergence=detection`."""
    objective: Divergence
    """The same with `problem.data.emphasis`, for refit."""


def coco_problem(config: ProblemConfig, seed: int, detector: Detector, root: Path, device: str = "cpu") -> Problem:
    """A detector with COCO's images: inputs are bytes [M, 3, S, S], outputs raw heads.

    Unlabelled inputs are the images of `train2017` and of further folders; the held-out ones are `val2017`'s, whose
    labels the metrics alone see.

    Args:
        config: what to compress.
        seed: of the draw of inputs.
        detector: the network.
        root: see `find_coco`.
        device: see `build_problem`.

    Raises:
        FileNotFoundError, ValueError: naming the key or the file at fault.
    """
    size, teacher = config.data.size, detector.teacher
    layers = find_layers(teacher, config.include, config.exclude)
    files = image_files(root / TRAIN, "problem.data.root")
    for folder in config.data.unlabelled:
        files += image_files(Path(folder).expanduser(), "problem.data.unlabelled")
    annotations = read_annotations(root / ANNOTATIONS, root / VALIDATION, detector.classes)
    files = _distinct(files, annotations.files)
    # Files are drawn before they are read: COCO's 118,287 images would take 61 GB.
    wanted = min(config.inputs_size, len(files))
    most = min(config.calibration_size, wanted or len(files))
    if most < config.calibration_size:
        log.info("calibration on all %d inputs, fewer than the %d asked for", most, config.calibration_size)
    usable, drawn = draw_inputs(torch.arange(len(files)), most, wanted, seed)
    inputs, _ = load_images([files[index] for index in usable], size, config.data.workers)
    held_out, letterboxes = load_images(annotations.files, size, config.data.workers, annotations.sizes)
    chances = None
    if config.data.draw == "objects":
        chances = LEAST_CHANCE + expected_objects(detector, inputs, device)
        calibration = inputs[draw_sample(len(inputs), chances, most, torch.Generator().manual_seed(seed))]
    else:
        place = {int(index): position for position, index in enumerate(usable)}
        calibration = inputs[torch.tensor([place[int(index)] for index in drawn])]
    augment = None
    if config.augment == "detection":
        mosaics = Mosaics(config.data.mosaic, inputs, chances)
        augment = partial(augment_detection, share=config.augment_share, mosaics=mosaics)
        calibration = augment(calibration, torch.Generator().manual_seed(seed))
    metrics = DetectionMetrics(teacher, detector.detect, held_out, letterboxes, annotations)
    return Problem(
        name=config.name, architecture=detector.architecture, teacher=teacher, layers=layers, inputs=inputs,
        calibration=calibration, held_out=held_out,
        divergence=detector.divergence if config.divergence == "detection" else make_divergence(config.divergence),
        metrics=metrics, augment=augment, chances=chances,
        objective=detector.objective if config.divergence == "detection" else None,
        sources=_digest([files[index] for index in usable]),
        pictures=DetectionPictures(metrics, held_out, letterboxes, annotations.class_names))


def _distinct(files: Sequence[Path], held_out: Sequence[Path]) -> list[Path]:
    """Each file once, however many folders lead to it; a warning where held-out ones are among them."""
    found = {file.resolve(): file for file in reversed(files)}
    shared = found.keys() & {file.resolve() for file in held_out}
    if shared:
        log.warning("%d of the %d held-out images are calibration images too: metrics will flatter the student",
                    len(shared), len(held_out))
    return list(found.values())[::-1]


def _digest(files: Sequence[Path]) -> str:
    """What tells files from others: names and sizes. Not their pixels, which libraries decode in ways of their own."""
    return hashlib.sha256("\n".join(f"{file.name} {file.stat().st_size}" for file in files).encode()).hexdigest()


def expected_objects(detector: Detector, images: Tensor, device: str = "cpu") -> Tensor:
    """float32 [M]: the sum of the scores of what the teacher finds in each image [M, 3, S, S]; kept in the cache."""
    teacher = detector.teacher

    def compute() -> Tensor:
        log.info("how many objects the teacher expects in each of %d images", len(images))
        try:
            found = find(teacher.to(resolve_device(device)), detector.detect, images)
        finally:
            teacher.to("cpu")
        return torch.tensor([float(each.scores.sum()) for each in found])

    return kept("objects", [OBJECTS_RECIPE, repr(teacher), *teacher.state_dict().values(), images], compute)


def require_size(config: ProblemConfig, strides: Sequence[float]) -> None:
    """Raise `ValueError` unless images fit a network whose layers have these strides in pixels."""
    require(config.data.size % max(strides) == 0, "problem.data.size", config.data.size,
            f"a multiple of the largest stride, {max(strides):g}")


def data_roots() -> list[Path]:
    """Where data and weights are looked for: `DE_RAY_DATA`, where it is set, and datasets/ in the cache."""
    data = os.environ.get("DE_RAY_DATA")
    return [*([Path(data).expanduser()] if data else []), cache_folder() / "datasets"]


def find_coco(config: ProblemConfig, lacking: Sequence[str] = ()) -> Path:
    """COCO's root.

    Args:
        config: `data.root` is looked at.
        lacking: what else is missing, with the way to get it.

    Raises:
        FileNotFoundError: naming everything that is missing.
    """
    lacking = list(lacking)
    places = [Path(config.data.root).expanduser()] if config.data.root else [root / "coco" for root in data_roots()]
    parts = (TRAIN, VALIDATION, ANNOTATIONS)
    root = next((place for place in places if all((place / part).exists() for part in parts)), None)
    if root is None:
        absent = [str(place / part) for place in places for part in parts if not (place / part).exists()]
        lacking.append(f"COCO: no {', no '.join(absent)}; download {COCO_URLS} and name the folder that they are "
                       "unpacked in with problem.data.root=")
    if lacking:
        raise FileNotFoundError(f"problem={config.name} lacks {'. It lacks '.join(lacking)}. (DE_RAY_DATA is "
                                f"{os.environ.get('DE_RAY_DATA')!r}; nothing is downloaded by itself.)")
    return root
