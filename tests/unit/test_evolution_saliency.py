"""Saliency criteria, against exact answers."""

import numpy as np
import pytest
import torch
from torch import nn

from de_ray.config import CRITERIA
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.curvature import SaliencyInputs, divergence_gradient, fisher_diagonal
from de_ray.evolution.saliency import saliencies
from de_ray.evolution.surrogate import rank_correlation
from de_ray.problem.custom import problem_from_model
from de_ray.student import Student
from tests.networks import branchy_problem


def inputs_of(problem, student=None, batch=4, seed=0):
    return SaliencyInputs(student or Student(problem.teacher, problem.layers), problem, problem.inputs, batch,
                          torch.Generator().manual_seed(seed))


def linear_problem(divergence, samples=500):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    return problem_from_model(model, torch.randn(samples, 5), divergence=divergence)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_gives_finite_numbers_not_below_zero_for_each_parameter(criterion):
    problem = branchy_problem()
    found = saliencies([criterion], inputs_of(problem))[criterion]
    assert [len(scores) for scores in found] == [layer.size for layer in problem.layers]
    for scores in found:
        assert np.isfinite(scores).all() and (scores >= 0).all() and scores.std() > 0


@pytest.mark.parametrize("divergence", ["kl", "mse", "cosine"])
def test_fisher_is_the_diagonal_of_the_divergences_hessian_at_equal_outputs(divergence):
    problem = linear_problem(divergence)
    weight = problem.teacher[0].weight.detach()

    def mean_divergence(flat):
        return problem.divergence(problem.inputs @ weight.T, problem.inputs @ flat.view(3, 5).T).mean()

    exact = torch.autograd.functional.hessian(mean_divergence, weight.flatten()).diagonal().view(3, 5)
    estimate = torch.stack([fisher_diagonal(inputs_of(problem, batch=1, seed=seed))[0] for seed in range(12)]).mean(0)
    # cosine's score doubles the curvature along the output's direction, by its definition.
    low, high = (0.75, 1.25) if divergence != "cosine" else (0.75, 2.3)
    assert (estimate > low * exact).all() and (estimate < high * exact).all()


def test_passes_whose_activations_do_not_fit_go_in_parts_with_the_same_gradients():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 20_000), nn.ReLU(), nn.Linear(20_000, 3))  # 80 kB a sample
    problem = problem_from_model(wide, torch.randn(50, 8), divergence="mse")
    student, sizes, found = Student(problem.teacher, problem.layers), [], []
    student.commit([ZeroingSet(0, np.arange(1000))])
    student.module.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    for memory_mb in (1, 4096):
        given = SaliencyInputs(student, problem, problem.inputs, 40, torch.Generator(), memory_mb)
        found.append([divergence_gradient(given), fisher_diagonal(given)])
    for split, whole in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)
    means = [float(each[1][1].mean()) for each in found]  # scores are drawn anew for each part
    assert means[0] == pytest.approx(means[1], rel=0.5)
    assert sizes == [1, 2, *[10] * 4] * 2 + [1, 2, 40] * 2, "13 samples fit, in four parts of equal size"


def test_wanda_is_magnitude_times_the_inputs_root_mean_square():
    problem = linear_problem("mse")
    expected = problem.teacher[0].weight.abs() * problem.inputs.square().mean(0).sqrt()
    found = saliencies(["wanda"], inputs_of(problem))["wanda"][0]
    np.testing.assert_allclose(found, expected.detach().flatten().numpy(), rtol=1e-4)


def test_obs_orders_a_row_by_the_error_that_removal_with_compensation_leaves():
    torch.manual_seed(1)
    mixing = torch.randn(4, 4)
    problem = problem_from_model(nn.Sequential(nn.Linear(4, 1, bias=False)), torch.randn(400, 4) @ mixing,
                                 divergence="mse")
    inputs, weight = problem.inputs.double(), problem.teacher[0].weight.double().flatten()
    left = []
    for removed in range(4):
        kept = [i for i in range(4) if i != removed]
        target = inputs @ weight
        solution = torch.linalg.lstsq(inputs[:, kept], target[:, None]).solution
        left.append(float((target - (inputs[:, kept] @ solution)[:, 0]).square().mean()))
    found = saliencies(["obs"], inputs_of(problem))["obs"][0]
    assert np.argsort(found).tolist() == np.argsort(left).tolist()


@pytest.mark.parametrize("criterion", ["fisher", "kronecker", "taylor", "obs", "wanda"])
def test_a_part_that_a_network_runs_without_gradients_is_judged_too(criterion):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = torch.relu(self.first(x))
            return self.second(x)

    problem = problem_from_model(Frozen(), torch.randn(40, 6), divergence="mse")
    student = Student(problem.teacher, problem.layers)
    given = SaliencyInputs(student, problem, problem.inputs, 16, torch.Generator().manual_seed(0), 1000)
    first, second = saliencies([criterion], given)[criterion]
    assert np.isfinite(first).all() and (second > 0).any()


@pytest.mark.parametrize("criterion", ["obs", "kronecker"])
def test_layers_in_parts_are_judged_as_all_at_once(criterion, monkeypatch):
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)

    def found():
        given = SaliencyInputs(student, problem, problem.inputs, 16, torch.Generator().manual_seed(0), 1000)
        return saliencies([criterion], given)[criterion]

    whole = found()
    monkeypatch.setattr("de_ray.evolution.gram.PART_BYTES", 600)
    assert all(map(np.array_equal, whole, found()))


def test_taylor_orders_weights_by_what_zeroing_them_does_to_the_divergence_now():
    torch.manual_seed(0)  # inputs that share most of what they say, so that weights can stand in for each other
    problem = problem_from_model(nn.Sequential(nn.Linear(5, 3, bias=False)),
                                 torch.randn(500, 5) + 2 * torch.randn(500, 1), divergence="mse")
    student = Student(problem.teacher, problem.layers)
    student.commit((ZeroingSet(0, np.array([2, 7, 11])),))
    weight, dormant = student.weights[0], student.dormant[0].flatten()

    def divergence(index, value):
        changed = weight.detach().flatten().clone()
        changed[index] = value
        return float(problem.divergence(problem.teacher(problem.inputs), problem.inputs @ changed.view(3, 5).T).mean())

    now = divergence(0, float(weight.flatten()[0]))
    alive = student.masks[0].flatten().tolist()
    # Zeroing a survivor, and for one that was zeroed not coming back.
    exact = [divergence(i, 0.0) - now if alive[i] else now - divergence(i, float(dormant[i])) for i in range(15)]
    assert min(exact) < 0 < max(exact)  # some of what is left only does harm
    found = saliencies(["taylor"], inputs_of(problem, student, batch=1))["taylor"][0]
    assert rank_correlation(found, np.array(exact)) > 0.95
    assert rank_correlation(saliencies(["fisher"], inputs_of(problem, student, batch=1))["fisher"][0],
                            np.array(exact)) < 0.9


def test_taylor_does_not_depend_on_how_many_weights_are_in_float64_at_a_time(monkeypatch):
    problem = branchy_problem()
    whole = saliencies(["taylor"], inputs_of(problem))["taylor"]
    monkeypatch.setattr("de_ray.evolution.saliency.PART", 7)
    for one, other in zip(whole, saliencies(["taylor"], inputs_of(problem))["taylor"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_saliencies_change_neither_weights_nor_what_zeroed_ones_were():
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)
    student.commit([ZeroingSet(0, np.arange(5))])
    before = {name: value.clone() for name, value in student.state().items()}
    saliencies(CRITERIA, inputs_of(problem, student))
    assert all(torch.equal(value, before[name]) for name, value in student.state().items())


def test_zeroed_parameters_are_judged_by_the_value_that_they_had():
    problem = linear_problem("mse")
    student = Student(problem.teacher, problem.layers)
    before = saliencies(["magnitude"], inputs_of(problem))["magnitude"][0]
    student.commit((ZeroingSet(0, np.array([2, 7])),))
    np.testing.assert_array_equal(saliencies(["magnitude"], inputs_of(problem, student))["magnitude"][0], before)


def test_saliencies_leave_no_gradients_behind():
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)
    saliencies(list(CRITERIA), inputs_of(problem, student))
    assert all(not p.requires_grad and p.grad is None for p in student.module.parameters())
