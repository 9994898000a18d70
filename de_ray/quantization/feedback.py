"""Error feedback: survivors that are still to be rounded make up for the errors of those that have been.

Columns are settled from left to right against the Hessian of a layer's inputs (Frantar et al., "GPTQ",
arXiv:2210.17323), zeros staying zeros. What is kept is each survivor's value just before it was rounded: its nearest
level is the one that feedback chose, and refit goes on from there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from de_ray.evolution.gram import grams_in_parts
from de_ray.evolution.obs import damped, settle_columns, upper_factor
from de_ray.quantization.choice import LevelChoice
from de_ray.student import Student

MOST_INPUTS = 2**13
"""Of a row that is settled: beyond it, Hessians take gigabytes and their inverses hours."""


def feed_back(student: Student, choices: Sequence[LevelChoice], inputs: Tensor, batch: int) -> None:
    """Move a student's survivors in place to where their nearest levels leave the least error of layers' outputs.

    Args:
        student: its layers' inputs are taken before any of them is moved.
        choices: of the layers that are to be moved; rows of more than `MOST_INPUTS` stay as they are.
        inputs: [M, ...] unlabelled inputs.
        batch: inputs a pass.
    """
    moved = {}
    by_layer = {choice.layer: choice for choice in choices
                if student.weights[choice.layer][0].numel() <= MOST_INPUTS}
    for index, gram in grams_in_parts(student, inputs, batch, only=sorted(by_layer)):
        if gram is None:
            continue  # none makes up for another: the nearest level will do
        weight, choice = student.weights[index], by_layer[index]
        rows = weight.detach().reshape(len(gram), -1, gram.shape[-1]).double()  # [G, R / G, D]
        scales = choice.scales if choice.row_exponents is not None else np.ones(len(weight), np.float32)
        groups = zip(rows, student.masks[index].reshape(rows.shape), damped(gram),
                     torch.from_numpy(scales).to(weight.device).double().reshape(rows.shape[:2]), strict=True)
        latents = torch.stack([_latents(choice, *group) for group in groups])
        moved[index] = latents.reshape(weight.shape).to(weight.dtype)
    for index, latents in moved.items():
        student.weights[index].data.copy_(latents)


def _latents(choice: LevelChoice, rows: Tensor, alive: Tensor, hessian: Tensor, scales: Tensor) -> Tensor:
    """Values of the survivors just before they are rounded: float64 [R, D], zeros elsewhere."""
    table, boundaries = (torch.from_numpy(part).to(rows.device).double() for part in (choice.table, choice.boundaries))
    latents = torch.zeros_like(rows)

    def rounded(column: int, values: Tensor) -> Tensor:
        latents[:, column] = torch.where(alive[:, column], values, 0.0)
        return torch.where(alive[:, column], table[torch.bucketize(values / scales, boundaries)] * scales, 0.0)

    settle_columns(rows, upper_factor(hessian), rounded)
    return latents
