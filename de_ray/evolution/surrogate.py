"""Estimates of candidates' divergence by the curvature, which screen children before any of them is evaluated."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from de_ray.evolution.candidate import Candidate
from de_ray.evolution.curvature import SaliencyInputs
from de_ray.evolution.kronecker import KroneckerSurrogate
from de_ray.evolution.saliency import saliencies

Estimate = Callable[[Sequence[Candidate]], np.ndarray]
"""Candidates -> float64 [K], lower is better; comparable among the candidates of a cycle alone.

One that has `costs`, as `DiagonalSurrogate` does, is the sum of what each weight costs alone: a search can take it
of its genomes."""


class DiagonalSurrogate:
    """The sum of what each weight costs alone.

    Args:
        saliency: a float32 array [layer.size] a layer.
    """

    def __init__(self, saliency: Sequence[np.ndarray]) -> None:
        self.costs = saliency

    def __call__(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """See `Estimate`."""
        return np.array([sum(float(self.costs[one.layer][one.zero].sum())
                             - float(self.costs[one.layer][one.revive].sum()) for one in candidate)
                         for candidate in candidates], np.float64)


def build_surrogate(name: str, given: SaliencyInputs, known: Mapping[str, Sequence[np.ndarray]]) -> Estimate:
    """The surrogate called fisher or kronecker.

    Args:
        name: of the curvature.
        given: the student and the inputs of its curvature.
        known: saliencies that have been taken already.
    """
    if name == "kronecker":
        return KroneckerSurrogate(given)
    return DiagonalSurrogate(known["fisher"] if "fisher" in known else saliencies(["fisher"], given)["fisher"])


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two float arrays [K], in [-1, 1]; 0 where one of them is constant.

    Ties share their mean rank; values that are not finite are the greatest.
    """
    a, b = (_ranks(np.where(np.isfinite(values), values, np.inf)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
