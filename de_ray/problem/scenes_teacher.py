"""A segmenter learns scenes, with labels; what comes after has none.

Finding objects takes it a few hundred steps, telling shirts from coats many thousands. Therefore its backbone learns
the items one by one first, which costs a tenth for each of them.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from de_ray.config import TeacherConfig
from de_ray.device import precision, threads
from de_ray.problem.scenes import Scenes, single_items
from de_ray.problem.teacher import THREADS, initialise
from de_ray.problem.ultralytics import training_loss

log = logging.getLogger(__name__)

RECIPE = 2
"""Version of everything below that determines a teacher's weights; raised whenever they would change."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises: a loss that assigns objects to cells is wild at first."""
MASK_STEP = 2
"""Pixels of a scene a pixel of the masks that are learned."""
CLASS_GAIN = 3.0
"""Weight of the classes' part of the loss, six times what ultralytics has for photographs."""
TAPS = (4, 6, 9)
"""The backbone's last layers at each stride, which heads build on; nothing after the last belongs to the backbone."""
ITEM_SIZE = 48
"""Pixels of the side of an item's image."""
ITEM_BATCH = 128
ITEM_EPOCHS = 4
"""Passes over all items."""
LONGEST_STEP = 10.0
"""Of the gradient's norm."""


def train_segmenter(network: nn.Module, draw: Callable[[int], Scenes], config: TeacherConfig) -> nn.Module:
    """Train a network of ultralytics in place: Adam with decoupled weight decay, a warm-up, then a cosine to zero.

    Scenes are mirrored at random. The same arguments give the same weights.

    Args:
        network: on the CPU, as `ultralytics.build_network` returned it.
        draw: epoch, from 0 -> scenes to learn, as many each time.
        config: epochs, batch, learning rate, weight decay and seed.

    Returns:
        `network` in eval mode.
    """
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
                                  fused=True)
    scenes = draw(0)
    steps = config.epochs * math.ceil(len(scenes) / config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    started = time.perf_counter()
    network.train().to(memory_format=torch.channels_last)
    with threads(THREADS):
        for epoch in range(config.epochs):
            scenes = scenes if epoch == 0 else draw(epoch)
            total = 0.0
            for rows in torch.randperm(len(scenes), generator=generator).split(config.batch):
                mirrored = torch.rand(len(rows), generator=generator) < 0.5
                images, labels = _batch(scenes, rows, mirrored)
                loss = training_loss(network, images, labels, cls=CLASS_GAIN)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), LONGEST_STEP * len(rows))
                optimizer.step()
                schedule.step()
                total += loss.item()
            log.info("teacher: epoch %d of %d, training loss %.4f, %.0f s", epoch + 1, config.epochs,
                     total / len(scenes), time.perf_counter() - started)
    network.criterion = None  # the package keeps it with the network
    return network.eval().to(memory_format=torch.contiguous_format)


def learn_items(network: nn.Module, items: Tensor, labels: Tensor, config: TeacherConfig) -> float:
    """Train the backbone of a network in place to tell items apart, by linear readouts at each stride.

    Args:
        network: as `ultralytics.build_network` returned it.
        items: [I, 1, 28, 28] as `load_mnist("FashionMNIST")` returns them.
        labels: int64 [I].
        config: learning rate, weight decay and seed.

    Returns:
        Accuracy of the last readout over the last epoch's batches, as they were learned, in [0, 1].
    """
    generator = torch.Generator().manual_seed(config.seed)
    backbone = network.model[:TAPS[-1] + 1].train().to(memory_format=torch.channels_last)
    with torch.no_grad():
        sizes = [feature.shape[1] for feature in _tapped(backbone, torch.zeros(2, 3, ITEM_SIZE, ITEM_SIZE))]
    readouts = nn.ModuleList(nn.Linear(size, int(labels.max()) + 1) for size in sizes)
    initialise(readouts, generator)
    parameters = [*backbone.parameters(), *readouts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    steps = ITEM_EPOCHS * math.ceil(len(items) / ITEM_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    started = time.perf_counter()
    with threads(THREADS):
        for epoch in range(1, ITEM_EPOCHS + 1):
            right = 0
            for rows in torch.randperm(len(items), generator=generator).split(ITEM_BATCH):
                images = single_items(items[rows], ITEM_SIZE, generator).contiguous(memory_format=torch.channels_last)
                with precision("bfloat16", images.device):
                    features = _tapped(backbone, images)
                logits = [readout(feature.float().mean((2, 3)))
                          for readout, feature in zip(readouts, features, strict=True)]
                loss = sum(cross_entropy(each, labels[rows]) for each in logits)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                right += int((logits[-1].argmax(1) == labels[rows]).sum())
            log.info("teacher: items, epoch %d of %d, accuracy %.3f, %.0f s", epoch, ITEM_EPOCHS, right / len(items),
                     time.perf_counter() - started)
    return right / len(items)


def _tapped(backbone: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Outputs of the layers that `TAPS` names."""
    found = []
    for index, layer in enumerate(backbone):
        images = layer(images)
        if index in TAPS:
            found.append(images)
    return found


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up in a line, down along a cosine."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _batch(scenes: Scenes, rows: Tensor, mirrored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Images [N, 3, S, S] and labels of some scenes, as `training_loss` takes them.

    Args:
        scenes: all.
        rows: int64 [N].
        mirrored: bool [N].
    """
    size = scenes.images.shape[-1]
    images = scenes.images[rows].float() / 255
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    masks = scenes.instances[rows]
    masks = torch.where(mirrored[:, None, None], masks.flip(2), masks)
    objects = [(scenes.rows == row).nonzero()[:, 0] for row in rows]
    place = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(each) for each in objects]))
    index = torch.cat(objects)
    left, top, right, bottom = (scenes.boxes[index] / size).unbind(1)
    centre = torch.where(mirrored[place], 1 - (left + right) / 2, (left + right) / 2)
    boxes = torch.stack([centre, (top + bottom) / 2, right - left, bottom - top], 1)
    return images.contiguous(memory_format=torch.channels_last), {
        "batch_idx": place.float(), "cls": scenes.classes[index].float()[:, None], "bboxes": boxes,
        "masks": masks[:, ::MASK_STEP, ::MASK_STEP].float()}
