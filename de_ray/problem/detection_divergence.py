"""How far a student's raw YOLOv3 heads are from the teacher's.

A head is read as a distribution over what an image holds. Each anchor of each cell has an object with probability p;
if it has, each class independently with probability q_c, and a box with coordinates Gaussian about those predicted. The
divergence is the KL divergence of these distributions, which the chain rule gives term by term, t for teacher and s
for student:

    sum over anchors:  KL(p_t || p_s)  +  p_t [ sum over classes KL(q_t || q_s)  +  |b_t - b_s|^2 / (2 sigma^2) ]

with b = (sigmoid x, sigmoid y) in cells and (w, h) in logarithms. No weight between the terms is left to be chosen but
sigma. Anchors and classes are summed, since they are independent; what an anchor without an object would have said of
class and box counts for nothing, and an image with many objects weighs more than an empty one.

Most anchors have next to no object, and their many small terms are half of the sum for a student at 90 % sparsity.
Where a student cannot tell, the least divergence lies at the mean of what the teacher may say, so that objects are seen
with less confidence than the teacher's. For a refit that shall rather see too much than too little, the terms of an
anchor can be given 1 + emphasis p_t times their weight.
"""

from functools import partial

import torch
from torch import Tensor

from de_ray.problem.bernoulli import bernoulli_curvature, bernoulli_kl, random_signs
from de_ray.problem.detection import split_anchors
from de_ray.problem.divergence import TensorDivergence

SIGMA = 0.25
"""Of a box's centre in cells and of its log size: a box of three cells that is off by as much in all four keeps an IoU
of about 0.6, still the same object, and it costs half a nat each."""


def detection_divergence(classes: int, *, sigma: float = SIGMA, emphasis: float = 0.0) -> TensorDivergence:
    """The divergence of heads [N, A x (5 + C), H, W], summed over the heads of an output; see the module.

    Args:
        classes: C.
        sigma: standard deviation of box coordinates, > 0.
        emphasis: >= 0; the score, and so the curvature, is that of 0.
    """
    return TensorDivergence(partial(head_divergence, classes=classes, sigma=sigma, emphasis=emphasis),
                            partial(head_score, classes=classes, sigma=sigma))


def head_divergence(teacher: Tensor, student: Tensor, classes: int, sigma: float, emphasis: float) -> Tensor:
    """KL of one head's outputs [N, A x (5 + C), H, W] in nats: [N].

    0 for heads that decode to the same detections in float32, which means equal logits but for saturated centres and
    for anchors without any objectness.
    """
    t, s = split_anchors(teacher, classes), split_anchors(student, classes)  # [N, A, 5 + C, H, W]
    # Of all channels, boxes' too: a head lies in memory in one piece, its parts do not.
    certain = split_anchors(bernoulli_kl(teacher, student), classes)
    objectness, kinds = certain[:, :, 4:5], certain[:, :, 5:].sum(2, keepdim=True)
    present = t[:, :, 4:5].sigmoid()
    centre = (t[:, :, :2].sigmoid() - s[:, :, :2].sigmoid()).square().sum(2, keepdim=True)
    size = (t[:, :, 2:4] - s[:, :, 2:4]).square().sum(2, keepdim=True)
    value = objectness + present * (kinds + (centre + size) / (2 * sigma**2))  # [N, A, 1, H, W]
    if emphasis:
        value = value * (1 + emphasis * present)
    return value.flatten(1).sum(1)


def head_score(student: Tensor, generator: torch.Generator, classes: int, sigma: float) -> Tensor:
    """See `TensorDivergence.score`: random signs times the root of each output's own curvature.

    The curvature is diagonal in (sigmoid x, sigmoid y, w, h, objectness, classes). Signs give the squared gradient a
    lower variance than labels drawn from the distribution would: those of rare classes are almost never drawn.
    """
    s = split_anchors(student, classes)
    with torch.no_grad():
        present = s[:, :, 4:5].sigmoid()
        curvature = bernoulli_curvature(s)
        curvature[:, :, 5:] *= present
        curvature[:, :, :4] = present / sigma**2
        coefficients = curvature.sqrt() * random_signs(s, generator)
    return (coefficients[:, :, :2] * s[:, :, :2].sigmoid()).sum() + (coefficients[:, :, 2:] * s[:, :, 2:]).sum()
