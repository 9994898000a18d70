"""What a change of a layer's weights costs, by a Kronecker-factored curvature of the divergence.

A layer's block of the divergence's Gauss-Newton matrix is close to B (x) A: A = E[x x^T] of its inputs and B = E[g g^T]
of the gradients at its outputs (Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate
curvature", arXiv:1503.05671; summed over positions for convolutions: Grosse & Martens, arXiv:1602.01407). Its diagonal
F is known without that approximation, and is far from A_jj B_ii once most weights are zero, so that factors are made
correlations here, of unit diagonal, and the block is F^1/2 (B (x) A) F^1/2. A change D of the weights costs
tr(B E A E^T) / 2 with E = F^1/2 D, which counts that weights of a row, and rows, add up or make up for each other; the
diagonal counts none of it. Each factor is kept as its largest eigenvectors and the diagonal that they leave, so that a
change of k weights takes some hundred k multiply-adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from de_ray.evolution.candidate import Candidate
from de_ray.evolution.curvature import SaliencyInputs, fisher_diagonal, output_grams, remembered
from de_ray.evolution.gram import grams_in_parts, layer_grams, layer_groups
from de_ray.evolution.obs import DAMPING, damped

RANK = 32
"""Eigenvectors that are kept of each factor."""
TINY, HUGE = 1e-30, 1e30
"""Bounds that float32 has room for."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A positive semidefinite matrix [D, D] as vectors vectors^T + diag(rest)."""

    vectors: np.ndarray
    """float32 [D, r], eigenvectors times the roots of their eigenvalues."""
    rest: np.ndarray
    """float32 [D], >= 0."""


def unit_factor(size: int) -> Factor:
    """The unit matrix [size, size]."""
    return Factor(np.zeros((size, 0), np.float32), np.ones(size, np.float32))


def factor(matrix: Tensor) -> Factor:
    """The largest eigenvectors of a symmetric matrix float64 [D, D], and what its diagonal has beside them."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = vectors[:, -RANK:] * values[-RANK:].clamp_min(0).sqrt()
    rest = (matrix.diagonal() - kept.square().sum(1)).clamp_min(0)
    return Factor(kept.float().cpu().numpy(), rest.float().cpu().numpy())


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of a layer that read the same channels."""

    inputs: Factor
    outputs: Factor


class KroneckerSurrogate:
    """Estimates the rise of the divergence for zeroing sets of a student.

    Args:
        given: the student as it is, and the inputs of its curvature.
    """

    def __init__(self, given: SaliencyInputs) -> None:
        weights, curvature = list(remembered(given.student)), _curvature(given)
        self._values = [(weight * of.diagonal.sqrt()).flatten().cpu().numpy()
                        for weight, of in zip(weights, curvature, strict=True)]
        self._widths = [weight[0].numel() for weight in weights]
        self._groups = [[_Group(*factors) for factors in
                         zip(_factors(of.inputs, groups, width), _factors(of.outputs, groups, len(weight) // groups),
                             strict=True)]
                        for of, groups, width, weight in
                        zip(curvature, layer_groups(given.student), self._widths, weights, strict=True)]

    def __call__(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Estimated rises of the mean divergence, float64 [K]; layers' costs are summed."""
        return np.array([sum(self.cost(one.layer, one.zero, one.revive) for one in candidate)
                         for candidate in candidates], np.float64)

    def cost(self, layer: int, zero: np.ndarray, revive: np.ndarray) -> float:
        """Estimated cost of a layer's change; see `ZeroingSet`."""
        width, groups = self._widths[layer], self._groups[layer]
        positions = np.concatenate([zero, revive])
        changes = self._values[layer][positions]
        changes[len(zero):] *= -1
        rows, columns = np.divmod(positions, width)
        height = len(self._values[layer]) // width // len(groups)
        total = 0.0
        for number, group in enumerate(groups):
            inside = slice(None) if len(groups) == 1 else rows // height == number
            total += _cost(group, rows[inside] - number * height, columns[inside], changes[inside])
        return total / 2


def _factors(correlations: Tensor | None, groups: int, size: int) -> list[Factor]:
    """Factors of a layer's groups; of nothing known, unit matrices."""
    return [unit_factor(size)] * groups if correlations is None else [factor(one) for one in correlations]


def _cost(group: _Group, rows: np.ndarray, columns: np.ndarray, changes: np.ndarray) -> float:
    """tr(B D A D^T) of a change D of a few entries."""
    a, b = group.inputs, group.outputs
    through, across = _products(rows, columns, changes, a.vectors, b.vectors)  # D V [R, r], D^T U [D, r']
    return float(np.square(b.vectors.T @ through).sum() + (b.rest @ np.square(through)).sum()
                 + (a.rest @ np.square(across)).sum()
                 + (b.rest[rows] * a.rest[columns] * np.square(changes)).sum())


@njit(cache=True)
def _products(rows: np.ndarray, columns: np.ndarray, changes: np.ndarray, inputs: np.ndarray,
              outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sparse matrix and its transpose, times dense ones."""
    through = np.zeros((len(outputs), inputs.shape[1]), np.float32)
    across = np.zeros((len(inputs), outputs.shape[1]), np.float32)
    for entry in range(len(changes)):
        row, column, change = rows[entry], columns[entry], changes[entry]
        for i in range(inputs.shape[1]):
            through[row, i] += change * inputs[column, i]
        for i in range(outputs.shape[1]):
            across[column, i] += change * outputs[row, i]
    return through, across


@dataclass(frozen=True, eq=False)
class _Curvature:
    """A layer's diagonal, and correlations."""

    diagonal: Tensor
    """float32, of the weight's shape."""
    inputs: Tensor | None
    """float64 [G, D, D]; None: nothing goes with anything."""
    outputs: Tensor | None
    """float64 [G, R / G, R / G]; the same."""


def _curvature(given: SaliencyInputs) -> list[_Curvature]:
    with torch.no_grad():
        inputs = layer_grams(given.student, given.inputs, given.batch)
    with torch.enable_grad():
        outputs, diagonals = output_grams(given), fisher_diagonal(given)
    return [_Curvature(diagonal, *map(_correlation, pair))
            for diagonal, *pair in zip(diagonals, inputs, outputs, strict=True)]


def _correlation(gram: Tensor | None) -> Tensor | None:
    """Gram matrices [..., D, D] scaled to a diagonal of ones; what never varies goes with nothing."""
    if gram is None:
        return None
    squares = gram.diagonal(dim1=-2, dim2=-1)
    never = squares <= 0
    norms = torch.where(never, 1.0, squares).sqrt()
    return gram / norms[..., :, None] / norms[..., None, :] + torch.diag_embed(never.to(gram.dtype))


def inverse_diagonal(given: SaliencyInputs) -> list[Tensor]:
    """The diagonal of the inverse of each layer's damped curvature, float32 of the weight's shape; > 0."""
    found = []
    with torch.enable_grad():
        outputs, diagonals = output_grams(given), fisher_diagonal(given)
    grams = grams_in_parts(given.student, given.inputs, given.batch)
    for diagonal, output, (_, gram), groups in zip(diagonals, outputs, grams, layer_groups(given.student), strict=True):
        across = _inverse(_correlation(gram), groups, diagonal[0].numel(), diagonal.device)
        along = _inverse(_correlation(output), groups, len(diagonal) // groups, diagonal.device)
        inverse = (along[:, :, None] * across[:, None, :]).reshape(diagonal.shape)
        found.append((inverse / diagonal.double().clamp_min(TINY)).clamp_max(HUGE).float())
    return found


def _inverse(correlations: Tensor | None, groups: int, size: int, device: torch.device) -> Tensor:
    """The diagonal of damped correlations' inverse, float64 [G, size]."""
    if correlations is None:
        return torch.full((groups, size), 1 / (1 + DAMPING), dtype=torch.float64, device=device)
    return torch.linalg.inv(damped(correlations)).diagonal(dim1=-2, dim2=-1)
