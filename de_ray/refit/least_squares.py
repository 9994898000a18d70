"""Closed-form refit: each row's survivors by ridge least squares against the teacher's pre-activations.

For a row with survivors S, inputs x of the student's layer and outputs y of the teacher's, it minimises
mean (y - w_S x_S)^2 + ridge |w_S - w_S_now|^2. Layers go front to back, so that each sees its refitted predecessors.
"""

import torch
from torch import Tensor, nn

from de_ray.evolution.gram import layer_input, layer_rows, with_constant
from de_ray.problem.base import Problem
from de_ray.problem.layers import product_of
from de_ray.student import Student


def _collect(problem: Problem, student: Student, layer: nn.Module, teacher_layer: nn.Module, inputs: Tensor,
             batch: int) -> tuple[Tensor, Tensor] | None:
    """Gram matrix of a student layer's inputs and its products with the outputs of the teacher's.

    Returns:
        float64 [G, D, D] and [G, D, R / G], means over samples and positions; D counts a constant input for the
        bias where the layer has one. None for a layer that is never called, or by one of the two alone.
    """
    seen: dict[str, Tensor] = {}  # clones: later operations of the network may work in place
    device = layer.weight.device
    hooks = [layer.register_forward_pre_hook(
                 lambda _, args, kwargs: seen.__setitem__("x", layer_input(args, kwargs).clone()), with_kwargs=True),
             teacher_layer.register_forward_hook(lambda _, __, out: seen.__setitem__("y", out.clone()))]
    gram, cross, count = 0.0, 0.0, 0
    try:
        for part in inputs.split(batch):
            seen.clear()
            student.module(part.to(device))
            problem.teacher(part.to(device))
            # A network may call a layer for some inputs alone, and the teacher for others than the student.
            if len(seen) < 2 or not seen["x"].numel() or seen["x"].shape[:1] != seen["y"].shape[:1]:
                continue
            x = layer_rows(layer, seen["x"]).double()  # [G, P, D]
            if layer.bias is not None:
                x = with_constant(x)
            y = seen["y"].double()
            if not isinstance(layer, nn.Linear):
                y = y.flatten(2).transpose(1, 2)  # [N, positions, R]
            y = y.reshape(x.shape[1], len(x), -1).transpose(0, 1)  # [G, P, R / G]
            gram = gram + torch.bmm(x.transpose(1, 2), x)
            cross = cross + torch.bmm(x.transpose(1, 2), y)
            count += x.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    return (gram / count, cross / count) if count else None


def refit_rows(problem: Problem, student: Student, inputs: Tensor, damping: float, batch: int) -> None:
    """Refit survivors and biases in place, of every layer whose inputs are seen.

    Args:
        problem: gives the teacher, which must be on the student's device.
        student: masks are held.
        inputs: [M, ...] unlabelled inputs.
        damping: ridge, as a share of the Gram matrix's mean diagonal, > 0.
        batch: inputs a pass.
    """
    with torch.no_grad():
        for layer, product, weight, mask, bias in zip(student.layers, student.products, student.weights, student.masks,
                                                      student.biases, strict=True):
            if product is None:
                continue
            found = _collect(problem, student, product, product_of(problem.teacher, layer), inputs, batch)
            if found is None:
                continue
            gram, cross = found
            rows_a_group = weight.shape[0] // len(gram)
            flat, alive = weight.data.flatten(1), mask.flatten(1)
            for row in range(weight.shape[0]):
                group, column = divmod(row, rows_a_group)
                chosen = alive[row].nonzero().flatten()
                now = flat[row, chosen].double()
                if bias is not None:
                    chosen = torch.cat([chosen, chosen.new_tensor([gram.shape[-1] - 1])])
                    now = torch.cat([now, bias.data[row:row + 1].double()])
                if len(chosen) == 0:
                    continue
                system = gram[group][chosen][:, chosen]
                ridge = damping * system.diagonal().mean().clamp_min(1e-12)
                system = system + ridge * torch.eye(len(chosen), dtype=system.dtype, device=system.device)
                solved = torch.linalg.solve(system, cross[group][chosen, column] + ridge * now)
                if bias is not None:
                    bias.data[row], solved = solved[-1], solved[:-1]
                flat[row, alive[row]] = solved.float()
            weight.data.copy_(flat.view_as(weight))
