"""Networks of unusual make, compressed from Python: what users bring that is no plain chain of layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import de_ray
from de_ray import codec
from de_ray.config import EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
from de_ray.evaluation.capture import capture
from de_ray.evaluation.suffix import Suffix
from de_ray.problem.layers import find_layers
from de_ray.student import Student, make_differentiable


class TiedLayers(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class TiedEmbedding(nn.Module):
    """A language model's habit: the embedding's weight is the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.hidden(self.embedding(x).mean(1))))


class Attention(nn.Module):
    """A transformer's layer, inside which samples lie along the second axis or share one with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.transpose(0, 1)).mean(0))


class Auxiliary(nn.Module):
    """A second head for training alone, and layers called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary, self.last = nn.Linear(12, 12), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = torch.relu(self.body(input=x))
        return (self.last(hidden), self.auxiliary(hidden)) if self.training else self.last(input=hidden)


class Imported(nn.Module):
    """Weights of another framework, which lie in memory the other way round, and a buffer of measurements."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 4)
        self.first.weight = nn.Parameter(torch.randn(12, 20).t())
        self.register_buffer("mean", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x - self.mean)))


class Recurrent(nn.Module):
    """A recurrent layer with dropout between its layers, whose weights no call of a module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = nn.LSTM(8, 12, 2, batch_first=True, dropout=0.5), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x)[0][:, -1])


class Decoder(nn.Module):
    """Images smaller and larger again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.last = nn.ConvTranspose2d(6, 2, 3, 1, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


NETWORKS = {
    "tied layers": (TiedLayers, lambda: torch.randn(40, 12)),
    "tied embedding": (TiedEmbedding, lambda: torch.randint(30, (40, 5))),
    "attention": (Attention, lambda: torch.randn(40, 5, 8)),
    "auxiliary": (Auxiliary, lambda: torch.randn(40, 12)),
    "imported": (Imported, lambda: torch.randn(40, 12)),
    "recurrent": (Recurrent, lambda: torch.randn(40, 5, 8)),
    "decoder": (Decoder, lambda: torch.randn(40, 1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_file_decodes_to_is_the_student(name, tmp_path):
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    result = de_ray.compress(build(), inputs(), sparsity=0.5, evolution=EvolutionConfig(cycles=2, population=4),
                             refit=RefitConfig(steps=3, final_steps=3, batch=8),
                             quantization=QuantizationConfig(refit_steps=3), pool=PoolConfig(kind="serial", batch=8))
    path = result.save(tmp_path / "student.der")
    state, own = de_ray.load(path), result.student.cpu().state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
    sample = inputs()
    with torch.no_grad():
        assert torch.equal(de_ray.load(path, model=build())(sample), result.student(sample))


@pytest.mark.parametrize("ratio", [3.0, 5.0])
def test_buffers_of_a_file_of_a_given_size_are_those_that_were_measured(ratio):
    """Several files may be made and an earlier one kept, each with its own rounding of biases and buffers."""
    torch.manual_seed(0)
    result = de_ray.compress(Imported(), torch.randn(40, 12), target_ratio=ratio,
                             evolution=EvolutionConfig(cycles=2, population=4),
                             refit=RefitConfig(steps=3, final_steps=3, batch=8),
                             quantization=QuantizationConfig(bits=3, refit_steps=3), pool=PoolConfig("serial", batch=8))
    state = codec.decode(result.data)
    assert all(torch.equal(state[key], value) for key, value in result.student.state_dict().items())


@pytest.mark.parametrize("method", ["distill", "least_squares", "obs"])
@pytest.mark.parametrize("name", ["attention", "auxiliary", "recurrent", "decoder"])
def test_a_layer_that_is_never_called_is_compressed_by_every_criterion_and_refit(name, method):
    """Attention reads its projections' weights without calling a module, as recurrent layers do."""
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    criteria = ["magnitude", "wanda", "fisher", "obs", "kronecker"]
    evolution = EvolutionConfig(cycles=2, population=6, criteria=criteria, surrogate="kronecker", oversample=2)
    result = de_ray.compress(build(), inputs(), sparsity=0.5, evolution=evolution,
                             refit=RefitConfig(method=method, steps=3, final_steps=3, batch=8),
                             quantization=QuantizationConfig(bits=2, refit_steps=3), pool=PoolConfig("serial", batch=8))
    assert result.report["sparsity"] >= 0.5
    assert all(value.isfinite().all() for value in result.student.state_dict().values())


class Variational(nn.LSTM):
    """Dropout of somebody's own."""

    def forward(self, x: Tensor) -> tuple:
        return super().forward(functional.dropout(x, 0.5, self.training))


def test_recurrent_layers_that_cudnn_goes_back_through_give_what_they_gave():
    network, inputs = nn.ModuleDict({"plain": Recurrent(), "own": Variational(8, 4)}).eval(), torch.randn(6, 5, 8)
    before = network["plain"](inputs), network["own"](inputs)[0]
    make_differentiable(network)
    assert [name for name, module in network.named_modules() if module.training] == ["plain.memory"]
    assert torch.equal(network["plain"](inputs), before[0]) and torch.equal(network["own"](inputs)[0], before[1])


def test_a_tied_weight_takes_its_bytes_once():
    network = TiedLayers()
    shared = Student(network, find_layers(network)).shared()
    assert shared == {"second.weight": "first.weight"}
    weight = codec.QuantizedTensor("first.weight", torch.randint(-3, 4, (60, 60)).int().numpy(), step=1.0)
    once, tied = codec.encode([weight]), codec.encode([weight], shared=shared)
    assert len(tied) < len(once) + 25
    assert torch.equal(codec.decode(tied)["second.weight"], codec.decode(once)["first.weight"])
    assert codec.inspect(tied).tensors[1].weights == 0


def test_a_name_for_a_tensor_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="second.weight is said to be 'first.weight'"):
        codec.encode([], shared={"second.weight": "first.weight"})


def test_candidates_of_a_layer_whose_samples_lie_elsewhere_are_not_stacked():
    network = Attention().eval().requires_grad_(False)
    program = capture(network, torch.randn(8, 5, 8))
    weights = [network.inner.linear1.weight, network.inner.self_attn.out_proj.weight, network.last.weight]
    readers = [program.readers(weight) for weight in weights]
    assert Suffix(program, {2: readers[2]}).stackable
    assert not Suffix(program, {0: readers[0], 1: readers[1]}).stackable


class Causal(nn.Module):
    """A language model of PyTorch's own transformers, which look at masks to see whether they are causal."""

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(30, 8), nn.Linear(8, 30)
        layer = getattr(nn, f"Transformer{stack}Layer")(8, 2, 16, dropout=0.0, batch_first=True)
        self.inner = getattr(nn, f"Transformer{stack}")(layer, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.inner(x, mask) if isinstance(self.inner, nn.TransformerEncoder) else self.inner(x, x, mask)
        return self.last(hidden).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("stack", ["Encoder", "Decoder"])
def test_transformers_with_causal_masks_are_captured_and_stay_causal(stack):
    network = Causal(stack).eval().requires_grad_(False)
    tokens = torch.randint(30, (6, 9), generator=torch.Generator().manual_seed(0))
    found = capture(network, tokens).outputs(tokens)
    torch.testing.assert_close(found, network(tokens))
    if stack == "Encoder":  # the other one's memory sees everything
        later = torch.cat([tokens[:, :5], tokens[:, 5:].roll(1, 0)], 1)
        torch.testing.assert_close(capture(network, tokens).outputs(later)[..., :5], found[..., :5])
