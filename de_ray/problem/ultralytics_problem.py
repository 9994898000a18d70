"""Detectors and segmenters of ultralytics on COCO as problems."""

import logging
from functools import partial
from pathlib import Path

from torch import nn

from de_ray.config import ULTRALYTICS, ProblemConfig
from de_ray.problem.anchor_free import detect
from de_ray.problem.anchor_free_divergence import AnchorFreeDivergence
from de_ray.problem.base import Problem
from de_ray.problem.coco_problem import Detector, coco_problem, data_roots, find_coco, require_size
from de_ray.problem.layers import find_layers
from de_ray.problem.teacher import load_checkpoint
from de_ray.problem.ultralytics import architecture_name, build_network, load_network, raw_heads

log = logging.getLogger(__name__)

PUBLISHED = "https://github.com/ultralytics/assets/releases"
"""Where checkpoints can be downloaded."""


def build_ultralytics(config: ProblemConfig, seed: int, device: str = "cpu") -> Problem:
    """The problem of `problem=ultralytics`, see `coco_problem`; of a segmenter, masks are compressed and measured too.

    Args:
        config: what to compress.
        seed: of the draw of inputs and of random weights.
        device: see `build_problem`.

    Raises:
        FileNotFoundError: weights or images that are not there, all of them in one message.
        ValueError: naming the key or the file at fault.
    """
    lacking: list[str] = []
    network = _network(config, seed, lacking)
    root = find_coco(config, lacking)
    architecture = architecture_name(network)
    teacher = raw_heads(network)
    find_layers(teacher, config.include, config.exclude)  # a mistyped pattern need not wait for data
    require_size(config, teacher.head.strides)
    detector = Detector(teacher, ULTRALYTICS + architecture, teacher.head.classes, partial(detect, head=teacher.head),
                        AnchorFreeDivergence(teacher.head), AnchorFreeDivergence(teacher.head, config.data.emphasis))
    _say(teacher, architecture)
    return coco_problem(config, seed, detector, root, device)


def _network(config: ProblemConfig, seed: int, lacking: list[str]) -> nn.Module | None:
    """The trained network, or None after noting in `lacking` that there is none."""
    name = config.weights
    if not name.endswith(".pt"):
        network = build_network(name, seed=seed)
        if config.teacher.checkpoint is None:
            log.warning("%s has random weights: its metrics mean nothing", name)
            return network
        return load_checkpoint(network, Path(config.teacher.checkpoint))
    if config.teacher.checkpoint is not None:
        raise ValueError(f"problem.teacher.checkpoint={config.teacher.checkpoint!r}: expected nothing beside "
                         f"problem.weights={name!r}; give the network's .yaml there")
    places = [Path(name).expanduser(), *(root / "ultralytics" / name for root in data_roots())]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        lacking.append(f"the weights: no {', no '.join(map(str, places))}; download {PUBLISHED} and name the file with "
                       "problem.weights=, or name a .yaml there to try the machinery with random weights")
        return None
    if not config.trust_checkpoint:
        raise ValueError(
            f"problem.weights={name!r} is a pickle, and opening one runs whatever code it holds. If you trust where "
            f"{path} is from: problem.trust_checkpoint=true. Else have its state dict saved as safetensors, and give "
            "it with problem.weights=NAME.yaml problem.teacher.checkpoint=FILE.safetensors")
    log.warning("%s is a pickle and is opened, since problem.trust_checkpoint=true: its code runs", path)
    return load_network(path)


def _say(teacher: nn.Module, architecture: str) -> None:
    parameters = sum(p.numel() for p in teacher.parameters())
    log.info("ultralytics' %s classes: %s parameters", architecture.replace(":", " for "), f"{parameters:,}")
    if architecture.startswith("yolov3"):
        log.warning("this is ultralytics' anchor-free form of YOLOv3 with %s parameters, not the YOLOv3 of Redmon and "
                    "Farhadi, which is problem=yolov3 with 61.9 M, or problem=yolov3_tiny with 8.8 M",
                    f"{parameters:,}")
