"""Convolutions of which a suffix runs a part only: the same numbers as whole ones, and not more than that part."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from de_ray.evaluation import split
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evaluation.upsampled import Axis, convolved
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence


class Neck(nn.Module):
    """Coarse features upsampled twice, beside finer ones; a concatenation that three layers read, functions between."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=3)
        self.lateral, self.deep = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)
        self.wide = nn.Conv2d(12, 4, 5, padding=3, dilation=2)
        self.strided = nn.Conv2d(12, 4, (3, 2), stride=2, padding=(1, 0))
        self.pooled, self.decode = nn.Conv2d(12, 4, 1, bias=False), nn.Conv2d(4, 2, 3, padding="same")

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = functional.relu(self.fine(x))  # [N, 5, 9, 15]
        coarse = functional.leaky_relu(self.coarse(fine), 0.1)  # [N, 6, 3, 5]
        lateral = torch.tanh(functional.interpolate(self.lateral(coarse), scale_factor=3.0, mode="nearest"))
        deep = functional.interpolate(self.deep(coarse), size=fine.shape[2:], mode="nearest")
        joined = torch.cat([lateral, fine, deep], 1)
        skip = self.wide(functional.silu(joined))
        pooled = self.pooled(functional.max_pool2d(joined, 3, 2, 1))
        return [skip, self.strided(joined), self.decode(functional.interpolate(pooled, scale_factor=(2.0, 3.0)))]


class Dense(nn.Module):
    """Each layer reads all before it, side by side; a sum that no split looks through; a head of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 3, 3, padding=1), nn.Conv1d(7, 3, 3, padding=1)
        self.third, self.head = nn.Conv1d(10, 4, 4, padding=2, groups=2), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, self.second(functional.gelu(x))], 1)
        y = self.third(functional.relu(x))
        return self.head(functional.hardtanh(torch.cat([x.mean(2), x[:, :3, 0] + y.amax(2)[:, :3]], 1)))


NETWORKS = {"neck": (Neck, (3, 9, 15)), "dense": (Dense, (4, 11)),
            "neck, channels last": (lambda: Neck().to(memory_format=torch.channels_last), (3, 9, 15))}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_part_of_a_convolution_gives_the_fitness_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(split, "PASS", -np.inf)  # layers here are too small for it to pay
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    inputs = torch.randn(10, *shape)
    problem = problem_from_model(build(), inputs, divergence="mse")
    replica = Replica(ReplicaSetup(problem, 5, "cpu", 1))
    rng = np.random.default_rng(0)
    layers = range(len(problem.layers))
    candidates = [sets(problem, [layer], rng) for layer in layers for _ in range(3)]
    candidates += [sets(problem, rng.choice(len(layers), 2, replace=False), rng) for _ in range(6)]
    for _ in range(2):
        np.testing.assert_allclose(replica.evaluate(candidates, [0, 1]), naive(problem, replica, candidates), rtol=1e-4)
        replica.commit(sets(problem, layers, rng))  # whatever is kept of it must be computed again
    engine = replica._runner
    found = {problem.layers[layer].name: len(engine.suffix((layer,)).splits) for layer in layers}
    # On `fine` all channels depend, so that only those that are upsampled gain; `third` has groups.
    expected = {"fine": 2, "coarse": 4, "lateral": 4, "deep": 4, "pooled": 1} if "neck" in name else \
        {"first": 1, "third": 1}
    assert {layer: count for layer, count in found.items() if count} == expected
    operations = list(engine.program.operations)
    again = Replica(ReplicaSetup(problem, 5, "cpu", 1))
    again.load_state(replica.student.state())
    again.evaluate(candidates[::-1], [1, 0])  # what is kept does not depend on who asked for it first
    np.testing.assert_array_equal(again.evaluate(candidates, [0, 1]), replica.evaluate(candidates, [0, 1]))
    assert engine.program.operations == operations  # derived once


def sets(problem, layers, rng):
    """Zeroing sets of a tenth of each of some layers."""
    return tuple(ZeroingSet(int(layer), np.sort(rng.choice(size, 1 + size // 10, replace=False)))
                 for layer in sorted(layers) for size in [problem.layers[layer].size])


def naive(problem, replica, candidates):
    """Full forward passes of copies."""
    found = []
    for candidate in candidates:
        model = copy.deepcopy(replica.student.module)
        for change in candidate:
            module = model.get_submodule(problem.layers[change.layer].name)
            weight = module.weight.data.contiguous()
            weight.view(-1)[torch.from_numpy(change.zero)] = 0
            module.weight.data = weight
        found.append(mean_divergence(problem, model, problem.calibration))
    return found


def test_a_split_that_saves_little_is_not_made():
    torch.manual_seed(0)
    problem = problem_from_model(Dense(), torch.randn(10, 4, 11), divergence="mse")
    engine = Replica(ReplicaSetup(problem, 5, "cpu", 1))._runner
    assert not any(engine.suffix((layer,)).splits for layer in range(len(problem.layers)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_convolution_before_upsampling_equals_one_after_it(data):
    spatial = data.draw(st.integers(1, 3))
    draw = {name: [data.draw(st.integers(low, high)) for _ in range(spatial)] for name, low, high in (
        ("kernel", 1, 4), ("padding", 0, 3), ("dilation", 1, 3), ("factor", 1, 4), ("small", 3, 5))}
    sizes = [f * s + 2 * p - d * (k - 1) for k, p, d, f, s in zip(*draw.values(), strict=True)]
    if min(sizes) < 1:
        return
    torch.manual_seed(data.draw(st.integers(0, 99)))
    small, weight = torch.randn(2, 3, *draw["small"]), torch.randn(4, 3, *draw["kernel"])
    large = small
    for axis, factor in enumerate(draw["factor"]):
        large = large.repeat_interleave(factor, 2 + axis)
    convolution = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[spatial]
    expected = convolution(large, weight, padding=draw["padding"], dilation=draw["dilation"])
    found = torch.full_like(expected, torch.nan)
    axes = [Axis(*one) for one in zip(*draw.values(), sizes, strict=True)]
    for places, part in convolved(small, weight, axes):
        found[(slice(None), slice(None), *places)] = part
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
