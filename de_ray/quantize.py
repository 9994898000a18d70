"""The second stage: a width for each layer, levels placed and refitted, biases rounded; the student ends quantized."""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from de_ray.cluster.storage import location
from de_ray.codec.tensor import QuantizedTensor
from de_ray.config import Config
from de_ray.evaluation.pool import Pool
from de_ray.evolution.saliency import fisher_diagonal
from de_ray.evolve import saliency_inputs
from de_ray.problem.base import Problem
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.biases import quantize_biases
from de_ray.quantization.pareto import Trial, pick
from de_ray.quantization.refit import refit_levels
from de_ray.quantization.sensitivity import sensitivity
from de_ray.quantization.sweep import divergence_limit, fixed, sweep
from de_ray.refit.objective import Objective
from de_ray.seeds import derive, torch_generator
from de_ray.student import Student

BIAS_SHARE = 0.1
"""Of `quantization.tolerance`, what rounding biases may use up."""


@dataclass(frozen=True)
class Quantized:
    """A student in coded form."""

    tensors: list[QuantizedTensor]
    """Layers and other floating-point entries, in state-dict order."""
    raw: dict[str, Tensor]
    """Entries that are not floating point."""
    bits: list[int]
    """Width by layer."""
    trials: list[Trial]
    """What the sweep measured."""
    chosen: Trial


def quantize(problem: Problem, config: Config, student: Student, pool: Pool, folder: Path | None) -> Quantized:
    """Quantize a student in place.

    Args:
        problem: what is compressed.
        config: the whole configuration.
        student: evolved; ends with the very values that its file will decode to.
        pool: replicas of the student.
        folder: of the run, where Tune keeps its results; None: a temporary one.
    """
    curvature = [(c + c[mask].mean() * 1e-2).cpu().numpy() if mask.any() else c.cpu().numpy() for c, mask in
                 zip(_curvature(problem, config, student), student.masks, strict=True)]
    weights = [weight.detach().cpu().numpy() for weight in student.weights]
    table = sensitivity(weights, [layer.name for layer in problem.layers], pool, config.quantization, curvature)
    if config.quantization.bits is not None:
        chosen = fixed(table, pool, config.quantization.bits)
        trials = [chosen]
    else:
        evaluations = pool.evaluations
        with contextlib.ExitStack() as stack:
            records = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if config.cluster.storage is not None:
                records = location(config.cluster.storage, records)
            trials = sweep(table, pool, config.quantization, derive(config.seed, "sweep") % 2**32, records)
        # Trials in other processes evaluate through a client, which the pool does not see.
        pool.evaluations = evaluations + len(trials)
        chosen = pick(trials, divergence_limit(table, config.quantization))
    layers = refit_levels(Objective(problem, config.refit, student.weights[0].device), student,
                          table.candidate(chosen.widths), config.quantization.refit_steps,
                          config.quantization.learning_rate, config.refit.relative,
                          torch_generator(config.seed, "levels"))
    others = _quantize_others(problem, config, student)
    by_name = {tensor.name: tensor for tensor in [*layers, *others]}
    state = student.module.state_dict()
    return Quantized([by_name[name] for name in state if name in by_name],
                     {name: value.cpu() for name, value in state.items() if name not in by_name},
                     list(chosen.widths), trials, chosen)


def _curvature(problem: Problem, config: Config, student: Student) -> list[Tensor]:
    with torch.enable_grad():
        return fisher_diagonal(saliency_inputs(problem, config, student, -1))


def _quantize_others(problem: Problem, config: Config, student: Student) -> list[QuantizedTensor]:
    """Round biases and other floating-point entries, and put the rounded values into the student."""
    layers = {layer.parameter for layer in problem.layers}
    live = {name: value for name, value in student.module.state_dict().items()
            if name not in layers and value.is_floating_point()}

    def put(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            live[name].copy_(torch.from_numpy(value))

    def measure(values: dict[str, np.ndarray]) -> float:
        put(values)
        return mean_divergence(problem, student.module, problem.calibration)

    exact = {name: value.detach().cpu().numpy().copy() for name, value in live.items()}
    base = measure(exact)
    allowed = BIAS_SHARE * config.quantization.tolerance * max(base, config.quantization.negligible)
    rounded = quantize_biases(exact, measure, base + allowed)
    put({name: tensor.dequantize() for name, tensor in rounded.items()})
    return list(rounded.values())
