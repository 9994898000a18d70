"""How far a student's outputs are from the teacher's, per sample.

Each divergence sums over all floating-point tensors of the outputs. With t and s one tensor of teacher and student:

    kl      KL(softmax(t) || softmax(s)) over dimension 1, mean over the positions that remain
    mse     mean of (t - s)^2
    cosine  1 - cos(t, s), plus ((|t| - |s|) / (|t| + |s|))^2 since cosine alone is blind to scale

All are >= 0, exactly 0 for equal outputs, and differentiable in the student's output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from de_ray.checks import require_choice
from de_ray.config import DIVERGENCES
from de_ray.problem.base import Output
from de_ray.problem.outputs import leaves


def make_divergence(kind: str) -> "TensorDivergence":
    """The divergence called kl, mse or cosine.

    Returns:
        A function (teacher_out, student_out) -> float32 [N]. It raises `ValueError` when the two outputs do not
        have the same structure, or their tensors not the same shapes with one number of samples in front.
    """
    require_choice("problem.divergence", kind, DIVERGENCES)
    return TensorDivergence(*_TENSOR_DIVERGENCES[kind])


class TensorDivergence:
    """A divergence of two tensors, summed over the tensors of two outputs. A class, so that it can be pickled."""

    def __init__(self, of_tensors: Callable[[Tensor, Tensor], Tensor],
                 score: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        self.of_tensors = of_tensors
        self._score = score

    def score(self, output: Output, generator: torch.Generator) -> Tensor:
        """A random scalar whose gradient with respect to each sample's output has mean 0 and, as its covariance, the
        divergence's curvature at equal outputs; differentiable.

        Its square, pulled back to weights, is an unbiased estimate of the Gauss-Newton diagonal, without labels.

        Args:
            output: of the student, N samples.
            generator: on the CPU.
        """
        return sum(self._score(leaf.float(), generator) for _, leaf in leaves(output))

    def against(self, teacher_out: Output) -> Callable[[Output], Tensor] | None:
        """The divergence of students stacked along the first axis, the teacher's part worked out once; no gradients.

        Returns:
            A function of their output, K * N samples, that gives [K * N] bit for bit as the divergence does; None where
            there is nothing to be saved: it is KL between single matrices of logits that has such a part.
        """
        single = isinstance(teacher_out, Tensor) and teacher_out.is_floating_point() and teacher_out.ndim == 2
        return KlReference(teacher_out.float()) if single and self.of_tensors is kl else None

    def __call__(self, teacher_out: Output, student_out: Output) -> Tensor:
        teacher, student = dict(leaves(teacher_out)), dict(leaves(student_out))
        if teacher.keys() != student.keys():
            raise ValueError(f"outputs differ in structure: the teacher's tensors are {list(teacher)}, "
                             f"the student's {list(student)}")
        if not teacher:
            raise ValueError("the output holds no floating-point tensor")
        total: Tensor | None = None
        for path, t in teacher.items():
            s = student[path]
            if t.shape != s.shape:
                raise ValueError(f"{path}: the teacher's shape is {list(t.shape)}, the student's {list(s.shape)}")
            if t.ndim == 0 or (total is not None and len(t) != len(total)):
                raise ValueError(f"{path}: shape {list(t.shape)} does not begin with the number of samples")
            value = self.of_tensors(t.float(), s.float())  # [N]
            total = value if total is None else total + value
        return total


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits [N, C, ...] in nats, mean over positions: [N].

    0 for equal distributions: logits that differ by a constant over C count as equal.
    """
    if teacher.ndim < 2 or teacher.shape[1] < 2:  # of a single class, any two outputs would be equal
        raise ValueError(f"divergence kl needs logits [N, C, ...] of C >= 2 classes, got {list(teacher.shape)}: use "
                         "mse or cosine")
    log_p = _log_probabilities(teacher)
    p = log_p.exp()
    value = _expected_difference(p, log_p, _log_probabilities(student), p > 0, 0 if teacher.ndim == 2 else 1)
    return not_below_zero(value.reshape(len(value), -1).mean(1))  # [N]


class KlReference:
    """`kl` of many students' logits to the same teacher's, whose part is worked out once; without gradients.

    Args:
        teacher: logits [N, C].
    """

    def __init__(self, teacher: Tensor) -> None:
        self._log_p = _log_probabilities(teacher).unsqueeze(1)  # [C, 1, N]
        self._p = self._log_p.exp()
        possible = self._p > 0
        self._possible = None if possible.all() else possible

    def __call__(self, students: Tensor) -> Tensor:
        """Of K students' logits [K * N, C], one student's after the other's: [K * N], bit for bit what `kl` gives."""
        log_q = _log_probabilities(students.float()).unflatten(1, (-1, self._p.shape[2]))  # [C, K, N]
        return not_below_zero(_expected_difference(self._p, self._log_p, log_q, self._possible, 0).flatten())


def _log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of [N, C, ...] over C; of [N, C] as [C, N].

    A softmax over a few contiguous values takes several times as long as one over the first axis.
    """
    return logits.t().log_softmax(0) if logits.ndim == 2 else logits.log_softmax(1)


def _expected_difference(p: Tensor, log_p: Tensor, log_q: Tensor, possible: Tensor | None, axis: int) -> Tensor:
    """Sum of p (log p - log q) over an axis.

    Args:
        possible: where p > 0; None: everywhere. Classes that the teacher rules out (a logit of minus infinity)
            contribute nothing, rather than 0 x infinity.
    """
    terms = p * (log_p - log_q)
    return (terms if possible is None else torch.where(possible, terms, 0)).sum(axis)


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of [N, ...] over all but the samples: [N]."""
    return (teacher - student).square().reshape(len(teacher), -1).mean(1)


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cos of the flattened samples plus the squared relative difference of their norms, in [0, 3]: [N].

    1 - cos is taken as half the squared distance of the unit vectors, which is exactly 0 for equal samples.
    """
    tiny = torch.finfo(torch.float32).tiny
    t, s = teacher.reshape(len(teacher), -1), student.reshape(len(student), -1)  # [N, D]
    t_norm, s_norm = t.norm(dim=1, keepdim=True), s.norm(dim=1, keepdim=True)  # [N, 1]
    turn = (t / t_norm.clamp_min(tiny) - s / s_norm.clamp_min(tiny)).square().sum(1) / 2
    stretch = ((t_norm - s_norm) / (t_norm + s_norm).clamp_min(tiny)).square().squeeze(1)
    return turn + stretch


def kl_score(student: Tensor, generator: torch.Generator) -> Tensor:
    """-log q(y) for y drawn from q = softmax(student): the covariance of its gradient is diag(q) - q q^T."""
    log_q = student.log_softmax(1).flatten(2) if student.ndim > 2 else student.log_softmax(1).unsqueeze(2)  # [N, C, P]
    return -drawn_log_probability(log_q, 1, generator).sum() / log_q.shape[2] ** 0.5


def drawn_log_probability(log_q: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """log q(y) for a y drawn along an axis from each distribution, the axis kept; differentiable.

    Args:
        log_q: logarithms of probabilities.
        axis: along which their exponentials sum to 1.
        generator: on the CPU.
    """
    gumbel = -torch.empty(log_q.shape).exponential_(generator=generator).log().to(log_q.device)
    return log_q.gather(axis, (log_q.detach() + gumbel).argmax(axis, keepdim=True))


def not_below_zero(value: Tensor) -> Tensor:
    """A divergence that rounding may have left a hair below 0.

    The value only is lifted: a clamp would also cut the gradient.
    """
    return value + (value.clamp_min(0) - value).detach()


def mse_score(student: Tensor, generator: torch.Generator) -> Tensor:
    """n . student with n of variance 2 / D, the second derivative of a mean of D squares."""
    noise = torch.randn(student.shape, generator=generator).to(student.device)
    return (noise * student).sum() * (2 / student[0].numel()) ** 0.5


def cosine_score(student: Tensor, generator: torch.Generator) -> Tensor:
    """n . student / |student|: exact across the output's direction; along it the curvature is half of that."""
    flat = student.reshape(len(student), -1)
    norm = flat.detach().norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.randn(flat.shape, generator=generator).to(student.device) * flat / norm).sum()


_TENSOR_DIVERGENCES = {"kl": (kl, kl_score), "mse": (mse, mse_score), "cosine": (cosine, cosine_score)}
