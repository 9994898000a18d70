"""The same compression from Python: no configuration files, no tracking, no Ray unless asked for."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.pipeline import Result, run
from de_ray.problem.custom import problem_from_model


def compress(model: nn.Module, calibration: Tensor | np.ndarray, *, sparsity: float = 0.9, bits: int | None = 4,
             divergence: str = "kl", held_out: Tensor | np.ndarray | None = None, include: str | Sequence[str] = ("*",),
             exclude: str | Sequence[str] = (), evolution: EvolutionConfig | None = None,
             refit: RefitConfig | None = None, quantization: QuantizationConfig | None = None,
             pool: PoolConfig | None = None, augment: str = "auto", target_bytes: int | None = None,
             target_ratio: float | None = None, seed: int = 0, threads: int = 1, device: str = "auto") -> Result:
    """Compress a trained network.

    Args:
        model: any module with Linear, Conv1d, Conv2d or Conv3d layers that returns a tensor, or a tuple, list or dict
            of tensors; it is not modified.
        calibration: [N, ...] unlabelled inputs.
        sparsity: share of the layers' weights that end as zeros, in [0, 1).
        bits: width of every layer, in 1..8; None sweeps a width for each layer.
        divergence: kl (class scores, of classes in dimension 1: [N, C] or [N, C, ...]), mse or cosine.
        held_out: [H, ...] inputs for the report alone. None: the last fifth of `calibration`, kept apart.
        include: a glob of layer names that may be zeroed, or several.
        exclude: the same of layers that stay dense.
        evolution, refit, quantization, pool: whole configuration groups; `sparsity` and `bits` go on top of the first
            and the third. The default pool is this process; `PoolConfig(kind="ray")` takes all its cores.
        augment: of calibration inputs, where they serve refit: cutmix (rectangles of each other), shift, none, or auto,
            which is cutmix for images [N, C, H, W] and none for others.
        target_bytes: size that the file may have; sparsity is then found, and `sparsity` is not used.
        target_ratio: the same as a ratio, 4 bytes x parameters / bytes of the file.
        seed: of every random draw.
        threads: CPU threads of refit.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The result: `save(path)`, `model`, `report`.

    Raises:
        ValueError: an argument is out of its range, a glob matches no layer, or inputs or weights do not fit.

    Example:
        result = de_ray.compress(model, calibration, sparsity=0.9, bits=4)
        result.save("student.der")
        state = de_ray.load("student.der")
    """
    problem = problem_from_model(model, calibration, divergence=divergence, held_out=held_out, include=include,
                                 exclude=exclude, seed=seed, augment=augment)
    evolution = _replaced(evolution or EvolutionConfig(), sparsity=sparsity)
    quantization = _replaced(quantization or QuantizationConfig(), bits=bits)
    config = Config(evolution=evolution, refit=refit or RefitConfig(), quantization=quantization,
                    pool=pool or PoolConfig(kind="serial"), target_bytes=target_bytes, target_ratio=target_ratio,
                    seed=seed, threads=threads, device=device)
    return run(problem, config)


def _replaced(config: object, **values: object) -> object:
    """A checked copy of a configuration group with other values."""
    return type(config)(**{**vars(config), **values})
