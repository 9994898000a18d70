"""The divergence's Gauss-Newton curvature from unlabelled inputs: its diagonal, and what Kronecker factors need of it.

Both come from gradients of the divergence's random score, which have the curvature as their covariance (Kunstner et
al., arXiv:1905.12558, on sampling).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from de_ray.evolution.gram import independent, layer_groups
from de_ray.problem.base import Problem
from de_ray.student import Student


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
    reach: float = 1.0
    """Share of a row's survivors, in (0, 1], that may be zeroed before saliencies are taken anew; matters to obs."""


def remembered(student: Student) -> list[Tensor]:
    """Weights, with zeroed ones at the value that they had."""
    return [torch.where(mask, weight.data, dormant) for weight, mask, dormant in
            zip(student.weights, student.masks, student.dormant, strict=True)]


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
            # The output may not depend on a layer, such as one that only training uses.
            gradients = torch.autograd.grad(score, weights, materialize_grads=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient.square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [total / len(given.inputs) for total in totals]


def output_grams(given: SaliencyInputs) -> list[Tensor]:
    """E[g g^T] of the score's gradients g at each layer's outputs, summed over positions: float64 [G, R / G, R / G].

    G groups of R rows as the layer's convolution has them, 1 for others. That of a layer which is never called is
    unknown: the unit matrix.
    """
    module, layers = given.student.module, given.student.layers
    called: list[list[Tensor]] = [[] for _ in layers]

    def collect(index: int):
        def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            called[index].append(output)
            return output.clone()  # an activation in place would otherwise make it its own result
        return hook

    totals: list[Tensor | None] = [None] * len(layers)
    hooks = [module.get_submodule(layer.name).register_forward_hook(collect(i)) for i, layer in enumerate(layers)]
    weights = given.student.weights
    groups = layer_groups(given.student)
    for weight in weights:
        weight.requires_grad_(True)  # so that outputs have gradients
    try:
        for batch in given.inputs.split(given.batch):
            score = given.problem.divergence.score(module(batch.to(weights[0].device)), given.generator)
            outputs = [output for of in called for output in of]
            if not outputs:  # weights may be used by others than their layers
                continue
            gradients = iter(torch.autograd.grad(score, outputs, materialize_grads=True))
            for index, (weight, of) in enumerate(zip(weights, called, strict=True)):
                for _ in of:
                    rows = _by_rows(next(gradients), weight, groups[index])  # [G, R / G, P]
                    gram = torch.bmm(rows, rows.transpose(1, 2)).double()
                    totals[index] = gram if totals[index] is None else totals[index] + gram
                of.clear()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return [total / len(given.inputs) if total is not None else
            independent(len(weight) // count, count, weight.device)
            for total, weight, count in zip(totals, weights, groups, strict=True)]


def _by_rows(gradient: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A layer's output [N, R, positions] or [..., R] as [G, R / G, samples times positions]."""
    gradient = gradient.detach()
    if weight.ndim == 2:
        return gradient.reshape(1, -1, weight.shape[0]).transpose(1, 2)
    return gradient.flatten(2).transpose(0, 1).reshape(groups, weight.shape[0] // groups, -1)
