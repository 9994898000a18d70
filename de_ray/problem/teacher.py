"""The trained network: from a file, from the cache, or trained once with labels."""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from de_ray.config import TeacherConfig
from de_ray.device import threads
from de_ray.files import unwritable, write_atomically
from de_ray.problem.cache import cache_folder

log = logging.getLogger(__name__)

RECIPE = 1
"""Version of everything below that determines a teacher's weights; raised whenever they would change."""
THREADS = 1
"""CPU threads of training. Fixed, since other counts round differently and the cache would depend on them; one, since
steps this small gain next to nothing from a second thread and stall where another process has its core."""


def obtain(model: nn.Module, name: str, inputs: Tensor, labels: Tensor, config: TeacherConfig,
           fit: Callable[[nn.Module, Tensor, Tensor, TeacherConfig], object] | None = None) -> nn.Module:
    """Give `model` its trained weights, in place, and return it in eval mode.

    Args:
        model: an architecture, on the CPU.
        name: the problem's, part of the cache's key.
        inputs: [M, ...] training inputs.
        labels: int64 [M], or whatever `fit` learns from.
        config: where the weights come from; `config.checkpoint` overrides training.
        fit: trains `model` in place. None: `train`.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that is missing or does not fit.
        ValueError: for a cache that cannot be written, before anything is trained.
    """
    if config.checkpoint is not None:
        return load_checkpoint(model, Path(config.checkpoint))
    path = cached_path(name, inputs, labels, config)
    if path.exists():
        try:
            load_checkpoint(model, path)
        except ValueError as error:
            log.warning("the cached teacher of %s is damaged and trained anew: %s", name, error)
        else:
            log.info("teacher of %s: from %s", name, path)
            return model
    _require_cache(path.parent)
    (fit or train)(model, inputs, labels, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(model.state_dict()))
    log.info("teacher of %s: kept as %s", name, path)
    return model.eval()


def _require_cache(folder: Path) -> None:
    """Raise `ValueError` where a trained teacher could not be kept, and its training would be lost."""
    reason = unwritable(folder)
    if reason is not None:
        raise ValueError(f"DE_RAY_CACHE={str(cache_folder())!r}: a trained teacher cannot be kept there: {reason}; "
                         "expected a folder that can be made and written to, by DE_RAY_CACHE=FOLDER in the environment")


def cached_path(name: str, inputs: Tensor, labels: Tensor, config: TeacherConfig) -> Path:
    """The cached teacher's file; its name is a hash of everything that determines the weights, data included."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key != "checkpoint"}
    digest = hashlib.sha256(json.dumps([RECIPE, name, fields], sort_keys=True).encode())
    for tensor in (inputs, labels):
        digest.update(tensor.contiguous().numpy())
    return cache_folder() / "teachers" / f"{name}-{digest.hexdigest()[:16]}.safetensors"


def load_checkpoint(model: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file or a `weights_only` state dict into `model`; returns it in eval mode.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is neither, keys or shapes that do not fit, or weights that are not finite.
    """
    key = f"problem.teacher.checkpoint={str(path)!r}"
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, MemoryError):  # of the machine, not of the file
        raise
    except Exception as error:  # torch takes any bytes for a pickle, and fails where the first wrong one leads it
        raise ValueError(f"{key}: neither a safetensors file (by its suffix .safetensors) nor a state dict that "
                         f"torch.load(weights_only=True) opens: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{key}: expected a state dict of tensors by name; save it as model.state_dict()")
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{key}: does not fit the architecture: missing {missing}, unexpected {unexpected}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{key}: {name} has shape {list(value.shape)}, expected {list(expected[name].shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{key}: {name} holds NaN or infinite values")
    if not hasattr(state, "_metadata"):  # safetensors hold no versions of modules, which some of them ask for
        expected.update(state)
        state = expected
    model.load_state_dict(state)
    return model.eval()


def train(model: nn.Module, inputs: Tensor, labels: Tensor, config: TeacherConfig) -> nn.Module:
    """Train `model` from scratch, in place: Adam with decoupled weight decay, learning rate along a cosine to zero.

    The data stay one tensor and each step indexes a permutation of it. The same arguments give the same weights.

    Args:
        model: on the CPU; its weights are drawn anew from `config.seed`.
        inputs: [M, ...].
        labels: int64 [M].
        config: epochs, batch, learning rate, weight decay and seed.

    Returns:
        `model` in eval mode.
    """
    generator = torch.Generator().manual_seed(config.seed)
    initialise(model, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
                                  fused=True)
    steps = config.epochs * math.ceil(len(inputs) / config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    # Convolutions of this size train almost twice as fast with channels last.
    model.train().to(memory_format=torch.channels_last)
    with threads(THREADS):
        for epoch in range(1, config.epochs + 1):
            total = 0.0
            for rows in torch.randperm(len(inputs), generator=generator).split(config.batch):
                loss = cross_entropy(model(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            log.info("teacher: epoch %d of %d, training loss %.4f, %.0f s", epoch, config.epochs,
                     total / len(inputs), time.perf_counter() - started)
    return model.eval().to(memory_format=torch.contiguous_format)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights and biases as torch's layers do, U(-1/sqrt(D), 1/sqrt(D)) for D inputs, but from `generator`."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
