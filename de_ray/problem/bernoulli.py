"""Divergence and curvature of Bernoulli variables in their logits, of which detectors' divergences are made."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

SMALL = 0.25
"""Difference of logits below which `bernoulli_kl` integrates instead of subtracting."""
NODES = ((0.15505103, 0.31804138), (0.64494897, 0.18195862))
"""Points and weights of the two-point Gauss rule for the integral of (1 - u) f(u) over [0, 1]."""


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid t) || Bernoulli(sigmoid s)) of logits, elementwise in nats.

    Never below 0, and 0 only for equal logits, unless it is below float32's range; relative error about 1e-5.
    The gradient in `student` is sigmoid(s) - sigmoid(t); there is none in `teacher`.
    """
    return _BernoulliKL.apply(teacher, student)


class _BernoulliKL(torch.autograd.Function):
    """By hand, since the value needs care where logits are close, and its gradient none at all."""

    @staticmethod
    def forward(ctx, teacher: Tensor, student: Tensor) -> Tensor:
        ctx.save_for_backward(teacher, student)
        # KL is symmetric in swapping the two outcomes; for t <= 0 nothing below is a difference of large numbers.
        sign = 1 - 2 * (teacher > 0).to(teacher.dtype)
        t, s = teacher * sign, student * sign
        difference = s - t
        # The Bregman divergence of softplus; where logits are close it would be lost to rounding ...
        apart = softplus(s) - softplus(t) - t.sigmoid() * difference
        # ... and its integral form, the second derivative along the way from t to s, is a sum of positive terms.
        near = torch.zeros_like(apart)
        for node, weight in NODES:
            q = torch.lerp(t, s, node).sigmoid()
            near.add_(weight * q * (1 - q))
        return torch.where(difference.abs() < SMALL, near * difference.square(), apart)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        teacher, student = ctx.saved_tensors
        return None, gradient * (student.sigmoid() - teacher.sigmoid())


def bernoulli_curvature(logits: Tensor) -> Tensor:
    """Second derivative of `bernoulli_kl` at equal logits, elementwise."""
    # sigmoid(-z) rather than 1 - sigmoid(z), which is 0 too early.
    return logits.sigmoid() * (-logits).sigmoid()


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or -1, of a tensor's shape and type, on its device.

    Args:
        like: the tensor.
        generator: on the CPU.
    """
    return (2 * torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) - 1).to(like)
