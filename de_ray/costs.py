"""What the parts of a compression take on this machine, by some steps and passes."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from de_ray.config import Config
from de_ray.device import MOST_AT_A_TIME, available_threads, products, resolve_device, threads
from de_ray.evolve import settled
from de_ray.problem.base import Problem
from de_ray.problem.measure import mean_divergence
from de_ray.refit.build import CLOSED, build_refit
from de_ray.refit.distill import Distiller
from de_ray.student import Student

TIMED_BATCH = 32
"""Inputs of the larger steps that are timed, and of passes, at most."""
STEPS = 2
"""Of which one run of refit consists that is timed: it measures tensors before the first."""
TIMED_SECONDS = 1.0
"""For which a part is repeated, at least: a step alone takes now more, now less."""
TIMING_SHARE = 0.05
"""Of the minutes: for the larger steps, and for passes."""
WITHOUT_TEACHER = 0.75
"""Of a step's time, that of a saliency's pass."""
OTHER_PASSES = 14
"""Passes of all calibration inputs that no schedule changes: rounded biases are measured, and what is reported."""
REPORTED = 8
"""The same of held-out inputs."""
PLACEMENT, PLACEMENT_A_BIT = 0.15, 4e-7
"""Seconds for the levels of a layer at a width, and beside them of each bit of each weight, by a core of 2021."""
PLANS = 4
"""How often levels are placed and refitted, about, where the size of the file is given."""


@dataclass(frozen=True)
class Costs:
    """Seconds that parts of a compression take."""

    any_step: float
    """Of a step of refit, but for its inputs."""
    an_input: float
    """Of an input in a step."""
    candidate: float
    """Of a candidate on all calibration inputs, over the evaluators that work at a time."""
    other: float
    """Of what no schedule changes."""
    inputs: int
    """How many there are for saliencies, no seconds."""
    closed: float = 0.0
    """Of a refit in closed form; 0 where there is none."""

    def step(self, batch: float) -> float:
        """Of a step of refit."""
        return self.any_step + batch * self.an_input

    def search(self, config: Config) -> float:
        """Of all cycles, but for their steps of refit."""
        evolution = settled(config)
        gradients = sum(criterion not in ("uniform", "magnitude") for criterion in evolution.criteria)
        batches = min(self.inputs, evolution.saliency_inputs) / evolution.saliency_batch
        saliencies = gradients * batches * WITHOUT_TEACHER * self.step(evolution.saliency_batch)
        passes = 2.0  # of the student, before and after its refit
        if evolution.generations:
            bred = evolution.population + (evolution.generations - 1) * (evolution.population - evolution.elite)
            passes += bred * (1 - evolution.confirm) * min(1.0, evolution.screen + 0.5)
            passes += (evolution.elite + len(evolution.criteria)) * evolution.confirm
        return evolution.cycles * (saliencies + passes * self.candidate + self.closed)

    def total(self, config: Config) -> float:
        """Of the whole compression."""
        return self.other + self.search(config) + steps(config) * self.step(config.refit.batch / config.refit.workers)


def steps(config: Config) -> int:
    """Of refit, those of levels among them."""
    levels = _plans(config) * config.quantization.refit_steps
    if config.refit.method != "distill":
        return levels
    return config.evolution.cycles * config.refit.steps + config.refit.final_steps + levels


def _plans(config: Config) -> int:
    return 1 if config.target_bytes is None and config.target_ratio is None else PLANS


def measured(problem: Problem, config: Config) -> Costs:
    """Take some steps and passes.

    Args:
        problem: what will be compressed; it stays as it is.
        config: with its `threads`; its `minutes` say how large the steps are that are timed.
    """
    device = resolve_device(config.device)
    problem = replace(problem, teacher=copy.deepcopy(problem.teacher).to(device))  # it may count its passes
    with threads(config.threads or 1), products(config.refit.precision, device), torch.enable_grad():
        student = Student(problem.teacher, problem.layers, device)
        small = _step_seconds(problem, config, student, 1)
        most = (1 + STEPS) * TIMED_BATCH  # inputs for which there is time
        if config.minutes is not None:
            most = max(2, int(TIMING_SHARE * 60 * config.minutes / small))
        batch = min(TIMED_BATCH, config.refit.batch, max(2, most // (1 + STEPS)))
        large = _step_seconds(problem, config, student, batch)
        # An input alone may take as long as several.
        an_input = min(large / batch, max(0.0, large - small) / max(1, batch - 1))
        seconds = _pass_seconds(problem, student, problem.calibration[:min(TIMED_BATCH, config.pool.batch, most)])
        closed = _closed_seconds(problem, config, student)
    calibration, layers = seconds * len(problem.calibration), len(problem.layers)
    candidate = calibration / _evaluators(config, device)
    asked = config.quantization
    widths = [asked.bits] if asked.bits is not None else range(asked.min_bits, asked.max_bits + 1)
    placed = len(widths) * PLACEMENT * layers + sum(widths) * PLACEMENT_A_BIT * problem.weights
    placed /= min(MOST_AT_A_TIME, config.threads or 1)
    if asked.bits is None:
        # A width's harm is measured by candidates of one layer each, which leave out what comes before it.
        placed += len(widths) * layers / 2 * candidate
    reported = OTHER_PASSES * calibration + REPORTED * seconds * len(problem.held_out)
    return Costs(large - batch * an_input, an_input, candidate, _plans(config) * placed + reported, len(problem.inputs),
                 closed)


def _pass_seconds(problem: Problem, student: Student, inputs: Tensor) -> float:
    """Of an input on its way through one of two networks."""
    mean_divergence(problem, student.module, inputs[:1])
    return _seconds(lambda: mean_divergence(problem, student.module, inputs)) / 2 / len(inputs)


def _closed_seconds(problem: Problem, config: Config, student: Student) -> float:
    """Of a refit in closed form, of the student after half of its weights were zeroed; 0: there is none."""
    if config.refit.method not in CLOSED:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    for weight, mask in zip(student.weights, student.masks, strict=True):
        mask.copy_(torch.rand(mask.shape, generator=generator) < 0.5)
        weight.data.mul_(mask)
    refit = build_refit(student, problem, config.refit)
    started = time.perf_counter()
    refit.after_cycle(generator)
    if student.weights[0].device.type == "cuda":
        torch.cuda.synchronize()  # it may not be done yet
    return time.perf_counter() - started


def _seconds(run: Callable[[], object]) -> float:
    """Of a run, on average."""
    started, runs = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < TIMED_SECONDS or not runs:
        run()
        runs += 1
    return taken / runs


def _evaluators(config: Config, device: torch.device) -> float:
    """How many candidates are evaluated in the time of one with the threads of refit."""
    pool = config.pool
    if device.type != "cpu":
        return 1.0
    actors = 1 if pool.kind == "serial" else pool.actors or max(1, available_threads() // pool.threads)
    return actors * pool.threads / (config.threads or 1)


def _step_seconds(problem: Problem, config: Config, student: Student, batch: int) -> float:
    """Of a step of refit; steps of no size leave the student as it is."""
    distiller = Distiller(student, problem, replace(config.refit, batch=batch, workers=1))
    generator = torch.Generator().manual_seed(0)
    distiller.run(1, lambda _: 0.0, generator)
    return _seconds(lambda: distiller.run(STEPS, lambda _: 0.0, generator)) / STEPS
