"""The same compression from Python: no configuration files, no tracking, no Ray unless asked for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import nn

from de_ray.checks import require
from de_ray.config import Config, EvolutionConfig, PoolConfig, ProblemConfig, QuantizationConfig, RefitConfig
from de_ray.files import unwritable
from de_ray.minutes import with_minutes
from de_ray.pipeline import Result, run
from de_ray.problem.arrays import Given
from de_ray.problem.custom import glob_list, problem_from_model
from de_ray.problem.layout import take_any_layout
from de_ray.problem.packing import take_arguments
from de_ray.progress import Progress
from de_ray.workload import with_threads

DEFAULT_SPARSITY, DEFAULT_BITS = 0.9, 4

Group = TypeVar("Group", EvolutionConfig, QuantizationConfig)


def compress(model: nn.Module, calibration: Given, *, sparsity: float = DEFAULT_SPARSITY,
             bits: int | None = DEFAULT_BITS, divergence: str = "kl", held_out: Given | None = None,
             include: str | Sequence[str] = ("*",), exclude: str | Sequence[str] = (),
             evolution: EvolutionConfig | None = None, refit: RefitConfig | None = None,
             quantization: QuantizationConfig | None = None, pool: PoolConfig | None = None, augment: str = "auto",
             target_bytes: int | None = None, target_ratio: float | None = None, seed: int = 0,
             minutes: float | None = None, threads: int | None = None, device: str = "auto",
             folder: str | Path | None = None, progress: bool = True) -> Result:
    """Compress a trained network.

    Args:
        model: any module with linear, convolutional, attention or recurrent layers (`problem.layers.find_layers` says
            which) that returns a tensor, or a tuple, list or dict of tensors; it is not modified.
        calibration: [N, ...] unlabelled inputs, an array or tensor. Those of a network of several arguments are a tuple
            of arrays [N, ...], or a dict of them by name; boolean ones are masks and stay boolean there.
        sparsity: share of the layers' weights that end as zeros, in [0, 1). Layers that no pass in eval mode reads,
            such as heads for training, end as zeros beside that.
        bits: width of every layer, in 1..8; None sweeps a width for each layer, by as many `quantization.trials`.
        divergence: kl (class scores, of classes in dimension 1: [N, C] or [N, C, ...]), mse or cosine.
        held_out: [H, ...] inputs for the report alone. None: the last fifth of `calibration`, kept apart.
        include: a glob of layer names that may be zeroed, or several.
        exclude: the same of layers that stay dense, with a step as fine as biases have.
        evolution, refit, quantization, pool: whole configuration groups; a sparsity in the first and bits in the third
            take the place of the keywords' defaults. The default pool is this process, with `threads`;
            `PoolConfig(kind="ray")` has an actor on each core, which suits small networks.
        augment: of calibration inputs, where they serve refit: cutmix (rectangles of each other for images
            [N, C, H, W], spans of each other along the longest axis for others), shift, none, or auto, which is cutmix
            unless the model does not take such inputs.
        target_bytes: size that the file may have; sparsity is then found, and `sparsity` is not used.
        target_ratio: the same as a ratio, 4 bytes x parameters / bytes of the file.
        seed: of every random draw.
        minutes: that it may take, about. A schedule of cycles and steps that would take longer, by a few that are timed
            here, is cut; None: it takes what it takes.
        threads: CPU threads; other counts may round differently. None: all cores, or fewer for small networks.
        device: auto, cpu, cuda or cuda:N.
        folder: for checkpoints, made where it is missing; a compression of the same model and inputs with the same
            arguments that was interrupted there is continued, on CPUs to the same file. None: no checkpoints.
        progress: whether a terminal, or a notebook with ipywidgets, shows stages, cycles and the time left.

    Returns:
        The result: `save(path)`, `model`, `report`.

    Raises:
        ValueError: an argument is out of its range, a glob matches no layer, inputs or weights do not fit, or the
            folder holds another compression's checkpoints.
        MemoryError: a GPU has no room left.

    Example:
        result = de_ray.compress(model, calibration, sparsity=0.9, bits=4)
        result.save("student.der")
        state = de_ray.load("student.der")
    """
    _require_usual_modes()
    for key, group, kind in (("evolution", evolution, EvolutionConfig), ("refit", refit, RefitConfig),
                             ("quantization", quantization, QuantizationConfig), ("pool", pool, PoolConfig)):
        require(group is None or isinstance(group, kind), key, group, f"a de_ray.config.{kind.__name__}, or None")
    evolution = _with(evolution or EvolutionConfig(), "evolution", "sparsity", sparsity, DEFAULT_SPARSITY)
    quantization = _with(quantization or QuantizationConfig(), "quantization", "bits", bits, DEFAULT_BITS)
    config = Config(evolution=evolution, refit=refit or RefitConfig(), quantization=quantization,
                    pool=pool or PoolConfig(kind="serial"), target_bytes=target_bytes, target_ratio=target_ratio,
                    seed=seed, minutes=minutes, threads=threads, device=device)
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        require(unwritable(folder) is None, "folder", str(folder), "a folder that can be written")
    problem = problem_from_model(model, calibration, divergence=divergence, held_out=held_out, include=include,
                                 exclude=exclude, seed=int(seed), augment=augment)  # PyTorch takes no NumPy integers
    # What a folder's checkpoints are held to, beside the model and the inputs themselves.
    told = ProblemConfig("custom", model=problem.architecture, calibration="calibration", divergence=divergence,
                         include=glob_list("include", include), exclude=glob_list("exclude", exclude), augment=augment)
    config = with_threads(problem, replace(config, problem=told))
    if pool is None:
        config = replace(config, pool=replace(config.pool, threads=config.threads))
    config = with_minutes(problem, config, folder)
    with Progress(None if progress else Console(force_terminal=False, force_jupyter=False)) as shown:
        result = run(problem, config, folder, lambda record, total: shown.update(record.cycle, total, str(record)),
                     shown.stage)
    for module in (result.student, result.model):
        take_any_layout(take_arguments(module))
    return result


def _require_usual_modes() -> None:
    """Raise `ValueError` in what PyTorch's modes would make fail later, in other words."""
    require(not torch.is_inference_mode_enabled(), "torch.inference_mode", True,
            "False: refit needs gradients; call compress outside of it")
    require(torch.get_default_dtype() == torch.float32, "torch.get_default_dtype()", torch.get_default_dtype(),
            "torch.float32, in which networks are compressed; call torch.set_default_dtype(torch.float32) before")
    require(torch.get_default_device().type == "cpu", "torch.get_default_device()", str(torch.get_default_device()),
            "cpu, where random numbers are drawn; compress(..., device=...) says where networks compute")


def _with(config: Group, group: str, name: str, value: object, default: object) -> Group:
    """A configuration group with the value of a keyword, unless it says itself what the keyword leaves at its default.

    Raises:
        ValueError: both say something, and not the same.
    """
    own = getattr(config, name)
    if own in (value, getattr(type(config)(), name)):
        return replace(config, **{name: value})
    require(value == default, name, value, f"nothing beside {group}, whose {name} is {own!r}")
    return config
