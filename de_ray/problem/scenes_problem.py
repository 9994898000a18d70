"""Scenes of Fashion-MNIST items and a small segmenter that learns them as a problem: nothing to download."""

from functools import partial

import torch
from torch import nn

from de_ray.config import ProblemConfig
from de_ray.problem.anchor_free import detect
from de_ray.problem.anchor_free_divergence import AnchorFreeDivergence
from de_ray.problem.annotations import Annotations
from de_ray.problem.base import Problem
from de_ray.problem.coco_problem import require_size
from de_ray.problem.datasets import load_mnist
from de_ray.problem.detection import Letterbox
from de_ray.problem.detection_augment import Mosaics, augment_detection
from de_ray.problem.detection_metrics import DetectionMetrics
from de_ray.problem.detection_pictures import DetectionPictures
from de_ray.problem.divergence import make_divergence
from de_ray.problem.layers import find_layers
from de_ray.problem.sampling import draw_inputs
from de_ray.problem.scenes import CLASSES, Scenes, compose_scenes
from de_ray.problem.scenes_teacher import RECIPE, learn_items, train_segmenter
from de_ray.problem.teacher import obtain
from de_ray.problem.ultralytics import build_network, raw_heads, read_yaml

FAMILY = "yolov8n-seg.yaml"
"""The architecture, of which `WIDTH` is made."""
WIDTH = 0.125
"""Of its channels, half of what the n in the name stands for: 1.0 M parameters, which learn in minutes on one core."""
HELD_OUT = 16
"""Training scenes for one that is held out."""


def build_scenes(config: ProblemConfig, seed: int) -> Problem:
    """The problem of `problem=fashion_scenes`: inputs are bytes [M, 3, S, S], outputs raw heads with masks.

    Held-out scenes are composed of Fashion-MNIST's test images. Labels train the teacher, on new scenes each epoch, and
    serve metrics; scenes are the same for every run.

    Args:
        config: what to compress.
        seed: of the draw of inputs.

    Raises:
        FileNotFoundError: Fashion-MNIST or a checkpoint that cannot be found.
        ValueError: naming the key at fault.
    """
    untrained = raw_heads(build_segmenter())
    require_size(config, untrained.head.strides)
    find_layers(untrained, config.include, config.exclude)  # a mistyped pattern need not wait for training
    size, count = config.data.size, config.data.scenes
    items = load_mnist("FashionMNIST")

    def draw(epoch: int) -> Scenes:
        return compose_scenes(items.train, items.train_labels, count, size, epoch)

    train = draw(0)
    held_out = compose_scenes(items.test, items.test_labels, count // HELD_OUT, size, 0)
    augment = None
    if config.augment == "detection":
        augment = partial(augment_detection, share=config.augment_share, mosaics=Mosaics(config.data.mosaic))
    inputs, calibration = draw_inputs(train.images, min(config.calibration_size, count), config.inputs_size, seed,
                                      augment)
    # Every label is in the cache's key.
    labels = torch.cat([train.instances.flatten(), train.classes.to(torch.uint8)])

    def fit(model: nn.Module, *_: object) -> None:
        learn_items(model, items.train, items.train_labels, config.teacher)
        train_segmenter(model, draw, config.teacher)

    name = f"{config.name}-{RECIPE}-{WIDTH}"
    teacher = raw_heads(obtain(build_segmenter(), name, train.images, labels, config.teacher, fit))
    letterboxes = [Letterbox(size, size, size)] * len(held_out)
    annotations = Annotations(held_out.coco(), ())
    metrics = DetectionMetrics(teacher, partial(detect, head=teacher.head), held_out.images, letterboxes, annotations)
    of_detection = config.divergence == "detection"
    return Problem(
        name=config.name, architecture=config.name, teacher=teacher,
        layers=find_layers(teacher, config.include, config.exclude), inputs=inputs, calibration=calibration,
        held_out=held_out.images,
        divergence=AnchorFreeDivergence(teacher.head) if of_detection else make_divergence(config.divergence),
        metrics=metrics, augment=augment,
        objective=AnchorFreeDivergence(teacher.head, config.data.emphasis) if of_detection else None,
        pictures=DetectionPictures(metrics, held_out.images, letterboxes, annotations.class_names))


def build_segmenter() -> nn.Module:
    """The network, untrained, in ultralytics' own form."""
    description = read_yaml(FAMILY)
    depth, _, channels = description["scales"]["n"]
    return build_network({**description, "scales": {"n": [depth, WIDTH, channels]}}, len(CLASSES))
