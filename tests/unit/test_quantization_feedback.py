"""Error feedback between survivors of a row."""

import dataclasses

import numpy as np
import pytest
import torch

from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.gram import PART_BYTES, grams_in_parts, layer_grams
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.feedback import feed_back
from de_ray.student import Student
from tests.networks import branchy_problem, mlp_problem

LEVELS = np.array([-0.5, -0.25, -0.125, 0.125, 0.25, 0.5], np.float32)
TABLE = np.insert(LEVELS, 3, 0)


def choice(layer, rows=None):
    boundaries = ((TABLE[1:] + TABLE[:-1]) / 2).astype(np.float32)
    exponents = None if rows is None else (np.arange(rows) % 5).astype(np.int32)
    return LevelChoice(layer, 3, LEVELS, boundaries, exponents)


def pruned(problem):
    student = Student(problem.teacher, problem.layers)
    student.commit(tuple(ZeroingSet(i, np.arange(0, layer.size, 3)) for i, layer in enumerate(problem.layers)))
    return student


def errors(student, weights, grams):
    """Squared error of each layer's outputs."""
    found = []
    for new, old, gram in zip(weights, student.weights, grams, strict=True):
        change = (new - old).reshape(len(gram), -1, gram.shape[-1]).double()
        found.append(float(torch.einsum("grd,gde,gre->", change, gram, change)))
    return np.array(found)


def correlated_problem():
    """Inputs that go together, so that one can make up for another."""
    problem = mlp_problem()
    mixing = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(problem, inputs=problem.inputs[:, :4] @ mixing + problem.inputs / 4)


@pytest.mark.parametrize("make", [correlated_problem, branchy_problem])
@pytest.mark.parametrize("scaled", [False, True])
def test_rounding_with_feedback_leaves_less_error_of_every_layers_outputs(make, scaled):
    problem = make()
    student, moved = pruned(problem), pruned(problem)
    choices = [choice(i, len(weight) if scaled else None) for i, weight in enumerate(student.weights)]
    grams = layer_grams(student, problem.inputs, 16)
    feed_back(moved, choices, problem.inputs, 16)
    near = errors(student, [one.apply(w) for one, w in zip(choices, student.weights, strict=True)], grams)
    fed = errors(student, [one.apply(w) for one, w in zip(choices, moved.weights, strict=True)], grams)
    assert fed.sum() < 0.9 * near.sum()
    for weight, mask in zip(moved.weights, moved.masks, strict=True):
        assert (weight[~mask] == 0).all()


def test_layers_without_a_choice_stay_where_they_are():
    problem = branchy_problem()
    student = pruned(problem)
    before = [weight.clone() for weight in student.weights]
    feed_back(student, [choice(2)], problem.inputs, 16)
    assert [torch.equal(old, new) for old, new in zip(before, student.weights, strict=True)] == [
        True, True, False, True, True]


def test_rows_of_too_many_inputs_stay_where_they_are(monkeypatch):
    problem = branchy_problem()
    sizes = [weight[0].numel() for weight in pruned(problem).weights]
    monkeypatch.setattr("de_ray.quantization.feedback.MOST_INPUTS", sorted(sizes)[2])
    student = pruned(problem)
    before = [weight.clone() for weight in student.weights]
    feed_back(student, [choice(i) for i in range(len(sizes))], problem.inputs, 16)
    assert [torch.equal(old, new) for old, new in zip(before, student.weights, strict=True)] == [
        size > sorted(sizes)[2] for size in sizes]


def test_weights_that_are_levels_stay_where_they_are():
    problem = mlp_problem()
    student = pruned(problem)
    choices = [choice(i) for i in range(len(student.weights))]
    for one, weight in zip(choices, student.weights, strict=True):
        weight.data.copy_(one.apply(weight))
    before = [weight.clone() for weight in student.weights]
    feed_back(student, choices, problem.inputs, 16)
    for old, new in zip(before, student.weights, strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("held", [1, 600, PART_BYTES])
def test_grams_in_parts_are_those_of_one_pass(held, monkeypatch):
    monkeypatch.setattr("de_ray.evolution.gram.PART_BYTES", held)
    problem = branchy_problem()
    student = Student(problem.teacher, problem.layers)
    whole = layer_grams(student, problem.inputs, 16)
    parts = dict(grams_in_parts(student, problem.inputs, 16))
    assert list(parts) == list(range(len(whole)))
    for index, gram in parts.items():
        assert torch.equal(gram, whole[index])
