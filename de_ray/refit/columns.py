"""Refit by Optimal Brain Surgeon's columns: the teacher's rows, pruned by the student's masks, make up for what went.

Least squares solves each row's survivors exactly, in a third of their number cubed; this takes half the square of a
row's length whatever survives, for layers whose rows have thousands of weights.
"""

import torch
from torch import Tensor

from de_ray.evolution.gram import grams_in_parts
from de_ray.evolution.obs import damped, settle_columns, upper_factor
from de_ray.problem.base import Problem
from de_ray.problem.layers import product_of
from de_ray.student import Student


def refit_columns(problem: Problem, student: Student, inputs: Tensor, damping: float, batch: int) -> None:
    """Replace every layer's survivors and biases in place, by the inputs that the student's layers have now.

    Args:
        problem: gives the teacher's weights.
        student: masks are held.
        inputs: [M, ...] unlabelled inputs.
        damping: ridge, as a share of the Gram matrix's mean diagonal, > 0.
        batch: inputs a pass.
    """
    found = {}
    for index, gram in grams_in_parts(student, inputs, batch, biases=True):
        layer, weight, mask = student.layers[index], student.weights[index], student.masks[index]
        theirs = problem.teacher.get_parameter(layer.parameter).detach().to(weight.device)
        bias = None if student.biases[index] is None else product_of(problem.teacher, layer).bias.detach()
        if gram is None:  # nothing makes up for anything
            found[index] = theirs * mask, bias
            continue
        rows = theirs.reshape(len(gram), -1, weight[0].numel())  # [G, R / G, D]
        alive = mask.reshape(rows.shape)
        if bias is not None:  # the last column to be settled, which makes up for what no weight could
            rows = torch.cat([rows, bias.to(weight.device).reshape(*rows.shape[:2], 1)], -1)
            alive = torch.cat([alive, torch.ones_like(alive[..., :1])], -1)
        groups = zip(rows.double(), alive, damped(gram, damping), strict=True)
        settled = torch.stack([_pruned(*group) for group in groups])
        found[index] = settled[..., :weight[0].numel()].reshape(weight.shape), settled[..., -1].flatten()
    for index, (weight, bias) in found.items():  # once all inputs have been seen as they were
        student.weights[index].data.copy_(weight)
        if student.biases[index] is not None:
            student.biases[index].data.copy_(bias)


def _pruned(rows: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Rows [R, D] with zeros where the mask is False."""
    alive = mask.T.contiguous()
    return settle_columns(rows, upper_factor(hessian), lambda column, values: torch.where(alive[column], values, 0.0))
