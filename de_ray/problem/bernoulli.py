"""Divergence and curvature of Bernoulli variables in their logits, of which detectors' divergences are made.

With t and s the logits, p = sigmoid(t) and d = s - t, KL = K(d) - K'(0) d, where K is the cumulant generating function
of a Bernoulli variable of probability p. Where logits are close the subtraction would be lost to rounding, and the sum
of its cumulants from the second on, a polynomial in p and d, is exact to float32's last digits; elsewhere K is a
difference of softplus. Evaluation calls it for every candidate and each of up to millions of logits, so that on CPUs
one compiled pass takes the place of some twenty over memory.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import softplus

SMALL = 0.25
"""Difference of logits below which `bernoulli_kl` sums cumulants; those from the seventh on are below 4e-7 of it."""


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
        compiled = student.device.type == "cpu" and teacher.dtype == student.dtype == torch.float32
        return (_in_one_pass if compiled and teacher.shape == student.shape else _by_operations)(teacher, student)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        teacher, student = ctx.saved_tensors
        return None, gradient * (student.sigmoid() - teacher.sigmoid())


def _by_operations(teacher: Tensor, student: Tensor) -> Tensor:
    """The value on any device and in any precision."""
    # KL is symmetric in swapping the two outcomes; for t <= 0 nothing below is a difference of large numbers.
    sign = 1 - 2 * (teacher > 0).to(teacher.dtype)
    t, s = teacher * sign, student * sign
    p, d = t.sigmoid(), s - t
    apart = softplus(s) - softplus(t) - p * d
    q, a = p * (1 - p), 1 - 2 * p
    cumulants = (q, q * a, q * (1 - 6 * q), q * a * (1 - 12 * q), q * (1 - 30 * q * (1 - 4 * q)))  # from the second on
    near = torch.zeros_like(d)
    for cumulant, factorial in zip(reversed(cumulants), (720, 120, 24, 6, 2), strict=True):
        near = near * d + cumulant / factorial
    return torch.where(d.abs() < SMALL, near * d.square(), apart)


def _in_one_pass(teacher: Tensor, student: Tensor) -> Tensor:
    """The same by the compiled kernel, which goes through memory in the order in which the student's logits lie."""
    student = student.detach()
    out = torch.empty_like(student)  # dense, in the student's layout as far as that is dense
    s, t = (one.detach() if one.stride() == out.stride() else torch.empty_like(out).copy_(one)
            for one in (student, teacher))
    p = t.abs().neg_().sigmoid_()
    _kl(*(one.as_strided((one.numel(),), (1,)).numpy() for one in (t, p, s, out)))
    return out


BLOCK = 256
"""Logits between two looks at whether some are far apart."""
_SMALL, _1, _2, _4, _6, _12, _30 = (np.float32(x) for x in (SMALL, 1, 2, 4, 6, 12, 30))
_C2, _C3, _C4, _C5, _C6 = (np.float32(1 / x) for x in (2, 6, 24, 120, 720))


@njit(nogil=True, cache=True, error_model="numpy")
def _kl(t, p, s, out):  # pragma: no cover - compiled
    """p = sigmoid(-|t|). The first inner loop becomes vector instructions; the second one runs where it must."""
    for start in range(0, len(t), BLOCK):
        stop = min(start + BLOCK, len(t))
        far = 0
        for i in range(start, stop):
            d = s[i] - t[i]
            far += not abs(d) < _SMALL  # NaN too
            d = -d if t[i] > 0 else d
            q, a = p[i] * (_1 - p[i]), _1 - _2 * p[i]
            high = a * (_1 - _12 * q) * _C5 + d * ((_1 - _30 * q * (_1 - _4 * q)) * _C6)
            out[i] = q * d * d * (_C2 + d * (a * _C3 + d * ((_1 - _6 * q) * _C4 + d * high)))
        if far == 0:
            continue
        for i in range(start, stop):
            if not abs(s[i] - t[i]) < _SMALL:
                sign = -1.0 if t[i] > 0 else 1.0
                x, y = sign * t[i], sign * s[i]  # float64
                above = max(y, 0.0) + np.log1p(np.exp(-abs(y)))
                out[i] = above - np.log1p(np.exp(x)) - (y - x) / (1.0 + np.exp(-x))


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
