"""Saliency criteria: what zeroing each parameter is estimated to cost; one array a layer, higher is more important.

uniform    random, all parameters alike: the bare method of Directed Evolution (Franca-Neto, arXiv:2206.05859).
magnitude  |w|.
wanda      |w| ||x||, activation-weighted magnitude (Sun et al., arXiv:2306.11695).
fisher     F w^2 / 2 with F the diagonal of the divergence's Gauss-Newton matrix, from unlabelled inputs
           (LeCun et al., "Optimal Brain Damage", 1989; Kunstner et al., arXiv:1905.12558 on sampling).
obs        w^2 / (2 [H^-1]_pp) with H = X X^T of the layer's inputs (Hassibi & Stork, "Optimal Brain Surgeon", 1992),
           relative to the layer's output energy, so that layers compare.

Zeroed parameters are judged by the value that they had when they were zeroed, so that they can compete to return.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from de_ray.evolution.gram import layer_grams
from de_ray.problem.base import Problem
from de_ray.student import Student

OBS_DAMPING = 1e-2
"""Ridge of the layer Hessian, as a share of its mean diagonal."""


@dataclass(frozen=True)
class SaliencyInputs:
    """What criteria are computed from."""

    student: Student
    problem: Problem
    inputs: Tensor
    """[M, ...] unlabelled inputs."""
    batch: int
    """Inputs a pass, >= 1."""
    generator: torch.Generator
    """Draws the scores of fisher and the order of uniform; on the CPU."""


def _remembered(student: Student) -> list[Tensor]:
    """Weights, with zeroed ones at the value that they had."""
    return [torch.where(mask, weight.data, dormant) for weight, mask, dormant in
            zip(student.weights, student.masks, student.dormant, strict=True)]


def _uniform(given: SaliencyInputs) -> list[Tensor]:
    # Distinct numbers, since equal ones would be drawn by position where the temperature is 0.
    return [torch.rand(weight.shape, generator=given.generator) for weight in given.student.weights]


def _magnitude(given: SaliencyInputs) -> list[Tensor]:
    return [weight.abs() for weight in _remembered(given.student)]


def _wanda(given: SaliencyInputs) -> list[Tensor]:
    grams = layer_grams(given.student, given.inputs, given.batch)
    scores = []
    for weight, gram in zip(_remembered(given.student), grams, strict=True):
        norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().float()  # [G, D], G groups
        rows = weight.reshape(len(norms), -1, norms.shape[-1])  # [G, R / G, D]
        scores.append((rows.abs() * norms.unsqueeze(1)).reshape(weight.shape))
    return scores


def fisher_diagonal(given: SaliencyInputs) -> list[Tensor]:
    """Diagonal of the divergence's Gauss-Newton matrix at the student, per layer, of the weight's shape.

    The gradients of a divergence's random score have the curvature as their covariance and are independent across
    samples, so that the squared gradient of a batch's sum is an unbiased estimate of the sum over its samples.
    """
    module, weights = given.student.module, given.student.weights
    totals = [torch.zeros_like(weight) for weight in weights]
    device = weights[0].device
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in given.inputs.split(given.batch):
            score = given.problem.divergence.score(module(batch.to(device)), given.generator)
            for total, gradient in zip(totals, torch.autograd.grad(score, weights), strict=True):
                total += gradient.square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [total / len(given.inputs) for total in totals]


def _fisher(given: SaliencyInputs) -> list[Tensor]:
    return [curvature * weight.square() / 2 for curvature, weight in
            zip(fisher_diagonal(given), _remembered(given.student), strict=True)]


def _obs(given: SaliencyInputs) -> list[Tensor]:
    grams = layer_grams(given.student, given.inputs, given.batch)
    scores = []
    for weight, gram in zip(_remembered(given.student), grams, strict=True):
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
        ridge = OBS_DAMPING * mean * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.inv(gram + ridge).diagonal(dim1=-2, dim2=-1)  # [G, D]
        rows = weight.reshape(len(gram), -1, gram.shape[-1]).double()  # [G, R / G, D]
        energy = torch.einsum("grd,gde,gre->", rows, gram, rows).clamp_min(1e-30)
        scores.append((rows.square() / (2 * inverse.unsqueeze(1)) / energy).float().reshape(weight.shape))
    return scores


_CRITERIA = {"uniform": _uniform, "magnitude": _magnitude, "wanda": _wanda, "fisher": _fisher, "obs": _obs}


def saliencies(criteria: Sequence[str], given: SaliencyInputs) -> dict[str, list[np.ndarray]]:
    """Saliencies by criterion.

    Args:
        criteria: names of criteria.
        given: the student and the inputs.

    Returns:
        criterion -> one float32 array [layer.size] a layer, in flat index order; >= 0 and finite.
    """
    with torch.no_grad():
        found = {}
        for criterion in criteria:
            with torch.set_grad_enabled(criterion == "fisher"):
                scores = _CRITERIA[criterion](given)
            found[criterion] = [score.detach().float().nan_to_num().flatten().cpu().numpy() for score in scores]
    return found
