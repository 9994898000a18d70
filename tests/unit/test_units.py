"""Hidden units: which may be renumbered, in what order files have them, and what nobody reads."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from de_ray.config import QuantizationConfig
from de_ray.evaluation.capture import capture
from de_ray.evaluation.hidden import Axis, Group, hidden_groups
from de_ray.evaluation.pool import SerialPool
from de_ray.evaluation.replica import ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.base import Layer
from de_ray.problem.custom import problem_from_model
from de_ray.problem.layers import find_layers
from de_ray.quantization.sensitivity import choices_at
from de_ray.rate import measure_rate
from de_ray.student import Student
from de_ray.units import NO_UNITS, find_units, renumber, renumbered, restored, tidy
from tests.networks import Branchy


class Blocks(nn.Module):
    """A sum that ties two layers, a concatenation, channel attention, a batch norm, flattened maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.gate = nn.BatchNorm2d(14), nn.Conv2d(8, 8, 1)
        self.right, self.last = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(14, 4, 3)
        self.hidden, self.head = nn.Linear(64, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + nn.functional.silu(self.left(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = self.norm(torch.cat([x, nn.functional.leaky_relu(self.right(x))], 1))
        x = nn.functional.max_pool2d(self.last(x), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Cached(nn.Module):
    """Concatenates with a vector of nothing, as language models with a cache of keys and values do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.cat([x.new_empty(0), self.first(x).relu()], -1))


class Shown(nn.Module):
    """Layers whose units are numbered for somebody: grouped, shown, shared, normalized together, or cut in two."""

    def __init__(self):
        super().__init__()
        self.shown, self.shared, self.normal = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.cut, self.head = nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x):
        shown = self.shown(x)
        x = self.shared(torch.relu(self.shared(shown)))
        x = self.cut(torch.softmax(self.normal(x), 1))
        first, second = x.chunk(2, 1)
        return {"shown": shown, "head": self.head(torch.relu(first) * second)}


def lenet():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 10, 3), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))


def units_of(module, inputs):
    return find_units(module, inputs, hidden_groups(capture(module, inputs), module.state_dict(keep_vars=True)))


def made(build, shape):
    torch.manual_seed(0)
    module = build().eval().requires_grad_(False)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.normal_(), one.running_var.uniform_(0.5, 2), one.bias.normal_()
    return module, torch.randn(4, *shape)


@pytest.mark.parametrize("build, shape, sizes", [(lenet, (1, 16, 16), [6, 10, 40]),
                                                 (Blocks, (3, 10, 10), [8, 6, 4, 10]), (Cached, (6,), [8])])
def test_units_that_are_found_can_be_renumbered(build, shape, sizes):
    module, inputs = made(build, shape)
    units = units_of(module, inputs)
    assert sorted(group.size for group in units.groups) == sorted(sizes)
    expected, changed = module(inputs), copy.deepcopy(module)
    order = units.shuffled(changed.state_dict(), np.random.default_rng(1))
    renumber(changed.state_dict(), order)
    assert not all(torch.equal(a, b) for a, b in zip(module.parameters(), changed.parameters(), strict=True))
    torch.testing.assert_close(changed(inputs), expected)


@pytest.mark.parametrize("build, shape", [(Shown, (6,)), (Branchy, (3, 9, 9))])
def test_units_whose_numbers_mean_something_are_left_alone(build, shape):
    module, inputs = made(build, shape)
    assert [group.size for group in units_of(module, inputs).groups] == ([] if build is Shown else [6])


def test_units_that_are_seen_after_all_keep_their_numbers_and_a_warning_says_so(caplog):
    module, inputs = made(Shown, (6,))
    with caplog.at_level(logging.WARNING):
        assert find_units(module, inputs, [Group(8, [Axis("shown.weight", 0), Axis("shown.bias", 0)])]) is NO_UNITS
    assert "Shown keeps the numbers of its hidden units: with its units renumbered it computes" in caplog.text


def test_a_network_that_cannot_be_captured_has_no_units_to_renumber():
    class Mixing(nn.Sequential):
        def forward(self, x):
            return super().forward(x - x.mean(0))
    module, inputs = made(lambda: Mixing(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
    assert SerialPool(ReplicaSetup(problem_from_model(module, inputs), 4, "cpu", 1), 1).hidden() == []


def test_units_that_cannot_be_followed_keep_their_numbers_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("de_ray.evaluation.replica.hidden_groups", lambda *_: {}["an operation nobody thought of"])
    module, inputs = made(lenet, (1, 16, 16))
    pool = SerialPool(ReplicaSetup(problem_from_model(module, inputs), 4, "cpu", 1), 1)
    assert pool.hidden() == [] and "nobody thought of" in caplog.text
    assert np.isfinite(pool.evaluate([(), (ZeroingSet(0, np.arange(9)),)], [0])).all()


def prune(share, unread=0):
    """A student of `lenet`, a share of whose weights are zero, and of whose second layer's units some are not read."""
    module, inputs = made(lenet, (1, 16, 16))
    layers = [Layer(name, tuple(one.weight.shape)) for name, one in module.named_modules() if hasattr(one, "weight")]
    student, rng = Student(module, layers), np.random.default_rng(2)
    for k, weight in enumerate(student.weights):
        zero = rng.random(weight.shape) < share
        if k == 2:
            zero[:, :4 * unread] = True
        student.commit([ZeroingSet(k, np.flatnonzero(zero))])
    return student, inputs


@pytest.fixture
def pruned():
    return prune(0.9, unread=3)


def test_what_makes_units_that_nobody_reads_is_zeroed_and_outputs_stay(pruned):
    student, inputs = pruned
    expected, survivors = student.module(inputs), student.survivors
    units = units_of(student.module, inputs)
    assert units.unread_values(student) >= 3
    tidy(student, units)
    torch.testing.assert_close(student.module(inputs), expected)
    assert student.survivors < survivors
    for weight, mask in zip(student.weights, student.masks, strict=True):
        assert torch.equal(weight != 0, mask)
    second, third = student.module[3], student.module[7]
    read = (third.weight != 0).reshape(40, 10, 4).any((0, 2))
    made = (second.weight != 0).flatten(1).any(1)
    assert not made[~read].any() and not second.bias[~read].any() and second.bias[read].all()


def test_units_stand_in_the_order_of_their_survivors_and_the_file_is_smaller(pruned):
    student, inputs = pruned
    config = QuantizationConfig(bits=3, row_scales="never")

    def coded():
        choices, sizes = choices_at([w.numpy() for w in student.weights], config)
        return sizes[:, 0].sum()

    before = coded()
    tidy(student, units_of(student.module, inputs))
    assert coded() < before
    for index in (0, 3, 7):
        made = (student.module[index].weight != 0).flatten(1).sum(1)
        assert (made.diff() <= 0).all()


def test_masks_follow_weights_that_have_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.net = nn.Sequential(self.first, nn.ReLU(), self.last)

        def forward(self, x):
            return self.net(x)

    module, inputs = made(Twice, (6,))
    student, rng = Student(module, find_layers(module)), np.random.default_rng(0)
    for k, weight in enumerate(student.weights):
        student.commit([ZeroingSet(k, np.flatnonzero(rng.random(weight.shape) < 0.5))])
    expected, before = student.module(inputs), student.weights[0].clone()
    tidy(student, units_of(student.module, inputs))
    assert not student.weights[0].equal(before), "there is something to follow"
    torch.testing.assert_close(student.module(inputs), expected)
    for weight, mask in zip(student.weights, student.masks, strict=True):
        assert torch.equal(weight != 0, mask)


def test_units_of_a_file_get_the_teachers_numbers_again():
    student, inputs = prune(0.5)
    units, teacher = units_of(student.module, inputs), made(lenet, (1, 16, 16))[0]
    before = copy.deepcopy(student.module.state_dict())
    state = copy.deepcopy(before)
    renumber(state, units.shuffled(state, np.random.default_rng(3)))
    assert not torch.equal(state["3.weight"], before["3.weight"])
    units.restore(state, teacher.state_dict())
    for name, value in state.items():
        assert torch.equal(value, before[name])


def test_prices_are_of_the_weights_as_they_are_numbered_now(pruned):
    student, inputs = pruned
    units = units_of(student.module, inputs)
    priced = measure_rate(student, QuantizationConfig(bits=3), units)
    order = units.order(student.module.state_dict())
    tidied = copy.deepcopy(student)
    renumber(tidied.module.state_dict(), order)
    for layer, mask in zip(tidied.layers, tidied.masks, strict=True):
        renumber({layer.parameter: mask}, {layer.parameter: order[layer.parameter]} if layer.parameter in order else {})
    expected = measure_rate(tidied, QuantizationConfig(bits=3))
    assert priced.bits(priced.survivors) == expected.bits(expected.survivors)
    for layer, ours, theirs in zip(student.layers, priced.prices, expected.prices, strict=True):
        axes = order.get(layer.parameter, [])
        np.testing.assert_array_equal(renumbered(ours.reshape(layer.shape), axes), theirs.reshape(layer.shape))
        np.testing.assert_array_equal(restored(renumbered(ours.reshape(layer.shape), axes), axes),
                                      ours.reshape(layer.shape))
