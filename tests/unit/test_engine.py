"""The engine: the same numbers as full forward passes, whatever the network, and nothing run or kept needlessly."""

import copy
import functools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from de_ray.config import QuantizationConfig
from de_ray.device import products, warn_of_precision
from de_ray.evaluation.activations import Activations
from de_ray.evaluation.capture import CaptureError, capture
from de_ray.evaluation.chunks import cut
from de_ray.evaluation.engine import Engine
from de_ray.evaluation.full import FullForwards
from de_ray.evaluation.operations import WeightedOp
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evaluation.sparse import add_products, entries, samples_innermost
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.choose import choose
from tests.networks import Branchy, mlp_problem


class Shared(nn.Module):
    """One convolution and one linear layer used twice, in-place activations, outputs in a nested container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding="same")
        self.twice = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple:
        x = self.act(self.stem(x))
        x = x + self.act(self.twice(x))
        x = self.act_again(self.twice(x))
        pooled = x.mean((2, 3))
        return self.head(pooled), [self.head(torch.tanh(pooled)), x]

    def act_again(self, x: Tensor) -> Tensor:
        return functional.silu(x, inplace=True)


class Pyramid(nn.Module):
    """Two scales, upsampled and concatenated, as YOLOv3 has them; a size that is read from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.coarse = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.Conv2d(6, 2, 1)
        self.small, self.large = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = functional.leaky_relu(self.norm(self.fine(x)), 0.1)
        coarse = functional.max_pool2d(functional.relu(self.coarse(fine)), 3, 1, 1)
        up = functional.interpolate(self.up(coarse), scale_factor=2.0, mode="nearest")
        return {"small": self.small(coarse).flatten(2).transpose(1, 2),
                "large": self.large(torch.cat([up, fine], 1)).view(x.shape[0], 5, -1)}


class Sequence(nn.Module):
    """Convolutions in time and space, and attention over positions with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Conv1d(5, 8, 4, stride=2, dilation=2, padding=3)
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.time(x)).transpose(1, 2)  # [N, L, 8]
        q, k, v = self.query(x), self.key(x), self.value(x)
        x = x + functional.scaled_dot_product_attention(q, k, v)
        return self.out(x).mean(1)


class Volume(nn.Module):
    """Three spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 6, 2, stride=2, groups=3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).amax((2, 3, 4)))


class Regularized(nn.Module):
    """A weight that is read by more than its layer: no correction of the layer's result will do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.relu(self.first(x)))
        return y, y * self.first.weight.square().sum().sqrt()


class Transposed(nn.Module):
    """Samples that do not lie along the first axis everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)  # [L, N, 6]
        z = torch.relu(self.inner(y)) + y.mean(2, keepdim=True)
        return self.outer(z).transpose(0, 1)


class Recurrent(nn.Module):
    """Weights that one operation reads together."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(6, 8, 2, batch_first=True, dropout=0.5, bidirectional=True), nn.Linear(16, 3)
        for weight in self.memory.parameters():
            weight.data *= 4  # or gates hardly move

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.memory(x)[0])).mean(1)


class Decoder(nn.Module):
    """Transposed convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.third, self.last = nn.ConvTranspose2d(4, 4, 3, 1, 1, groups=2), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))))


class Attentive(nn.Module):
    """Attention's own projections, packed into one weight and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.packed(x, x, x, need_weights=False)[0]
        return self.head(self.apart(x, x[..., :6], x[..., 2:], need_weights=False)[0].mean(1))


class Viewed(nn.Module):
    """A view of activations, which may not lie channels last then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, 2)
        self.head = nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.view(x.shape[0], -1))


class Axial(nn.Module):
    """Linear layers along an image's lines, as it lies channels last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.line, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.contiguous(memory_format=torch.channels_last)))
        return self.head(torch.relu(self.line(x)).mean((1, 2)))


class Spectral(nn.Module):
    """A linear layer's result whose memory is read as complex numbers, and as windows that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.windows, self.head = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(46, 3)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.fft(torch.view_as_complex(self.first(x).view(x.shape[0], 16, 2))).abs()
        return self.head(torch.cat([waves, self.windows(x).as_strided((x.shape[0], 30, 3), (32, 1, 1)).amax(2)], 1))


FLOOR = 1e-12
"""Mean squared differences of outputs near 1 that float32 cannot tell from rounding."""

NETWORKS = {
    "branchy": (Branchy, (3, 9, 9)), "shared": (Shared, (3, 8, 8)), "pyramid": (Pyramid, (3, 16, 16)),
    "sequence": (Sequence, (5, 17)), "volume": (Volume, (2, 6, 6, 6)), "regularized": (Regularized, (6,)),
    "transposed": (Transposed, (4, 6)), "recurrent": (Recurrent, (5, 6)), "decoder": (Decoder, (3, 8, 8)),
    "attentive": (Attentive, (5, 8)), "viewed": (Viewed, (3, 9, 9)), "axial": (Axial, (3, 8, 8)),
    "spectral": (Spectral, (6,)),
    "channels_last": (lambda: Branchy().to(memory_format=torch.channels_last), (3, 9, 9)),
}


def problem_of(name, samples=20):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    return problem_from_model(build(), torch.randn(samples, *shape), divergence="mse")


def sets(problem, layers, share, rng):
    """Zeroing sets of a share of each of some layers."""
    return tuple(ZeroingSet(int(layer), np.sort(rng.choice(size, max(1, round(share * size)), replace=False)))
                 for layer in sorted(layers) for size in [problem.layers[layer].size])


def naive(problem, candidate):
    """Copy the weights, zero, full forward."""
    model = copy.deepcopy(problem.teacher)
    for change in candidate:
        weight = model.get_parameter(problem.layers[change.layer].parameter)
        weight.data = weight.data.contiguous()
        weight.data.view(-1)[torch.from_numpy(change.zero)] = 0
    return mean_divergence(problem, model, problem.calibration)


@functools.cache
def replica_of(name, precision="float32"):
    """A problem and its replica, which no evaluation changes. Capturing takes longer than what tests ask of it."""
    problem = problem_of(name)
    return problem, Replica(ReplicaSetup(problem, 8, "cpu", 1, screen_precision=precision))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.97])
def test_each_layers_candidates_have_the_fitness_of_full_forwards(name, share):
    problem, replica = replica_of(name)
    assert isinstance(replica._runner, Engine)
    rng = np.random.default_rng(0)
    layers = range(len(problem.layers))
    candidates = [sets(problem, [layer], share, rng) for layer in layers for _ in range(3)]
    candidates += [sets(problem, rng.choice(len(layers), 2, replace=False), share, rng) for _ in range(4)]
    candidates += [sets(problem, layers, share, rng) for _ in range(4)]
    np.testing.assert_allclose(replica.evaluate(candidates, range(len(replica.batches))),
                               [naive(problem, one) for one in candidates], rtol=1e-4, atol=FLOOR)


@pytest.mark.parametrize("name", ["pyramid", "shared", "axial"])
def test_numbers_stay_right_after_commits_and_refits(name):
    problem = problem_of(name)
    rng = np.random.default_rng(1)
    layers = range(len(problem.layers))
    candidates = [sets(problem, [layer], 0.1, rng) for layer in layers] + [sets(problem, layers, 0.1, rng)]
    used = Replica(ReplicaSetup(problem, 8, "cpu", 1))
    everything = range(len(used.batches))
    for _ in range(3):
        used.evaluate(candidates, everything)
        used.commit(sets(problem, [int(rng.integers(len(layers)))], 0.05, rng))
        expected = Replica(ReplicaSetup(problem, 8, "cpu", 1))
        expected.load_state(used.student.state())
        np.testing.assert_allclose(used.evaluate(candidates, everything), expected.evaluate(candidates, everything),
                                   rtol=1e-4)
        values = {key: value * 1.01 for key, value in used.student.values().items()}
        used.set_values(values)
        expected.set_values(values)
        np.testing.assert_array_equal(used.evaluate(candidates, everything), expected.evaluate(candidates, everything))


def test_only_what_depends_on_a_layer_is_run_again():
    problem, replica = replica_of("pyramid")
    engine = replica._runner
    names = [layer.name for layer in problem.layers]
    whole = len(engine.suffix((names.index("fine"),)).plan)
    assert len(engine.suffix((names.index("large"),)).plan) <= 3 < whole
    assert not {node.name for node in engine.suffix((names.index("up"),)).plan} & {"max_pool2d", "conv2d", "conv2d_1"}


def not_exported(layer, x):
    if torch.compiler.is_exporting():
        raise AssertionError
    return functional.linear(x, layer.weight)


@pytest.mark.parametrize("network", [
    # Control flow by values; samples that influence each other; another function for another number of samples; an
    # error without a word.
    type("Branching", (nn.Linear,), {"forward": lambda self, x: functional.linear(x, self.weight) * (
        2 if float(x.sum()) > 0 else 1)}),
    type("Mixing", (nn.Linear,), {"forward": lambda self, x: functional.linear(x - x.mean(0), self.weight)}),
    type("Counting", (nn.Linear,), {"forward": lambda self, x: functional.linear(x, self.weight) / len(x)}),
    type("Silent", (nn.Linear,), {"forward": not_exported}),
])
def test_a_network_that_cannot_be_run_in_parts_is_named_and_evaluated_whole(network, caplog):
    torch.manual_seed(0)
    model = network(6, 3)
    problem = problem_from_model(model, torch.randn(20, 6), divergence="mse")
    with pytest.raises(CaptureError):
        capture(model.eval(), problem.calibration[:4])
    with caplog.at_level(logging.WARNING):
        replica = Replica(ReplicaSetup(problem, 4, "cpu", 1))
    assert isinstance(replica._runner, FullForwards) and type(model).__name__ in caplog.text
    candidate = (ZeroingSet(0, np.array([1, 7])),)
    expected = np.mean([naive_on(problem, candidate, batch) for batch in replica.batches])
    assert replica.evaluate([candidate, ()], range(4)) == pytest.approx([expected, 0.0], rel=1e-5)


def naive_on(problem, candidate, batch):
    """As `naive`, for a network whose numbers depend on how samples are batched."""
    with torch.no_grad():
        model = copy.deepcopy(problem.teacher)
        reference = model(batch)
        model.weight.data.view(-1)[torch.from_numpy(candidate[0].zero)] = 0
        return float(problem.divergence(reference, model(batch)).mean())


@pytest.mark.parametrize("bits", [1, 4])
def test_level_choices_are_evaluated_like_the_weights_that_they_stand_for(bits):
    problem = problem_of("pyramid")
    replica = Replica(ReplicaSetup(problem, 8, "cpu", 1))
    replica.commit(sets(problem, range(len(problem.layers)), 0.95, np.random.default_rng(2)))
    weights = [weight.numpy() for weight in replica.student.weights]
    choices = tuple(choose(layer, weight, bits, QuantizationConfig()) for layer, weight in enumerate(weights))
    model = copy.deepcopy(replica.student.module)
    for layer, choice, weight in zip(problem.layers, choices, weights, strict=True):
        model.get_submodule(layer.name).weight.data.copy_(torch.from_numpy(choice.dequantized(weight)))
    expected = mean_divergence(problem, model, problem.calibration)
    assert replica.evaluate([choices], range(len(replica.batches)))[0] == pytest.approx(expected, rel=1e-4)


def test_a_small_cache_gives_the_same_numbers():
    problem = problem_of("pyramid", samples=400)
    rng = np.random.default_rng(3)
    candidates = [sets(problem, [layer], 0.1, rng) for layer in range(len(problem.layers)) for _ in range(2)]
    roomy, tight = (Replica(ReplicaSetup(problem, 64, "cpu", 1, cache_mb=size)) for size in (64, 1))
    everything = range(len(roomy.batches))
    for _ in range(2):
        np.testing.assert_allclose(tight.evaluate(candidates, everything), roomy.evaluate(candidates, everything),
                                   rtol=1e-5)
    assert tight._runner._activations.held <= 2**20 < roomy._runner._activations.held


def test_the_cache_keeps_what_the_present_call_wants_and_drops_what_only_earlier_calls_wanted():
    cache, one = Activations(100), np.zeros(10, np.float32)  # 40 bytes
    assert cache.put((0, "a"), one) and cache.put((1, "a"), one) and not cache.put((2, "a"), one)
    cache.next_call()
    assert cache.get((0, "a")) is one
    assert cache.put((2, "a"), one)  # batch 1 was wanted by the first call alone
    assert cache.known(0) == {"a"} and cache.known(1) == set() and cache.held == 80
    cache.forget({"b"})
    assert cache.held == 80
    cache.forget()
    assert cache.held == 0 and cache.get((0, "a")) is None


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_lower_precision_screens_and_leaves_everything_else_exact(name, share, bfloat16):
    if name == "recurrent" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch has no LSTM in bfloat16 for this processor")
    problem, exact = replica_of(name)
    _, rough = replica_of(name, "bfloat16")
    rng = np.random.default_rng(0)
    layers = range(len(problem.layers))
    candidates = [sets(problem, layers, share, rng) for _ in range(3)]
    candidates += [sets(problem, [layer], share, rng) for layer in layers]
    expected = exact.evaluate(candidates, [0, 1])
    screened = rough.evaluate(candidates, [0, 1], screening=True)
    assert not np.array_equal(screened, expected) and np.allclose(screened, expected, rtol=0.1, atol=1e-6)
    np.testing.assert_array_equal(rough.evaluate(candidates, [0, 1]), expected)
    np.testing.assert_array_equal(exact.evaluate(candidates, [0, 1], screening=True), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_processors_without_bfloat16_screen_in_float32(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    problem, rough = replica_of(name, "bfloat16")
    candidates = [sets(problem, range(len(problem.layers)), 0.3, np.random.default_rng(0))]
    np.testing.assert_array_equal(rough.evaluate(candidates, [0], screening=True), rough.evaluate(candidates, [0]))


def test_no_call_reaches_cuda_on_a_cpu(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("CUDA was called")
    for name in ("is_available", "device_count", "init", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    problem = mlp_problem()
    replica = Replica(ReplicaSetup(problem, 64, "cpu", 1))
    assert replica.evaluate([sets(problem, [0], 0.1, np.random.default_rng(0))], [0])[0] > 0


@given(layers=st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), max_size=30), stack=st.integers(1, 9))
def test_tasks_hold_every_candidate_once_and_candidates_of_the_same_layers_alone(layers, stack):
    candidates = [tuple(ZeroingSet(layer, np.array([0])) for layer in sorted(one)) for one in layers]
    tasks = cut(candidates, stack)
    assert sorted(k for task in tasks for k in task) == list(range(len(candidates)))
    for task in tasks:
        assert 1 <= len(task) <= stack and task == sorted(task)
        assert len({tuple(edit.layer for edit in candidates[k]) for k in task}) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_sparse_correction_equals_the_dense_convolution(data):
    spatial = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2]))
    numbers = {name: tuple(data.draw(st.integers(low, high)) for _ in range(spatial)) for name, low, high in (
        ("kernel_size", 1, 3), ("stride", 1, 3), ("padding", 0, 2), ("dilation", 1, 2), ("size", 5, 8))}
    size = numbers.pop("size")
    torch.manual_seed(data.draw(st.integers(0, 99)))
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial](2 * groups, 3 * groups, groups=groups, bias=False,
                                                               **numbers).requires_grad_(False)
    filled = {key: (neutral,) * (3 - spatial) + numbers[key] for key, neutral in (("stride", 1), ("padding", 0),
                                                                                  ("dilation", 1))}
    op = WeightedOp(None, None, None, None, spatial, groups=groups, **filled)
    inputs = torch.randn(5, 2 * groups, *size)
    positions = np.sort(data.draw(st.permutations(range(conv.weight.numel())))[:data.draw(st.integers(0, 9))])
    positions = positions.astype(np.int64)
    base = conv(inputs)
    change = torch.zeros_like(conv.weight)
    change.view(-1)[positions] = torch.randn(len(positions))
    found = torch.empty_like(base)
    if spatial == 2 and data.draw(st.booleans()):
        found = found.to(memory_format=torch.channels_last)
    add_products(op, found, base, samples_innermost(op, inputs),
                 entries(tuple(change.shape), positions, change.view(-1)[positions].numpy()))
    conv.weight.add_(change)
    torch.testing.assert_close(found, conv(inputs), rtol=1e-4, atol=1e-5)


def test_a_precision_that_a_cpu_does_not_have_is_ignored_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        Replica(ReplicaSetup(mlp_problem(), 64, "cpu", 1, screen_precision="tf32"))
    assert "tf32 is ignored" in caplog.text


@pytest.mark.parametrize(("name", "capability", "told"), [
    ("bfloat16", (7, 5), True), ("tf32", (7, 0), True), ("bfloat16", (8, 0), False), ("float32", (7, 5), False)])
def test_a_gpu_without_units_for_a_precision_is_told_of(name, capability, told, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.WARNING):
        warn_of_precision("refit.precision", name, torch.device("cuda:0"))
    assert ("this GPU" in caplog.text) == told and len(caplog.records) == told


@pytest.mark.parametrize(("name", "expected"), [("float32", False), ("bfloat16", False), ("tf32", True)])
def test_float32_is_float32_on_gpus_whatever_pytorch_would_rather_have(name, expected):
    """Their flags can be looked at without one."""
    backends = torch.backends
    flags = lambda: (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)  # noqa: E731
    former = flags()
    with products(name, torch.device("cuda")):
        assert flags() == (expected, expected)
        with products("tf32", torch.device("cuda")):
            assert flags() == (True, True)
        assert flags() == (expected, expected)
    assert flags() == former
    with products(name, torch.device("cpu")):
        assert flags() == former


@pytest.mark.parametrize(("name", "expected"), [("float32", "ieee"), ("tf32", "tf32")])
def test_pytorchs_newer_switches_of_precision_are_minded_where_an_application_uses_them(name, expected):
    backends = torch.backends
    switches = lambda: [one.fp32_precision for one in (backends.cuda.matmul, backends.cudnn.conv)]  # noqa: E731
    former = backends.cuda.matmul.fp32_precision
    backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        before = switches()
        with products(name, torch.device("cuda")):
            assert switches() == [expected] * 2
        assert switches() == before
    finally:
        backends.cuda.matmul.fp32_precision = former
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("flags", "told"), [({"avx2": True, "avx512_bf16": False}, True), ({"amx_bf16": True}, False),
                                             ({"neon": True, "bf16": True}, False)])
def test_a_processor_without_bfloat16_is_told_of(flags, told, caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    with caplog.at_level(logging.WARNING):
        warn_of_precision("refit.precision", "bfloat16", torch.device("cpu"))
        warn_of_precision("refit.precision", "float32", torch.device("cpu"))
    assert ("refit.precision=bfloat16: this processor has no instructions" in caplog.text) == told
    assert len(caplog.records) == told
