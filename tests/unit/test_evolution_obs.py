"""Optimal Brain Surgeon, against removals that are solved anew each time."""

import numpy as np
import pytest
import torch

from de_ray.evolution import obs
from de_ray.evolution.obs import damped, removal_losses, settle_columns, upper_factor


def layer(rows=3, size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, size, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64), damped(inputs.T @ inputs / 200)


def best_without(row, hessian, kept):
    """The survivors' best values, and half the squared error that they leave."""
    best = torch.zeros_like(row)
    if kept:
        best[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ row)[kept])
    return best, float((row - best) @ hessian @ (row - best)) / 2


def test_the_trace_of_a_row_takes_the_cheapest_weight_each_time_and_knows_what_it_costs():
    rows, hessian = layer()
    found = removal_losses(rows, torch.ones_like(rows, dtype=torch.bool), hessian)
    for row, losses in zip(rows, found, strict=True):
        kept, before, worst = list(range(len(row))), 0.0, 0.0
        for removed in losses.argsort().tolist():
            errors = {i: best_without(row, hessian, [j for j in kept if j != i])[1] for i in kept}
            assert errors[removed] == pytest.approx(min(errors.values()), rel=1e-6)
            worst = max(worst, errors[removed] - before)
            assert float(losses[removed]) == pytest.approx(worst, rel=1e-4)  # ties are kept apart
            assert losses[removed] < min((losses[j] for j in kept if j != removed), default=torch.inf)
            kept.remove(removed)
            before = errors[removed]


def test_zeroed_weights_make_up_for_nothing():
    rows, hessian = layer()
    alive = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    found = removal_losses(rows, alive, hessian)
    for row, mask, losses in zip(rows, alive, found, strict=True):
        kept = mask.nonzero().flatten()
        alone = removal_losses(row[None, kept], torch.ones(1, len(kept), dtype=torch.bool), hessian[kept][:, kept])
        torch.testing.assert_close(losses[kept], alone[0])


def test_a_shorter_trace_is_the_longer_ones_beginning_and_ranks_the_rest_behind():
    rows, hessian = layer(rows=1, size=12)
    alive = torch.ones_like(rows, dtype=torch.bool)
    whole, part = removal_losses(rows, alive, hessian)[0], removal_losses(rows, alive, hessian, share=1 / 3)[0]
    first = whole.argsort()[:4]
    torch.testing.assert_close(part[first], whole[first])
    behind = np.setdiff1d(np.arange(12), first)
    assert (part[behind] > part[first].max()).all()


def test_layers_beyond_the_bound_are_ranked_by_what_each_weight_costs_alone(monkeypatch):
    rows, hessian = layer()
    monkeypatch.setattr(obs, "EXACT_PRODUCTS", 1)
    found = removal_losses(rows, torch.ones_like(rows, dtype=torch.bool), hessian)
    for i in range(rows.shape[1]):
        kept = [j for j in range(rows.shape[1]) if j != i]
        assert float(found[0, i]) == pytest.approx(best_without(rows[0], hessian, kept)[1], rel=1e-6)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_columns_settled_last_to_first_leave_what_least_squares_leaves(block, monkeypatch):
    # Once no survivor stands behind a zeroed column, the columns behind it have made up for it as well as any can.
    monkeypatch.setattr(obs, "BLOCK", block)
    rows, hessian = layer()
    gone = 4
    found = settle_columns(rows, upper_factor(hessian), lambda column, v: v * (column >= gone))
    for row, settled in zip(rows, found, strict=True):
        torch.testing.assert_close(settled, best_without(row, hessian, list(range(gone, 9)))[0])


def test_rounding_by_columns_errs_less_than_rounding_each_weight():
    rows, hessian = layer(rows=50, size=30)
    settled = settle_columns(rows, upper_factor(hessian), lambda _, values: values.round())
    assert torch.equal(settled, settled.round())
    errors = [torch.einsum("rd,de,re->", d, hessian, d) for d in (rows - settled, rows - rows.round())]
    assert errors[0] < 0.7 * errors[1]
