"""How many CPU threads a network's refit is worth."""

import copy
import math
from dataclasses import replace

import torch

from de_ray.config import Config
from de_ray.device import available_threads
from de_ray.memory import bytes_an_input
from de_ray.problem.base import Problem

MB_A_THREAD = 4
"""Of parameters, and of activations of a batch, for each thread: with less they wait for each other longer than they
compute. Two threads take 0.95 of the time of one for LeNet-300-100, which has 1.2 MB, 0.70 for three times its layers
and 8 MB, 0.66 for LeNet-5 (14 MB) and 0.52 for ResNet-18 (docs/EXPERIMENTS.md)."""


def with_threads(problem: Problem, config: Config) -> Config:
    """The configuration with a number of threads, where that was left open.

    One where several workers have the cores between them, and for small networks; else as many as there are cores, at
    `MB_A_THREAD` at least for each of them. Of a sweep's trials `sweep.trial` decides.
    """
    if config.threads is not None or config.sweep is not None:
        return config
    most = 1 if config.refit.workers > 1 else available_threads()
    if most > 1:  # else there is nothing to weigh
        most = min(most, max(1, math.ceil(_megabytes(problem, config.refit.batch) / MB_A_THREAD)))
    return replace(config, threads=most)


def _megabytes(problem: Problem, batch: int) -> float:
    """What a step of refit reads and keeps; 0 for a network without gradients, which the run itself refuses."""
    network = copy.deepcopy(problem.teacher)  # it may count its passes
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            kept = bytes_an_input(lambda count: network(problem.calibration[:count].to(parameters[0].device)))
    except RuntimeError:
        return 0.0
    read = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return (batch * kept + read) / 2**20
