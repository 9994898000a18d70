"""The divergence's gradient and its Gauss-Newton curvature from unlabelled inputs: the diagonal, and what Kronecker
factors need of it.

Curvatures come from gradients of the divergence's random score, which have the curvature as their covariance (Kunstner
et al., arXiv:1905.12558, on sampling).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from de_ray.evolution.gram import layer_groups
from de_ray.memory import even_size, inputs_that_fit
from de_ray.problem.base import Output, Problem
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
    memory_mb: int = 4096
    """See `refit.memory_mb`."""
    reach: float = 1.0
    """Share of a row's survivors, in (0, 1], that may be zeroed before saliencies are taken anew; matters to obs."""

    @cached_property
    def fisher(self) -> list[Tensor]:
        """The curvature's diagonal, see `fisher_diagonal`; sampled once."""
        return fisher_diagonal(self)


def remembered(student: Student) -> Iterator[Tensor]:
    """Weights, with zeroed ones at the value that they had; one at a time, since each is a copy."""
    for weight, mask, dormant in zip(student.weights, student.masks, student.dormant, strict=True):
        yield torch.where(mask, weight.data, dormant)


def fisher_diagonal(given: SaliencyInputs) -> list[Tensor]:
    """Diagonal of the divergence's Gauss-Newton matrix at the student, per layer, of the weight's shape.

    The gradients of a divergence's random score have the curvature as their covariance and are independent across
    samples, so that the squared gradient of a batch's sum is an unbiased estimate of the sum over its samples.
    """
    return _mean(given, lambda _, output: given.problem.divergence.score(output, given.generator), torch.square)


def divergence_gradient(given: SaliencyInputs) -> list[Tensor]:
    """Gradient of the mean divergence from the teacher at the student, per layer, of the weight's shape."""
    problem = given.problem

    def divergence(inputs: Tensor, output: Output) -> Tensor:
        with torch.no_grad():
            expected = problem.teacher(inputs)
        return problem.divergence(expected, output).sum()

    return _mean(given, divergence, lambda gradient: gradient)


def _mean(given: SaliencyInputs, scalar: Callable[[Tensor, Output], Tensor],
          of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What each batch's gradients come to, summed over batches and divided by the number of inputs.

    Args:
        given: student and inputs.
        scalar: of (inputs, the student's outputs), a sum over samples: batches whose activations do not fit go in
            parts.
        of: of a batch's gradient with respect to a layer's weight.

    Returns:
        A tensor a layer, of the weight's shape.
    """
    weights = given.student.weights
    totals = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    most = None
    try:
        for batch in given.inputs.split(given.batch):
            batch = batch.to(weights[0].device)
            if most is None:
                drawn = given.generator.get_state()  # scores to come are drawn as if these had not been
                most = inputs_that_fit(lambda n, some=batch: scalar(some[:n], given.student.module(some[:n])),
                                       given.memory_mb)
                given.generator.set_state(drawn)
            gradients = None
            for inputs in batch.split(even_size(len(batch), most)):
                # The output may not depend on a layer, such as one that only training uses.
                part = torch.autograd.grad(scalar(inputs, given.student.module(inputs)), weights,
                                           materialize_grads=True)
                gradients = part if gradients is None else tuple(map(torch.add, gradients, part))
            for total, gradient in zip(totals, gradients, strict=True):
                total += of(gradient)
            del part, gradients, gradient  # as large as the weights: the next batch's need not find them there
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return [total.div_(len(given.inputs)) for total in totals]


def output_grams(given: SaliencyInputs) -> list[Tensor | None]:
    """E[g g^T] of the score's gradients g at each layer's outputs, summed over positions: float64 [G, R / G, R / G].

    G groups of R rows as the layer's convolution has them, 1 for others. None for layers without a module that is
    called; see `gram.layer_grams`.
    """
    module = given.student.module
    called: list[list[Tensor]] = [[] for _ in given.student.layers]

    def collect(index: int):
        def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            if output.requires_grad:  # nothing has one where a network runs a part of itself without
                called[index].append(output)
            return output.clone()  # an activation in place would otherwise make it its own result
        return hook

    totals: list[Tensor | None] = [None] * len(called)
    hooks = [product.register_forward_hook(collect(i)) for i, product in enumerate(given.student.products)
             if product is not None]
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
    return [None if total is None else total / len(given.inputs) for total in totals]


def _by_rows(gradient: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A layer's output [N, R, positions] or [..., R] as [G, R / G, samples times positions]."""
    gradient = gradient.detach()
    if weight.ndim == 2:
        return gradient.reshape(1, -1, weight.shape[0]).transpose(1, 2)
    return gradient.flatten(2).transpose(0, 1).reshape(groups, weight.shape[0] // groups, -1)
