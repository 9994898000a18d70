"""Optimal Brain Surgeon: weights go one at a time, and the others make up for each that went.

Of a layer with rows w, inputs x and Hessian H = E[x x^T], zeroing weight p and moving the row's others where they serve
best costs w_p^2 / (2 [H^-1]_pp) of squared output error, and moves them by -w_p [H^-1]_:p / [H^-1]_pp (Hassibi & Stork,
1992). Two forms of it:

by rows     the least loss goes first, in each row by itself: exact (Frantar et al., "Optimal Brain Compression",
            arXiv:2208.11580). It gives a *trace*, the loss at which each weight goes, so that every threshold is a
            set and one pass knows every sparsity. k removals of s weights take s k^2 / 2 multiply-adds.
by columns  the columns are settled from left to right, in all rows at once, in D^2 / 2 multiply-adds a row whatever
            goes (Frantar & Alistarh, "SparseGPT", arXiv:2301.00774). It makes up for a set, or for rounding, that is
            known; as a trace of its own it chose worse sets than single losses do, since the last columns look dear.
"""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

DAMPING = 1e-2
"""Ridge of the layer Hessian, as a share of its mean diagonal."""
EXACT_PRODUCTS = 1e10
"""Multiply-adds up to which a layer's trace is taken, about five seconds of one core; beyond, weights are ranked by
what each would cost alone."""
STEP = 1 + 1e-6
"""By which a row's losses rise at least from one removal to the next, so that their order is known in float32 too."""
BLOCK = 128
"""Columns whose corrections reach those behind them in one product."""


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Gram matrices float64 [..., D, D] with a ridge, which makes them positive definite."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    return gram + damping * mean * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def removal_losses(rows: Tensor, alive: Tensor, hessian: Tensor, share: float = 1.0) -> Tensor:
    """The trace of a layer, or of a group of its channels.

    Args:
        rows: [R, D] weights; those that are zeroed hold the value by which they are judged.
        alive: bool [R, D], survivors.
        hessian: float64 [D, D], positive definite.
        share: of each row's survivors, in (0, 1]: how far the trace goes. Beyond it, weights are ranked behind by what
            each would cost alone.

    Returns:
        float64 [R, D], >= 0 and rising along a row's removals; zeroed weights have their loss alone.
    """
    rows, inverse = rows.double(), torch.linalg.inv(hessian)
    losses = rows.square() / (2 * inverse.diagonal())
    counts = alive.sum(1)
    depths = (counts * share).ceil().long()
    inverted = torch.where(counts < rows.shape[1], counts.double() ** 3, 0.0)
    if float((inverted + counts * depths.double().square() / 2).sum()) > EXACT_PRODUCTS:
        return losses
    full = inverse.cpu().numpy()
    for row, depth in enumerate(depths.tolist()):
        kept = alive[row].nonzero().flatten()
        if depth:
            # The inverse over the survivors alone: the others are zero, and make up for nothing.
            own = full if len(kept) == len(full) else torch.linalg.inv(hessian[kept][:, kept]).cpu().numpy()
            found = _eliminate(rows[row, kept].cpu().numpy().copy(), own, depth)
            losses[row, kept] = torch.from_numpy(found).to(losses.device)
    return losses


@njit(cache=True)
def _eliminate(weights: np.ndarray, inverse: np.ndarray, count: int) -> np.ndarray:
    """Losses float64 [S] of a row's survivors, `count` of which go one by one; weights float64 [S] are compensated."""
    size = len(weights)
    factors = np.empty((count, size))  # columns of the Cholesky factor of what has been eliminated
    diagonal = np.diag(inverse).copy()
    losses = np.full(size, -1.0)
    worst = 0.0
    for step in range(count):
        best, least = -1, np.inf
        for i in range(size):
            if losses[i] < 0:
                loss = weights[i] * weights[i] / (2 * diagonal[i])
                if best < 0 or loss < least:
                    best, least = i, loss
        worst = max(worst * STEP, least)
        column = inverse[best].copy()
        for earlier in range(step):
            factor = factors[earlier, best]
            for i in range(size):
                column[i] -= factor * factors[earlier, i]
        scale = 1 / np.sqrt(diagonal[best])
        moved = weights[best] * scale
        for i in range(size):
            value = column[i] * scale
            factors[step, i] = value
            weights[i] -= moved * value
            # What is left of [H^-1]_ii never falls to zero; rounding must not take it there.
            diagonal[i] = max(diagonal[i] - value * value, 1e-12 * inverse[i, i])
        losses[best] = worst
    for i in range(size):
        if losses[i] < 0:
            losses[i] = max(worst * STEP, weights[i] * weights[i] / (2 * diagonal[i]))
    return losses


def upper_factor(hessian: Tensor) -> Tensor:
    """U with H^-1 = U^T U, float64 [D, D]: U_jj^2 is [H^-1]_jj once the columns before j have been settled."""
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def settle_columns(rows: Tensor, upper: Tensor, settled: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Replace the columns from left to right; those still to come make up for each change.

    Args:
        rows: float64 [R, D].
        upper: see `upper_factor`.
        settled: (column's number, its values [R]) -> the values [R] that it gets.

    Returns:
        float64 [R, D].
    """
    rows = rows.clone()
    size = rows.shape[1]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = torch.empty_like(rows[:, start:stop])
        for column in range(start, stop):
            before = rows[:, column].clone()
            rows[:, column] = settled(column, before)
            error = (before - rows[:, column]) / upper[column, column]
            rows[:, column + 1:stop] -= torch.outer(error, upper[column, column + 1:stop])
            errors[:, column - start] = error
        rows[:, stop:] -= errors @ upper[start:stop, stop:]
    return rows
