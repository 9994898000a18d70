"""How far a student's raw anchor-free heads are from the teacher's.

Heads are read as a distribution over what an image holds, as `detection_divergence` does for anchors, and the
divergence is the KL divergence of the two distributions, in nats. Each cell has each class independently with
probability q_c; there being no objectness, the teacher's largest, p, is the probability that the cell has an object at
all. If it has, each side of its box lies at a distance drawn from its distribution over R bins, and each pixel of its
mask is the object's with a probability of its own. With t for teacher and s for student:

    sum over cells:  sum over classes KL(q_t || q_s)  +  p [ sum over sides KL(d_t || d_s)  +  E mean_w KL(m_t || m_s) ]

where mean_w is a weighted mean over pixels: neighbours say nearly the same, so that a mask counts for E independent
ones, and decoding cuts masks to their boxes, so that pixels in the teacher's box count for most. All cells' masks would
be A x h x w numbers; beyond the cells with the largest p the same term is taken to second order in the coefficients,
with the teacher's prototypes and at the most curvature that a pixel may have: p E |P^T (c_t - c_s)|^2 / (8 h w).

For refit, a cell's terms can be given 1 + emphasis p times their weight; see `detection_divergence`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from de_ray.problem.anchor_free import AnchorFree, Heads, cells, decode, inside
from de_ray.problem.bernoulli import bernoulli_curvature, bernoulli_kl, random_signs
from de_ray.problem.divergence import drawn_log_probability

DRAWN = 32
"""Cells an image whose masks are compared pixel by pixel: several for each of half a dozen objects."""
PIXELS = 16.0
"""E: independent pixels that a mask counts for."""
SMALL = 0.1
"""Difference of logarithms up to which a series is more exact than exponentials."""
OUTSIDE = 0.1
"""Share of the weight that lies on pixels outside the teacher's box: a student's box may be larger."""


@dataclass(frozen=True)
class AnchorFreeDivergence:
    """The divergence of `ultralytics.RawHeads`'s outputs; see the module.

    0 for outputs that decode to the same detections in float32: logits of a box's side that differ by a constant count
    as equal. Picklable.

    Args:
        head: what the outputs are.
        emphasis: >= 0; the score, and so the curvature, is that of 0.
    """

    head: AnchorFree
    emphasis: float = 0.0

    def __call__(self, teacher_out: Heads, student_out: Heads) -> Tensor:
        """float32 [N]; differentiable in the student's.

        Raises:
            ValueError: shapes are not those of `head`, or differ.
        """
        t_scores, s_scores = (self._scores(output) for output in (teacher_out, student_out))  # [N, C, A]
        t_sides, s_sides = (self._sides(output).log_softmax(2) for output in (teacher_out, student_out))
        if t_scores.shape != s_scores.shape or t_sides.shape != s_sides.shape:
            raise ValueError(f"the teacher's scores and boxes are {list(t_scores.shape)} and {list(t_sides.shape)}, "
                             f"the student's {list(s_scores.shape)} and {list(s_sides.shape)}: expected the same")
        present = _present(t_scores)  # [N, A]
        given = _distribution_kl(t_sides, s_sides).sum((1, 2))  # [N, A]
        if self.head.coefficients:
            given = given + self._masks(teacher_out, student_out, present)
        value = bernoulli_kl(t_scores, s_scores).sum(1) + present * given
        if self.emphasis:
            value = value * (1 + self.emphasis * present)
        return value.sum(1)

    def score(self, output: Heads, generator: torch.Generator) -> Tensor:
        """A random scalar whose gradient's covariance is the curvature at equal outputs; see `TensorDivergence.score`.

        Signs times the root of each curvature where it is diagonal, -log of the probability of a drawn bin for sides.
        """
        scores, sides = self._scores(output), self._sides(output).log_softmax(2)  # [N, C, A], [N, 4, R, A]
        with torch.no_grad():
            present = _present(scores)
            slopes = random_signs(scores, generator) * bernoulli_curvature(scores).sqrt()
        drawn = drawn_log_probability(sides, 2, generator)  # [N, 4, 1, A]
        total = (slopes * scores).sum() - (present.sqrt()[:, None, None] * drawn).sum()
        return total + self._mask_score(output, present, generator) if self.head.coefficients else total

    def _scores(self, output: Heads) -> Tensor:
        return cells(output["scores"], self.head.classes, "scores")

    def _sides(self, output: Heads) -> Tensor:
        return cells(output["boxes"], 4 * self.head.bins, "boxes").unflatten(1, (4, self.head.bins))

    def _coefficients(self, output: Heads) -> tuple[Tensor, Tensor]:
        """Coefficients [N, A, M] and prototypes [N, M, h, w]."""
        found = cells(output["coefficients"], self.head.coefficients, "coefficients").transpose(1, 2)
        return found, output["prototypes"].float()

    def _masks(self, teacher_out: Heads, student_out: Heads, present: Tensor) -> Tensor:
        """E mean_w KL(m_t || m_s) of each cell's mask [N, A]."""
        (t_all, t_prototypes), (s_all, s_prototypes) = map(self._coefficients, (teacher_out, student_out))
        top, weight = self._drawn(teacher_out, present, t_prototypes)
        # To second order, all cells: the prototypes' second moments stand for their pixels.
        difference = t_all - s_all
        rest = PIXELS / 8 * ((difference @ _moments(t_prototypes)) * difference).sum(2)  # [N, A]
        exact = (weight * bernoulli_kl(_logits(t_all, t_prototypes, top),
                                       _logits(s_all, s_prototypes, top))).sum((2, 3))  # [N, K]
        return rest.scatter(1, top, PIXELS * exact)

    def _mask_score(self, output: Heads, present: Tensor, generator: torch.Generator) -> Tensor:
        coefficients, prototypes = self._coefficients(output)
        top, weight = self._drawn(output, present, prototypes)
        logits = _logits(coefficients, prototypes, top)
        with torch.no_grad():
            curvature = bernoulli_curvature(logits) * weight * present.gather(1, top)[..., None, None]
            slopes = random_signs(logits, generator) * (PIXELS * curvature).sqrt()
            values, vectors = torch.linalg.eigh(_moments(prototypes))
            root = vectors * values.clamp_min(0).sqrt()[:, None]  # [N, M, M], its square the moments
            others = present.scatter(1, top, 0.0)[..., None]
            pull = (PIXELS / 4 * others).sqrt() * (random_signs(coefficients, generator) @ root.transpose(1, 2))
        return (slopes * logits).sum() + (pull * coefficients).sum()

    def _drawn(self, output: Heads, present: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """The cells [N, K] whose masks are drawn, and the weights of their pixels [N, K, h, w], which sum to 1."""
        with torch.no_grad():
            top = present.topk(min(DRAWN, present.shape[1]), 1).indices
            boxes = decode(output, self.head)[0]  # [N, A, 4]
            boxes = boxes.gather(1, top[..., None].expand(-1, -1, 4))
            shape = tuple(prototypes.shape[-2:])
            size = tuple(side * self.head.strides[0] for side in output["boxes"][0].shape[-2:])
            within = inside(boxes, shape, size).float()
            share = within / within.sum((2, 3), keepdim=True).clamp_min(1)
            return top, (1 - OUTSIDE) * share + OUTSIDE / (shape[0] * shape[1])


def _distribution_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms p (e^d - 1 - d), d = log q - log p, none of them below 0: over the axis of a distribution they sum to its
    KL divergence, as sums of p d do but for a part that rounding would leave of small differences."""
    d, p = log_q - log_p, log_p.exp()
    small = d.abs() < SMALL
    near = torch.where(small, d, 0)
    return torch.where(small, p * near.square() * (1 / 2 + near * (1 / 6 + near / 24)), log_q.exp() - p - p * d)


def _present(scores: Tensor) -> Tensor:
    """The probability that a cell has an object: logits [N, C, A] -> [N, A]."""
    return scores.amax(1).sigmoid()


def _logits(coefficients: Tensor, prototypes: Tensor, top: Tensor) -> Tensor:
    """Masks of some cells: [N, A, M], [N, M, h, w] and [N, K] -> [N, K, h, w]."""
    chosen = coefficients.gather(1, top[..., None].expand(-1, -1, coefficients.shape[2]))  # [N, K, M]
    return torch.einsum("nkm,nmhw->nkhw", chosen, prototypes)


def _moments(prototypes: Tensor) -> Tensor:
    """Mean over pixels of the prototypes' products: [N, M, M]."""
    flat = prototypes.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]
