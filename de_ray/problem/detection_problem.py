"""Darknet detectors on COCO as problems."""

import logging
import os
from functools import partial
from pathlib import Path

import torch

from de_ray.config import RANDOM, ProblemConfig, require
from de_ray.problem.base import Problem
from de_ray.problem.cache import cache_folder
from de_ray.problem.coco import ANNOTATIONS, TRAIN, VALIDATION, image_files, load_images, read_annotations
from de_ray.problem.darknet import Darknet
from de_ray.problem.darknet_cfg import SHIPPED, Section, classes, parse, shipped
from de_ray.problem.darknet_weights import draw_weights, load_weights
from de_ray.problem.detection_augment import augment_detection
from de_ray.problem.detection_divergence import detection_divergence
from de_ray.problem.detection_metrics import DetectionMetrics
from de_ray.problem.detection_pictures import DetectionPictures
from de_ray.problem.divergence import make_divergence
from de_ray.problem.layers import find_layers
from de_ray.problem.sampling import draw_inputs

log = logging.getLogger(__name__)

WEIGHTS = {"yolov3": "yolov3.weights", "yolov3_tiny": "yolov3-tiny.weights"}
"""As they are published, by problem."""
PUBLISHED = "https://pjreddie.com/media/files/"
"""Where weights can be downloaded."""
COCO_URLS = "http://images.cocodataset.org/zips/{train2017,val2017}.zip and " \
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
"""Where COCO can be downloaded."""


def build_detector(config: ProblemConfig, seed: int) -> Problem:
    """The problem of `problem=yolov3` or `problem=yolov3_tiny`: inputs are bytes [M, 3, S, S], outputs raw heads.

    Unlabelled inputs are the images of `train2017` and of further folders; the held-out ones are `val2017`'s, whose
    labels the metrics alone see.

    Args:
        config: what to compress.
        seed: of the draw of inputs and of random weights.

    Raises:
        FileNotFoundError: weights or images that are not there, all of them in one message.
        ValueError: naming the key or the file at fault.
    """
    sections = _sections(config)
    network = Darknet(sections)
    find_layers(network, config.include, config.exclude)  # a mistyped pattern need not wait for data
    size, largest = config.data.size, max(head.stride for head in network.heads)
    require(size % largest == 0, "problem.data.size", size, f"a multiple of the largest stride, {largest}")
    detection = config.divergence == "detection"
    divergence = detection_divergence(classes(sections)) if detection else make_divergence(config.divergence)
    weights, root = _find(config)
    if weights is None:
        log.warning("%s has random weights: its metrics mean nothing", config.name)
        teacher = draw_weights(network, seed)
    else:
        teacher = load_weights(network, weights)
    teacher.requires_grad_(False)
    files = image_files(root / TRAIN, "problem.data.root")
    for folder in config.data.unlabelled:
        files += image_files(Path(folder).expanduser(), "problem.data.unlabelled")
    annotations = read_annotations(root / ANNOTATIONS, root / VALIDATION, classes(sections))
    # Files are drawn before they are read: COCO's 118,287 images would take 61 GB.
    wanted = min(config.inputs_size, len(files))
    most = min(config.calibration_size, wanted or len(files))
    if most < config.calibration_size:
        log.info("calibration on all %d inputs, fewer than the %d asked for", most, config.calibration_size)
    usable, drawn = draw_inputs(torch.arange(len(files)), most, wanted, seed)
    inputs, _ = load_images([files[index] for index in usable], size, config.data.workers)
    held_out, letterboxes = load_images(annotations.files, size, config.data.workers)
    place = {int(index): position for position, index in enumerate(usable)}
    calibration = inputs[torch.tensor([place[int(index)] for index in drawn])]
    augment = None
    if config.augment == "detection":
        augment = partial(augment_detection, share=config.augment_share)
        calibration = augment(calibration, torch.Generator().manual_seed(seed))
    metrics = DetectionMetrics(teacher, teacher.heads, held_out, letterboxes, annotations)
    return Problem(
        name=config.name, architecture=config.name if config.cfg is None else f"darknet:{Path(config.cfg).name}",
        teacher=teacher, layers=find_layers(teacher, config.include, config.exclude), inputs=inputs,
        calibration=calibration, held_out=held_out, divergence=divergence,
        metrics=metrics, augment=augment,
        pictures=DetectionPictures(metrics, held_out, letterboxes, annotations.class_names))


def build_darknet(name: str) -> Darknet:
    """A network in `SHIPPED` with the weights that torch draws, in eval mode."""
    return Darknet(shipped(name)).eval()


def _sections(config: ProblemConfig) -> list[Section]:
    if config.cfg is None:
        return shipped(config.name)
    path = Path(config.cfg).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"problem.cfg={config.cfg!r}: no such file; leave it out for the package's "
                                f"{SHIPPED[config.name]}")
    return parse(path.read_text(), path.name)


def _find(config: ProblemConfig) -> tuple[Path | None, Path]:
    """The weights file, None for random weights, and COCO's root.

    Raises:
        FileNotFoundError: naming everything that is missing.
    """
    data = os.environ.get("DE_RAY_DATA")
    roots = [Path(data).expanduser()] if data else []
    roots.append(cache_folder() / "datasets")
    lacking = []
    weights = None
    if config.weights != RANDOM:
        file = WEIGHTS[config.name]
        places = [Path(config.weights).expanduser()] if config.weights else [r / "darknet" / file for r in roots]
        weights = next((place for place in places if place.is_file()), None)
        if weights is None:
            lacking.append(f"the weights: no {', no '.join(map(str, places))}; download {PUBLISHED}{file} and name it "
                           f"with problem.weights=, or take problem.weights={RANDOM} to try the machinery")
    places = [Path(config.data.root).expanduser()] if config.data.root else [root / "coco" for root in roots]
    parts = (TRAIN, VALIDATION, ANNOTATIONS)
    root = next((place for place in places if all((place / part).exists() for part in parts)), None)
    if root is None:
        absent = [str(place / part) for place in places for part in parts if not (place / part).exists()]
        lacking.append(f"COCO: no {', no '.join(absent)}; download {COCO_URLS} and name the folder that they are "
                       "unpacked in with problem.data.root=")
    if lacking:
        raise FileNotFoundError(f"problem={config.name} lacks {'. It lacks '.join(lacking)}. (DE_RAY_DATA is {data!r}; "
                                "nothing is downloaded by itself.)")
    return weights, root
