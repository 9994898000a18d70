"""Saliency criteria: what zeroing each parameter is estimated to cost; one array a layer, higher is more important.

uniform    random, all parameters alike: the bare method of Directed Evolution (Franca-Neto, arXiv:2206.05859).
magnitude  |w|.
wanda      |w| ||x||, activation-weighted magnitude (Sun et al., arXiv:2306.11695).
fisher     F w^2 / 2 with F the diagonal of the divergence's Gauss-Newton matrix, from unlabelled inputs
           (LeCun et al., "Optimal Brain Damage", 1989; Kunstner et al., arXiv:1905.12558 on sampling).
obs        what the layer's output loses when the weight goes and those that are left make up for it, one after the
           other (see obs.py), relative to the output's energy, so that layers compare.
kronecker  w^2 / (2 [F^-1]_pp) with F the divergence's curvature of the layer as a product of two factors (see
           kronecker.py): what zeroing costs once the layer's other weights make up for it.

taylor     F w^2 / 2 - g w with g the gradient of the student's divergence from the teacher: what zeroing does to second
           order once the student is no longer the teacher, and others' errors may be set off (as in WoodTaylor, Singh &
           Alistarh, arXiv:2004.14340, by the diagonal). Made positive, in the order of its values. The most promising
           changes all at once overshoot: it proposes well beside others, where candidates are evaluated, and badly
           alone.

Zeroed parameters are judged by the value that they had when they were zeroed, so that they can compete to return.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from de_ray.evolution.curvature import SaliencyInputs, divergence_gradient, remembered
from de_ray.evolution.gram import grams_in_parts, layer_squares
from de_ray.evolution.kronecker import inverse_diagonal
from de_ray.evolution.obs import damped, removal_losses

TINY = 1e-30
"""Keeps a unit of nothing finite."""
PART = 2**18
"""Weights that are in float64 at a time."""


def _uniform(given: SaliencyInputs) -> list[Tensor]:
    # Distinct numbers, since equal ones would be drawn by position where the temperature is 0.
    return [torch.rand(weight.shape, generator=given.generator) for weight in given.student.weights]


def _magnitude(given: SaliencyInputs) -> list[Tensor]:
    return [weight.abs() for weight in remembered(given.student)]


def _wanda(given: SaliencyInputs) -> list[Tensor]:
    scores = []
    for weight, squares in zip(remembered(given.student), layer_squares(given.student, given.inputs, given.batch),
                               strict=True):
        if squares is None:
            scores.append(weight.abs())
            continue
        norms = squares.sqrt().float()  # [G, D], G groups
        rows = weight.reshape(len(norms), -1, norms.shape[-1])  # [G, R / G, D]
        scores.append((rows.abs() * norms.unsqueeze(1)).reshape(weight.shape))
    return scores


def _fisher(given: SaliencyInputs) -> list[Tensor]:
    return [weight.square_().mul_(curvature).div_(2) for curvature, weight in
            zip(given.fisher, remembered(given.student), strict=True)]


def _obs(given: SaliencyInputs) -> list[Tensor]:
    grams = grams_in_parts(given.student, given.inputs, given.batch)
    scores = []
    for weight, mask, (_, gram) in zip(remembered(given.student), given.student.masks, grams, strict=True):
        if gram is None:  # nothing makes up for anything
            squares = weight.double().square()
            scores.append((squares / (2 * squares.sum().clamp_min(TINY))).float())
            continue
        rows = weight.reshape(len(gram), -1, gram.shape[-1]).double()  # [G, R / G, D]
        energy = torch.einsum("grd,gde,gre->", rows, gram, rows).clamp_min(TINY)
        losses = [removal_losses(*group, given.reach) for group in
                  zip(rows, mask.reshape(rows.shape), damped(gram), strict=True)]
        scores.append((torch.stack(losses) / energy).float().reshape(weight.shape))
    return scores


def _kronecker(given: SaliencyInputs) -> list[Tensor]:
    return [weight.square() / (2 * inverse) for weight, inverse in
            zip(remembered(given.student), inverse_diagonal(given), strict=True)]


def _taylor(given: SaliencyInputs) -> list[Tensor]:
    curvatures, changes = given.fisher, divergence_gradient(given)
    for layer, (mask, curvature, weight) in enumerate(zip(given.student.masks, curvatures, remembered(given.student),
                                                          strict=True)):
        second = (torch.where(mask, 0.5, -0.5) * curvature).mul_(weight.square())
        changes[layer] = second.sub_(changes[layer].mul_(weight))
    # In units of a common change: beyond it, in either direction, logarithms tell sizes.
    unit = torch.cat([change.flatten() for change in changes]).abs_().median().double().clamp_min(TINY)
    for change in changes:
        for part in change.view(-1).split(PART):
            part.copy_(_positive(part.double() / unit))
    return changes


def _positive(x: Tensor) -> Tensor:
    """An increasing function > 0, about x far above zero and -1 / x far below."""
    root = (x.square() + 4).sqrt()
    return torch.where(x > 0, (x + root) / 2, 2 / (root - x))


_CRITERIA = {"uniform": _uniform, "magnitude": _magnitude, "wanda": _wanda, "fisher": _fisher, "obs": _obs,
             "kronecker": _kronecker, "taylor": _taylor}
_BY_GRADIENT = ("fisher", "kronecker", "taylor")


def saliencies(criteria: Sequence[str], given: SaliencyInputs) -> dict[str, list[np.ndarray]]:
    """Saliencies by criterion.

    Args:
        criteria: names of criteria.
        given: the student and the inputs.

    Returns:
        criterion -> one float32 array [layer.size] a layer, in flat index order; >= 0 and finite.
    """
    given = replace(given)  # what it keeps of curvature is freed with it, not after the search
    with torch.no_grad():
        found = {}
        for criterion in criteria:
            with torch.set_grad_enabled(criterion in _BY_GRADIENT):
                scores = _CRITERIA[criterion](given)
            found[criterion] = [score.detach().float().nan_to_num_().flatten().cpu().numpy() for score in scores]
    return found
