"""Regrowth: the zeroed weights that a student which is sparser than asked for gets back."""

import torch
from torch import Tensor

from de_ray.config import RefitConfig
from de_ray.evolution.space import Budget
from de_ray.problem.base import Problem
from de_ray.refit.objective import Objective
from de_ray.student import Student

BATCHES = 128
"""Batches of refit that gradients are averaged over: of one batch, they would be mostly noise."""


def regrow(student: Student, problem: Problem, config: RefitConfig, missing: Budget,
           generator: torch.Generator) -> None:
    """Let zeroed weights live again, at zero, for the refit to give them values.

    Those that come back have the greatest squared mean gradient over curvature, twice what a Newton step along each
    alone would take off refit's objective (RigL, arXiv:1911.11134, has the gradient's magnitude, which layers of
    unlike scales do not share). The curvature is the mean squared gradient of a batch.

    Args:
        student: changed in place.
        problem: inputs, teacher, objective, augmentation.
        config: `batch`, `precision` and `memory_mb` are used.
        missing: weights to bring back, in each bound layer and over all others.
        generator: draws batches and augmentation; on the CPU.
    """
    gains = _gains(student, Objective(problem, config, student.weights[0].device), generator)
    for mask, gain, bound, count in zip(student.masks, gains, missing.bound, missing.fixed, strict=True):
        if bound:
            _revive([mask], [gain], int(count))
    free = [layer for layer, bound in enumerate(missing.bound) if not bound]
    _revive([student.masks[layer] for layer in free], [gains[layer] for layer in free], missing.free_total)


def _gains(student: Student, objective: Objective, generator: torch.Generator) -> list[Tensor]:
    """What each weight promises, of its layer's shape."""
    sums, squares = ([torch.zeros_like(weight) for weight in student.weights] for _ in range(2))
    for weight in student.weights:
        weight.requires_grad_(True)
    try:
        for _ in range(BATCHES):
            objective.backward(student.module, generator)
            for total, square, weight in zip(sums, squares, student.weights, strict=True):
                if weight.grad is not None:
                    total += weight.grad
                    square.addcmul_(weight.grad, weight.grad)
                    weight.grad = None
    finally:
        for weight in student.weights:
            weight.requires_grad_(False)
            weight.grad = None
    # Weights that were hardly ever touched have next to no curvature: the layer's mean keeps them from being the first.
    return [total.square() / (square + square.mean()).clamp_min(torch.finfo(square.dtype).tiny)
            for total, square in zip(sums, squares, strict=True)]


def _revive(masks: list[Tensor], gains: list[Tensor], count: int) -> None:
    """Set the masks of the `count` zeroed weights of greatest gain."""
    if not count:
        return
    ranked = torch.cat([gain.masked_fill(mask, -1.0).flatten() for gain, mask in zip(gains, masks, strict=True)])
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[ranked.topk(count).indices] = True
    for mask, part in zip(masks, chosen.split([mask.numel() for mask in masks]), strict=True):
        mask |= part.view_as(mask)
