"""The Kronecker-factored curvature, against exact answers."""

import numpy as np
import pytest
import torch
from torch import nn

from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.curvature import SaliencyInputs, fisher_diagonal, output_grams
from de_ray.evolution.gram import layer_grams
from de_ray.evolution.kronecker import RANK, KroneckerSurrogate, factor, inverse_diagonal
from de_ray.evolution.obs import DAMPING
from de_ray.problem.custom import problem_from_model
from de_ray.student import Student
from tests.networks import branchy_problem


def given(problem, batch=1):
    return SaliencyInputs(Student(problem.teacher, problem.layers), problem, problem.inputs, batch,
                          torch.Generator().manual_seed(0))


def linear_problem(inputs=6, outputs=4, samples=4000):
    torch.manual_seed(0)
    mixed = torch.randn(samples, inputs) @ torch.randn(inputs, inputs)
    return problem_from_model(nn.Sequential(nn.Linear(inputs, outputs, bias=False)), mixed, divergence="mse")


def divergence_without(problem, positions):
    weight = problem.teacher[0].weight.detach().clone()
    exact = problem.inputs @ weight.T
    weight.view(-1)[positions] = 0
    return float(problem.divergence(exact, problem.inputs @ weight.T).mean())


def test_of_a_linear_layer_the_estimate_is_the_divergence_itself():
    problem = linear_problem()
    surrogate, rng = KroneckerSurrogate(given(problem, batch=8)), np.random.default_rng(0)
    for size in (1, 3, 8, 24):
        positions = np.sort(rng.choice(24, size, replace=False))
        estimate = surrogate([(ZeroingSet(0, positions),)])[0]
        assert estimate == pytest.approx(divergence_without(problem, positions), rel=0.15)


def test_bringing_back_undoes_zeroing():
    problem = linear_problem()
    surrogate = KroneckerSurrogate(given(problem, batch=8))
    both, none = np.array([1, 2, 7, 11]), np.empty(0, np.int64)
    assert surrogate.cost(0, both, none) == pytest.approx(surrogate.cost(0, none, both))
    assert surrogate.cost(0, both[:2], both[2:]) != pytest.approx(surrogate.cost(0, both, none))


def test_a_factor_keeps_the_diagonal_whatever_its_rank():
    root = torch.randn(80, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.T
    found = factor(matrix)
    assert found.vectors.shape == (80, RANK)
    whole = found.vectors @ found.vectors.T + np.diag(found.rest)
    np.testing.assert_allclose(np.diag(whole), matrix.diagonal(), rtol=1e-5)
    assert np.linalg.norm(whole - matrix.numpy()) < np.linalg.norm(np.diag(np.diag(matrix)) - matrix.numpy())


def test_a_small_matrix_is_its_factor():
    root = torch.randn(RANK - 2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = factor(root @ root.T)
    whole = found.vectors @ found.vectors.T + np.diag(found.rest)
    np.testing.assert_allclose(whole, root @ root.T, rtol=1e-4, atol=1e-3)


def test_grams_of_outputs_have_the_layers_groups_and_do_not_depend_on_the_batch():
    problem = branchy_problem()
    with torch.enable_grad():
        found = output_grams(given(problem))
    shapes = {layer.name: tuple(gram.shape) for layer, gram in zip(problem.layers, found, strict=True)}
    assert shapes == {"stem": (1, 8, 8), "grouped": (2, 4, 4), "down": (1, 6, 6), "head": (1, 5, 5), "scale": (1, 2, 2)}
    for gram in found:
        assert torch.linalg.eigvalsh(gram).min() > -1e-6 * gram.diagonal(dim1=-2, dim2=-1).max()


def test_groups_are_estimated_apart():
    problem = branchy_problem()
    surrogate = KroneckerSurrogate(given(problem, batch=4))
    grouped = next(i for i, layer in enumerate(problem.layers) if layer.name == "grouped")
    half = problem.layers[grouped].size // 2
    none = np.empty(0, np.int64)
    first, second = np.array([0, 5]), np.array([half + 1, half + 9])
    parts = surrogate.cost(grouped, first, none) + surrogate.cost(grouped, second, none)
    assert surrogate.cost(grouped, np.concatenate([first, second]), none) == pytest.approx(parts, rel=1e-5)


def test_an_activation_in_place_changes_no_gram():
    torch.manual_seed(0)
    layers, inputs, found = (nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(40, 6), []
    for inplace in (False, True):
        problem = problem_from_model(nn.Sequential(layers[0], nn.ReLU(inplace=inplace), layers[1]), inputs,
                                     divergence="mse")
        with torch.enable_grad():
            found.append(output_grams(given(problem, batch=8)))
    for plain, in_place in zip(*found, strict=True):
        torch.testing.assert_close(plain, in_place)


class Borrowed(nn.Module):
    """A network that uses its only layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight)


def test_a_layer_that_is_never_called_costs_what_its_weights_cost_one_by_one():
    torch.manual_seed(0)
    problem = problem_from_model(Borrowed(), torch.randn(4000, 6), divergence="mse")
    inputs, zero, none = given(problem, batch=8), np.arange(5, 17), np.zeros(0, np.int64)
    # In the order in which the surrogate draws, so that all have the same diagonal.
    assert output_grams(inputs) == layer_grams(inputs.student, inputs.inputs, 8) == [None]
    diagonal = fisher_diagonal(inputs)[0]
    surrogate = KroneckerSurrogate(given(problem, batch=8))
    one_by_one = sum(surrogate.cost(0, zero[i:i + 1], none) for i in range(len(zero)))
    assert surrogate.cost(0, zero, none) == pytest.approx(one_by_one, rel=1e-5)
    by_diagonal = diagonal * inputs.student.weights[0].square() / 2
    assert one_by_one == pytest.approx(float(by_diagonal.flatten()[zero].sum()), rel=1e-5)
    # Both factors are damped as correlations of other layers are.
    inverse = inverse_diagonal(given(problem, batch=8))[0] * diagonal
    assert inverse.numpy() == pytest.approx(np.full((4, 6), 1 / (1 + DAMPING) ** 2), rel=1e-5)
