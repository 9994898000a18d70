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
        theirs = problem.teacher.get_parameter(layer.parameter)
        rows = theirs.detach().to(weight.device).reshape(len(gram), -1, weight[0].numel())  # [G, R / G, D]
        alive = mask.reshape(rows.shape)
        if student.biases[index] is not None:  # the last column, which makes up for what no weight could
            bias = product_of(problem.teacher, layer).bias.detach().to(weight.device).reshape(*rows.shape[:2], 1)
            rows, alive = torch.cat([rows, bias], -1), torch.cat([alive, torch.ones_like(alive[..., :1])], -1)
        groups = zip(rows.double(), alive, damped(gram, damping), strict=True)
        found[index] = torch.stack([_pruned(*group) for group in groups])
    for index, settled in found.items():  # once all inputs have been seen as they were
        weight, bias = student.weights[index], student.biases[index]
        weight.data.copy_(settled[..., :weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.data.copy_(settled[..., -1].flatten())


def _pruned(rows: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Rows [R, D] with zeros where the mask is False."""
    alive = mask.T.contiguous()
    return settle_columns(rows, upper_factor(hessian), lambda column, values: torch.where(alive[column], values, 0.0))
