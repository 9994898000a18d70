"""The second stage: a width for each layer, levels placed and refitted, biases rounded; the student ends quantized."""

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from de_ray import codec
from de_ray.backoff import TRIALS, allowed
from de_ray.cluster.storage import location
from de_ray.codec.tensor import QuantizedTensor
from de_ray.config import Config, QuantizationConfig
from de_ray.evaluation.pool import Pool
from de_ray.evolution.curvature import SaliencyInputs, fisher_diagonal
from de_ray.evolve import saliency_inputs
from de_ray.problem.base import Problem
from de_ray.problem.measure import Yardstick
from de_ray.quantization.biases import quantize_biases
from de_ray.quantization.dense import large_tensors, quantize_large
from de_ray.quantization.feedback import feed_back
from de_ray.quantization.goal import WithinBytes
from de_ray.quantization.limit import within
from de_ray.quantization.pareto import Trial
from de_ray.quantization.refit import refit_levels
from de_ray.quantization.sensitivity import choices_at, sensitivity, unmeasured
from de_ray.quantization.sweep import fixed, sweep, tolerated
from de_ray.quantization.table import SensitivityTable
from de_ray.rate import nominal, overhead, room_for_layers
from de_ray.refit.build import CUT
from de_ray.refit.objective import Objective
from de_ray.seeds import derive, torch_generator
from de_ray.student import Student

log = logging.getLogger(__name__)

RATE_STEPS = range(-8, 25)
"""Weights of the rate that are tried for a limit, as powers of the fourth root of two."""
BIAS_SHARE = 0.1
"""Of `quantization.tolerance`, what rounding biases may use up."""


@dataclass(frozen=True)
class Quantized:
    """A student in coded form."""

    tensors: list[QuantizedTensor]
    """Layers and other floating-point entries, in state-dict order."""
    raw: dict[str, Tensor]
    """Entries that are not floating point."""
    shared: dict[str, str]
    """Entries that are one of these by another name: tied weights."""
    bits: list[int]
    """Width by layer."""
    trials: list[Trial]
    """What the sweep measured."""
    chosen: Trial


@dataclass(frozen=True)
class Plan:
    """What is decided before levels are refitted; plans of the same widths and settings are equal."""

    settings: QuantizationConfig
    chosen: Trial
    table: SensitivityTable = field(compare=False)
    trials: list[Trial] = field(compare=False)

    @property
    def bytes(self) -> int:
        """See `limit.Plan`."""
        return self.chosen.bytes


def quantize(problem: Problem, config: Config, student: Student, pool: Pool, folder: Path | None,
             limit: int | None = None, unread: int = 0) -> Quantized:
    """Quantize a student in place.

    Args:
        problem: what is compressed.
        config: the whole configuration.
        student: evolved; ends with the very values that its file will decode to.
        pool: replicas of the student.
        folder: of the run, where Tune keeps its results; None: a temporary one.
        limit: bytes that the file may have; None: what `quantization.tolerance` makes of it.
        unread: see `rate.overhead`.
    """
    given = saliency_inputs(problem, config, student, -1)
    curvature = level_curvature(given)

    def plan(allowance: int | None) -> Plan:
        return _plan(problem, config, student, pool, folder, curvature, allowance)

    yardstick = Yardstick(problem, problem.calibration)
    if limit is None:
        return _refitted(problem, config, given, yardstick, plan(None), math.inf)
    pruned = student.state()  # values alone would leave out buffers, which are rounded too

    def replan(allowance: int) -> Plan:
        student.load_state(pruned)
        return plan(allowance)

    room, size = math.inf, 0  # of the file before

    def make(decided: Plan) -> tuple[int, tuple[Quantized, dict[str, Tensor]]]:
        nonlocal room, size
        # What layers give up since a file was too large is not for large tensors to take.
        most = room if size > limit else math.inf
        room = min(most, limit - overhead(problem, unread) - decided.bytes)
        found = _refitted(problem, config, given, yardstick, decided, room)
        size = len(codec.encode(found.tensors, found.raw, problem.architecture, found.shared))
        return size, (found, student.state())

    taken, (found, state) = within(limit, room_for_layers(problem, limit, unread), replan, make)
    student.load_state(state)
    if taken > limit:
        log.warning("the file has %d bytes, more than the %d that were asked for; take more evolution.cycles, which "
                    "aim better, or lower quantization.bits", taken, limit)
    return found


def level_curvature(given: SaliencyInputs) -> list[np.ndarray]:
    """What squared errors of each layer's weights are weighted by, of the weights' shapes: the divergence's diagonal
    curvature, by which survivors that calibration never excites still count a little."""
    with torch.enable_grad():
        diagonals = fisher_diagonal(given)
    return [(c + c[mask].mean() * 1e-2).cpu().numpy() if mask.any() else c.cpu().numpy() for c, mask in
            zip(diagonals, given.student.masks, strict=True)]


def _plan(problem: Problem, config: Config, student: Student, pool: Pool, folder: Path | None,
          curvature: list[np.ndarray], allowance: int | None) -> Plan:
    """Widths and levels as placed; the allowance is in bytes of the layers, before levels are refitted."""
    weights = [weight.detach().cpu().numpy() for weight in student.weights]
    names, settings = [layer.name for layer in problem.layers], config.quantization
    if allowance is not None:
        settings = fitted(weights, settings, curvature, allowance)
    if settings.bits is not None:
        table = unmeasured(weights, names, settings, curvature)
        chosen = fixed(table, pool, settings.bits)
        return Plan(settings, chosen, table, [chosen])
    table = sensitivity(weights, names, pool, settings, curvature)
    goal = tolerated(table, settings) if allowance is None else WithinBytes(allowance)
    evaluations = pool.evaluations
    with contextlib.ExitStack() as stack:
        records = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if config.cluster.storage is not None:
            records = location(config.cluster.storage, records)
        trials = sweep(table, pool, settings, goal, derive(config.seed, "sweep") % 2**32, records)
    # Trials in other processes evaluate through a client, which the pool does not see.
    pool.evaluations = evaluations + len(trials)
    return Plan(settings, goal.pick(trials), table, trials)


def _refitted(problem: Problem, config: Config, given: SaliencyInputs, yardstick: Yardstick, plan: Plan,
              room: float) -> Quantized:
    """Carry out a plan: the student is quantized, its levels are refitted and its biases rounded; `room` is what large
    dense tensors may take, in bytes."""
    student, widths = given.student, plan.chosen.widths
    choices = plan.table.candidate(widths)
    if coarse := [choice for choice in choices if choice.bits <= plan.settings.feedback_bits]:
        feed_back(student, coarse, given.inputs, given.batch)

    objective = Objective(problem, config.refit, student.weights[0].device)

    def refitted(steps: int, learning_rate: float, standing: Collection[str]) -> list[QuantizedTensor]:
        return refit_levels(objective, student, choices, steps, learning_rate, config.refit.relative,
                            torch_generator(config.seed, "levels"), standing)

    large = _quantize_large(problem, config, student, yardstick, partial(refitted, 0, 0.0, ()), room)
    layers = _levels(config, student, yardstick, partial(refitted, standing=large))
    student.rewind()
    others = _quantize_others(problem, config, student, yardstick, large)
    by_name = {tensor.name: tensor for tensor in [*layers, *large.values(), *others]}
    state, shared = student.module.state_dict(), student.shared()
    raw = state.keys() - by_name.keys() - shared.keys()
    student.rewind(raw)
    return Quantized([by_name[name] for name in state if name in by_name],
                     {name: value.cpu() for name, value in state.items() if name in raw},
                     shared, list(widths), plan.trials, plan.chosen)


def _quantize_large(problem: Problem, config: Config, student: Student, yardstick: Yardstick,
                    place: Callable[[], object], room: float) -> dict[str, QuantizedTensor]:
    """Round large tensors that stay dense, by name, and put the rounded values into the student.

    As many of the file's numbers as are theirs, so much of the tolerance is, beside layers as `place` quantizes them;
    afterwards the layers are what they were. They get no more bytes than `room`.
    """
    large = {name: student.others[name] for name in large_tensors(problem)}
    if not large:
        return {}
    before = student.values()
    place()

    def measure(values: dict[str, np.ndarray]) -> float:
        for name, value in values.items():
            large[name].data.copy_(torch.from_numpy(value))
        return yardstick(student.module)

    base, numbers = measure({}), sum(p.numel() for p in large.values())
    share = numbers / (numbers + student.survivors)
    limit = base + share * config.quantization.tolerance * max(base, config.quantization.negligible)
    found = quantize_large({name: before[name].numpy() for name in large}, measure, limit, room)
    student.set_values({**before, **{name: torch.from_numpy(one.dequantize()) for name, one in found.items()}})
    return found


def _levels(config: Config, student: Student, yardstick: Yardstick,
            refitted: Callable[[int, float], list[QuantizedTensor]]) -> list[QuantizedTensor]:
    """Quantize layers and refit their levels; with `refit.backoff` a refit that does harm is taken again more slowly,
    and in the end left out."""
    settings = config.quantization

    if not (config.refit.backoff and settings.refit_steps):
        return refitted(settings.refit_steps, settings.learning_rate)
    values = student.values()
    placed = refitted(0, settings.learning_rate)
    before, as_placed = yardstick(student.module), student.values()
    most = allowed(before, settings.negligible)
    for trial in range(TRIALS):
        student.set_values(values)
        try:
            layers = refitted(settings.refit_steps, settings.learning_rate / CUT**trial)
            after = yardstick(student.module)
        except FloatingPointError:
            after = math.inf
        if after <= most:
            return layers
        log.info("undid a refit of levels that raised the divergence from %.4g to %.4g", before, after)
    student.set_values(as_placed)
    return placed


def fitted(weights: Sequence[np.ndarray], config: QuantizationConfig, curvature: Sequence[np.ndarray],
           allowance: float) -> QuantizationConfig:
    """The configuration with the least weight of the rate at which layers of one width fit into an allowance.

    Args:
        weights, curvature: see `sensitivity`.
        config: where it leaves widths open, a nominal one is priced.
        allowance: bytes of all layers.
    """
    low, high = 0, len(RATE_STEPS) - 1  # bytes fall as the rate weighs more
    settings = [replace(config, rate_weight=(config.rate_weight or 1.0) * 2 ** (step / 4)) for step in RATE_STEPS]
    while low < high:
        middle = (low + high) // 2
        if choices_at(weights, nominal(settings[middle]), curvature)[1].sum() <= allowance:
            high = middle
        else:
            low = middle + 1
    return settings[low]


def _quantize_others(problem: Problem, config: Config, student: Student, yardstick: Yardstick,
                     done: Collection[str]) -> list[QuantizedTensor]:
    """Round biases and other floating-point entries that are not done, and put the rounded values into the student."""
    known = {*(layer.parameter for layer in problem.layers), *student.shared(), *done}
    live = {name: value for name, value in student.module.state_dict().items()
            if name not in known and value.is_floating_point()}

    def put(values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            live[name].copy_(torch.from_numpy(value))

    def measure(values: dict[str, np.ndarray]) -> float:
        put(values)
        return yardstick(student.module)

    exact = {name: value.detach().cpu().numpy().copy() for name, value in live.items()}
    base = measure(exact)
    allowed = BIAS_SHARE * config.quantization.tolerance * max(base, config.quantization.negligible)
    rounded = quantize_biases(exact, measure, base + allowed)
    put({name: tensor.dequantize() for name, tensor in rounded.items()})
    return list(rounded.values())
