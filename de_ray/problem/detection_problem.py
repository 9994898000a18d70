"""Darknet detectors on COCO as problems."""

import logging
from functools import partial
from pathlib import Path

from de_ray.config import RANDOM, ProblemConfig
from de_ray.problem.base import Problem
from de_ray.problem.coco_problem import Detector, coco_problem, data_roots, find_coco, require_size
from de_ray.problem.darknet import Darknet
from de_ray.problem.darknet_cfg import SHIPPED, Section, classes, input_size, parse, shipped
from de_ray.problem.darknet_weights import draw_weights, load_weights
from de_ray.problem.detection import detect
from de_ray.problem.detection_divergence import detection_divergence
from de_ray.problem.layers import find_layers

log = logging.getLogger(__name__)

WEIGHTS = {"yolov3": "yolov3.weights", "yolov3_tiny": "yolov3-tiny.weights"}
"""As they are published, by problem."""
PUBLISHED = "https://pjreddie.com/media/files/"
"""Where weights can be downloaded."""


def build_detector(config: ProblemConfig, seed: int, device: str = "cpu") -> Problem:
    """The problem of `problem=yolov3` or `problem=yolov3_tiny`, see `coco_problem`.

    Args:
        config: what to compress.
        seed: of the draw of inputs and of random weights.
        device: see `build_problem`.

    Raises:
        FileNotFoundError: weights or images that are not there, all of them in one message.
        ValueError: naming the key or the file at fault.
    """
    sections = _sections(config)
    network = Darknet(sections)
    find_layers(network, config.include, config.exclude)  # a mistyped pattern need not wait for data
    require_size(config, network.strides)
    weights, root = _find(config)
    if weights is None:
        log.warning("%s has random weights: its metrics mean nothing", config.name)
        teacher = draw_weights(network, seed)
    else:
        teacher = load_weights(network, weights)
    teacher.requires_grad_(False)
    architecture = config.name if config.cfg is None else f"darknet:{Path(config.cfg).name}"
    number = classes(sections)
    detector = Detector(teacher, architecture, number, partial(detect, heads=teacher.heads),
                        detection_divergence(number), detection_divergence(number, emphasis=config.data.emphasis))
    return coco_problem(config, seed, detector, root, device)


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
    text = path.read_text()
    sections, size, own = parse(text, path.name), config.data.size, input_size(text)
    if own not in (None, (size, size)):
        log.warning("%s is of images of %d x %d; they are %d x %d here: problem.data.size=%d", path.name, *own, size,
                    size, size)
    return sections


def _find(config: ProblemConfig) -> tuple[Path | None, Path]:
    """The weights file, None for random weights, and COCO's root.

    Raises:
        FileNotFoundError: naming everything that is missing.
    """
    lacking = []
    weights = None
    if config.weights != RANDOM:
        file = WEIGHTS[config.name]
        places = [Path(config.weights).expanduser()] if config.weights else [r / "darknet" / file for r in data_roots()]
        weights = next((place for place in places if place.is_file()), None)
        if weights is None:
            lacking.append(f"the weights: no {', no '.join(map(str, places))}; download {PUBLISHED}{file} and name it "
                           f"with problem.weights=, or take problem.weights={RANDOM} to try the machinery")
    return weights, find_coco(config, lacking)
