"""Networks that branch on values, share storage, checkpoint or keep other state: compressed, or refused in one line."""

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _python_dispatch as python_dispatch
from torch.utils.checkpoint import checkpoint

import de_ray
from de_ray import codec
from de_ray.__main__ import main
from de_ray.config import CRITERIA, EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.evaluation.capture import capture
from de_ray.evaluation.engine import Engine
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.augment import splice
from de_ray.problem.custom import problem_from_model
from de_ray.problem.measure import mean_divergence
from de_ray.student import Student

INPUTS = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(50, (48, 6), generator=torch.Generator().manual_seed(0))


def compress_quickly(model, inputs=INPUTS, refit=None, evolution=None, **arguments):
    return de_ray.compress(model, inputs,
                           evolution=evolution or EvolutionConfig(cycles=2, population=4, generations=1),
                           refit=refit or RefitConfig(steps=2, final_steps=2),
                           quantization=QuantizationConfig(refit_steps=2), divergence="mse", **arguments)


class Layers(nn.Module):
    """Two layers, to be called in odd ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Masked(Layers):
    def forward(self, x):
        hidden = self.a(x).relu()
        kept, chosen = torch.zeros_like(hidden), hidden.sum(1) > 2
        kept[chosen] = hidden[chosen] * 2
        return self.b(kept)


class Experts(nn.Module):
    """The third expert is called, but on nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 5) for _ in range(3))

    def forward(self, x):
        chosen, found = self.gate(x)[:, :2].argmax(1), x.new_zeros(len(x), 5)
        for index, expert in enumerate(self.experts):
            found[chosen == index] = expert(x[chosen == index])
        return found


class EarlyExit(Layers):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(16, 16)

    def forward(self, x):
        hidden = self.a(x).relu()
        if hidden.mean() > 0.29:
            hidden = self.c(hidden).relu()
        return self.b(hidden)


class Checkpointed(Layers):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.b, self.a(x).relu(), use_reentrant=self.reentrant)


class Empty(Layers):
    def forward(self, x):
        return {"scores": super().forward(x), "more": x.new_zeros(len(x), 0)}


class Headless(Layers):
    def __init__(self):
        super().__init__()
        self.none = nn.Linear(8, 0)

    def forward(self, x):
        return super().forward(x), self.none(x)


class Padded(nn.Module):
    """A transformer's layers on sequences of several lengths; the default of nested tensors stands."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x < 8))


class Ensemble(nn.Linear):
    """Three linear layers under one name."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, outputs, inputs) / 4)

    def forward(self, x):
        return torch.einsum("nd,erd->ner", x, self.weight).mean(1) + self.bias


class Pairs(nn.Module):
    """A layer whose rows have tens of thousands of weights, of whose inputs nothing is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 160), nn.Bilinear(160, 160, 2)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.second(hidden, hidden)


ALL = EvolutionConfig(cycles=2, population=8, generations=1, surrogate="kronecker", criteria=list(CRITERIA))


@pytest.mark.parametrize(("model", "inputs", "refit"), [
    (Padded, TOKENS, "distill"), (Padded, TOKENS, "least_squares"), (lambda: Ensemble(8, 6), INPUTS, "obs"),
    (lambda: Ensemble(8, 6), INPUTS, "least_squares"), (Pairs, INPUTS, "obs")])
def test_layers_whose_inputs_nobody_sees_take_every_criterion_and_refit(model, inputs, refit):
    result = compress_quickly(model(), inputs, bits=2, evolution=ALL,
                              refit=RefitConfig(method=refit, steps=2, final_steps=2))
    held = codec.decode(result.data)
    assert all(torch.equal(value, held[name]) for name, value in result.model.state_dict().items())


def test_padding_is_no_target_that_a_student_cannot_come_to():
    """Without gradients PyTorch gives zeros there, with them it does not."""
    problem = problem_from_model(Padded(), TOKENS, divergence="mse")
    with torch.no_grad():
        expected = problem.teacher(TOKENS)
    student = Student(problem.teacher, problem.layers)
    for weight in student.weights:
        weight.requires_grad_(True)
    assert (TOKENS < 8).any() and torch.allclose(student.module(TOKENS), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("model", "arguments"), [
    (Masked(), {}), (Experts(), {"bits": 2}), (Experts(), {"refit": RefitConfig(method="obs")}),
    (Experts(), {"refit": RefitConfig(method="least_squares")}),
    (EarlyExit(), {"refit": RefitConfig(method="least_squares")}), (Checkpointed(False), {}), (Empty(), {}),
    (Headless, {}),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value)[:40])
def test_the_file_of_an_odd_network_holds_its_student(model, arguments):
    result = compress_quickly(model() if isinstance(model, type) else model, **arguments)
    held = codec.decode(result.data)
    assert all(torch.equal(value, held[name]) for name, value in result.model.state_dict().items())
    assert result.report["sparsity"] > 0.8


class Tied(nn.Module):
    def __init__(self, by_data):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        if by_data:
            self.head.weight.data = self.embedding.weight.data
        else:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)).relu().mean(1))


@pytest.mark.parametrize("by_data", [True, False])
def test_tied_weights_stay_tied_however_they_were(tmp_path, by_data):
    result = compress_quickly(Tied(by_data), TOKENS)
    path = result.save(tmp_path / "tied.der")
    loaded = de_ray.load(path, model=Tied(by_data))
    assert torch.equal(loaded(TOKENS), result.model(TOKENS))
    main(["decode", str(path), "-o", str(tmp_path / "tied.safetensors")])


class WithoutGradient(Layers):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Decided(Layers):
    def forward(self, x):
        return super().forward(x).argmax(1).float()


class Force(Layers):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0]


class Partial(Layers):
    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "a." not in name}


class Extra(Layers):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


class Squeezed(Layers):
    def forward(self, x):
        return super().forward(x)[:, :1].squeeze()


class Stateful(Layers):
    def forward(self, x):
        state = getattr(self, "state", None)
        hidden = self.a(x).tanh()
        self.state = hidden if state is None or len(state) != len(x) else hidden + 0.5 * state
        return self.b(self.state)


class Turned(Layers):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(16, 8, bias=False)
        self.c.weight = nn.Parameter(self.a.weight.data.t())

    def forward(self, x):
        return super().forward(self.c(self.b.weight.new_ones(len(x), 16)) + x)


class Scripted(Layers):
    def __init__(self):
        super().__init__()
        self.a = torch.jit.script(nn.Linear(8, 16))


class Watched(Layers):
    """Multiplies with a matrix of its own, and fails where somebody watches its operations."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        if python_dispatch._len_torch_dispatch_stack():
            raise RuntimeError("watched")
        return super().forward(x @ self.own)


class Locked(Layers):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Siamese(nn.Module):
    """Lays halves of its inputs behind each other along the batch, and takes them apart again in one of several ways.

    With `apart` they are two calls: the same function.
    """

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.how = how

    def forward(self, x):
        left, right = x[:, :4], x[:, 4:]
        if self.how == "apart":
            left, right = self.a(left).relu(), self.a(right).relu()
        else:
            both = self.a(torch.cat([left, right])).relu()
            half = both.shape[0] // 2
            left, right = {"chunk": lambda: both.chunk(2), "split": lambda: both.split(x.shape[0]),
                           "half": lambda: (both[:half], both[half:]),
                           "view": lambda: both.view(2, x.shape[0], 32).unbind()}[self.how]()
        return self.c(self.b((left - right).abs()).relu())


@pytest.mark.parametrize("how", ["chunk", "split", "half", "view"])
def test_candidates_of_a_network_that_concatenates_samples_are_what_they_are_by_two_calls(how):
    found = []
    for which in ("apart", how):
        problem = problem_from_model(Siamese(which), INPUTS, divergence="mse")
        replica = Replica(ReplicaSetup(problem, 8, "cpu", 1))
        assert isinstance(replica._runner, Engine)
        generator = np.random.default_rng(0)
        candidates = [tuple(ZeroingSet(index, np.sort(generator.choice(layer.size, layer.size // 3, replace=False)))
                            for index, layer in enumerate(problem.layers) if some in (index, 3))
                      for some in (0, 1, 2, 3, 0, 1)]
        found.append(replica.evaluate(candidates, range(len(replica.batches))))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    assert (found[0] > 1e-4).all()


class LastToken(nn.Module):
    """Takes a sequence's last token by its number in the batch, as language models do that classify."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embedding = how, nn.Embedding(30, 16)
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, tokens):
        hidden = self.b(self.a(self.embedding(tokens)).relu()).cumsum(1)
        n, length, width = hidden.shape
        last = (tokens != 0).sum(1) - 1
        found = {"pair": lambda: hidden[torch.arange(n), last],
                 "flat": lambda: hidden.reshape(-1, width)[torch.arange(n) * length + last],
                 "select": lambda: hidden.reshape(-1, width).index_select(0, length * torch.arange(n) + last),
                 "gather": lambda: hidden.gather(1, last[:, None, None].expand(-1, 1, width))[:, 0]}[self.how]()
        return self.c(found)


@pytest.mark.parametrize("how", ["pair", "flat", "select"])
def test_candidates_of_a_network_that_numbers_its_samples_are_what_they_are_without(how):
    tokens = torch.randint(1, 30, (48, 10), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(torch.randint(2, 10, (48,), generator=torch.Generator().manual_seed(1))):
        tokens[row, length:] = 0
    found = []
    for which in ("gather", how):
        problem = problem_from_model(LastToken(which), tokens)
        replica = Replica(ReplicaSetup(problem, 8, "cpu", 1))
        assert isinstance(replica._runner, Engine)  # stacks them
        candidates = [(ZeroingSet(1, np.arange(count)),) for count in (20, 100, 300, 570)]
        candidates += [(ZeroingSet(0, np.arange(count)), ZeroingSet(2, np.arange(5))) for count in (30, 200)]
        found.append(replica.evaluate(candidates, range(len(replica.batches))))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
    assert len(np.unique(found[0])) == len(found[0])


class Renamed(Layers):
    """A module by two names, its weight tied to another module's besides."""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(16, 16)
        self.same, self.twin = self.c, nn.Linear(16, 16)
        self.twin.weight = self.c.weight

    def forward(self, x):
        return self.b(self.twin(self.same(self.a(x).relu())).relu())


def test_a_module_by_two_names_is_quantized_as_one(tmp_path):
    result = compress_quickly(Renamed())
    assert [layer["name"] for layer in result.report["layers"]] == ["a", "b", "c"]
    assert result.report["decoded_equals_student"]
    path = result.save(tmp_path / "student.der")
    assert torch.equal(de_ray.load(path, model=Renamed())(INPUTS), result.model(INPUTS))


class Versioned(Layers):
    """Refuses state dicts that do not say by which version of it they were made, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2, not {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_that_ask_for_the_version_of_a_state_dict_are_told(tmp_path):
    path = compress_quickly(Versioned()).save(tmp_path / "student.der")
    assert de_ray.load(path, model=Versioned())(INPUTS).shape == (48, 3)


class Keeps(Layers):
    """Leaves what it computed to nobody, in a buffer of its own."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("kept", torch.zeros(64 if how == "written" else 1, 3))

    def forward(self, x):
        found = super().forward(x)
        if self.how == "written":
            self.kept[:len(x)] = found
            return self.kept[:len(x)].clone()
        self.kept = found.detach()
        return found


class Longest(nn.Module):
    """Its output is as long as the longest sample of a batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.last(self.embedding(tokens))[:, :int((tokens > 0).sum(1).max())]


def test_outputs_as_long_as_a_batchs_longest_sample_are_followed_without_augmentation():
    tokens = torch.where(torch.arange(6) < torch.arange(40)[:, None] % 5 + 1, TOKENS[:40].clamp(min=1), 0)
    refit = RefitConfig(steps=2, final_steps=2, batch=3)
    result = compress_quickly(Longest(), tokens, refit, sparsity=0.5, bits=4, augment="none")
    assert result.report["decoded_equals_student"]


class Categories(nn.Module):
    """Columns of a table: indices of its own range first."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(4, 8), nn.Linear(8 + 5, 3)

    def forward(self, x):
        return self.last(torch.cat([self.embedding(x[..., 0].long()), x[..., 1:]], -1)).flatten(1)


class Centred(Categories):
    """Mixes its samples."""

    def forward(self, x):
        found = super().forward(x)
        return found - found.mean(0)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples_of_columns_that_are_no_others_are_evaluated_in_parts(samples):
    table = torch.cat([torch.arange(samples)[:, None] % 4, torch.full((samples, 5), 1e6)], 1)
    network = Categories().eval()
    torch.testing.assert_close(capture(network, table).outputs(table), network(table))
    if samples > 1:  # one alone does not show it
        with pytest.raises(ValueError, match="samples influence each other"):
            capture(Centred().eval(), table)


def test_what_has_four_axes_and_is_no_image_is_spliced_all_the_same(caplog):
    inputs = torch.cat([torch.randint(4, (30, 3, 7, 1)).float(), torch.randn(30, 3, 7, 5) + 10], -1)
    problem = problem_from_model(Categories(), inputs, divergence="mse", augment="auto")
    assert problem.augment.func is splice and "composed of each other" not in caplog.text
    assert problem.calibration[..., 0].unique().numel() <= 4


@pytest.mark.parametrize(("inputs", "shape", "told"), [
    (torch.randn(20, 9, 8), (9, 3), True), (torch.randn(20, 8, 9), (3, 9), False),
    (torch.randint(5, (20, 2, 9)), (9, 3), True), (torch.randn(20, 72), (9, 3), False),
])
def test_classes_that_seem_to_lie_last_are_told_of(inputs, shape, told, caplog):
    network = nn.Sequential(nn.Flatten(), Floats(), nn.Linear(inputs[0].numel(), 27), nn.Unflatten(1, shape))
    problem_from_model(network, inputs)
    assert ("kl takes dimension 1 for the classes" in caplog.text) == told


class Floats(nn.Module):
    def forward(self, x):
        return x.float()


class Anything(Layers):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_network_of_any_signature_is_evaluated_in_parts():
    problem = problem_from_model(Anything(), INPUTS, divergence="mse")
    assert isinstance(Replica(ReplicaSetup(problem, 8, "cpu", 1))._runner, Engine)


class Sparse(Layers):
    def __init__(self, layout):
        super().__init__()
        self.register_buffer("adjacency", layout(torch.eye(8)))


class Complex(Layers):
    def forward(self, x):
        return super().forward(x), torch.fft.fft(x)


class Beside(Layers):
    """What it returns, and more, as models with caches do."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def forward(self, x):
        return {"logits": super().forward(x), "more": self.more}


class Pair(Layers):
    def forward(self, x, y):
        return super().forward(x + y)


def meta():
    with torch.device("meta"):
        return Layers()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("model", "message"), [
    (lambda: Keeps("written"), "nothing kept for the next pass but what is detached"),
    (lambda: Keeps("replaced"), r"kept is \[\d+, 3\] before a pass .* persistent=False"),
    (WithoutGradient, "no gradient with respect to its layers' weights"), (Decided, "rather than their argmax"),
    (lambda: Checkpointed(True), "use_reentrant=False"), (Force, "in torch.inference_mode"),
    (Partial, r"state dict lacks a\.weight, a\.bias"), (Extra, "_extra_state is a dict: expected a tensor"),
    (lambda: torch.compile(Layers()), "the module within, `model._orig_mod`"),
    (lambda: nn.Sequential(torch.compile(Layers())), "model.0='OptimizedModule': .* `model.0._orig_mod`"),
    (lambda: Beside(object()), r"output\['more'\] is a object: expected tensors, .* `return self\.model\(x\)\.logits`"),
    (lambda: Beside(torch.zeros(3)), r"into output\['more'\] of \[3\]: expected 8 samples in front; a module around"),
    (Scripted, "of which TorchScript has compiled no part"), (Stateful, "no state may be carried"),
    (Turned, r"a\.weight and c\.weight are views of one memory"),
    (Squeezed, r"one input \[1, 8\] into \[\]"), (Locked, r"expected a module that copy\.deepcopy copies"),
    (lambda: nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 4)), "no layer to zero"),
    (lambda: Sparse(torch.Tensor.to_sparse), "adjacency is sparse .* persistent=False"),
    (lambda: Sparse(torch.Tensor.to_sparse_csr), "adjacency is sparse .* persistent=False"),
    (meta, r"a\.weight is on the meta device"), (lambda: nn.LazyLinear(3), "weight has no shape yet"),
    (Complex, r"output\[1\] is complex64: .*view_as_real"),
    (Pair, "several arguments go into a tuple, or into a dict by name"),
])
def test_what_cannot_be_compressed_is_one_error_before_the_search(model, message):
    with pytest.raises(ValueError, match=message):
        compress_quickly(model())


def language_model():
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))


def test_classes_of_a_language_model_in_the_last_dimension_are_told_of():
    with pytest.raises(ValueError, match=r"kl takes dimension 1 for the classes: expected logits\.transpose\(1, 2\)"):
        problem_from_model(language_model(), TOKENS)
    problem_from_model(nn.Sequential(language_model(), Transposed()), TOKENS)
    problem_from_model(language_model(), TOKENS, divergence="mse")
    with pytest.raises(ValueError, match="as uint8 is taken for pixels"):
        problem_from_model(language_model(), TOKENS.to(torch.uint8))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Patches(nn.Module):
    """Scores of each patch of an image, or each frame of a sound, as they come from a layer or a norm."""

    def __init__(self, last):
        super().__init__()
        self.body, self.last = nn.Linear(16, 12), last

    def forward(self, x):
        found = self.last(self.body(x.flatten(1).unflatten(1, (-1, 16))))
        return {"loss": None, "logits": found}


@pytest.mark.parametrize("last", [nn.Linear(12, 5), nn.LayerNorm(12), nn.RMSNorm(12)])
@pytest.mark.parametrize("shape", [(20, 3, 8, 8), (20, 192)])
def test_classes_that_a_layer_or_norm_returns_in_the_last_dimension_are_told_of(last, shape):
    model, inputs = Patches(last), torch.randn(shape)
    with pytest.raises(ValueError, match=r"output\['logits'\] of \[8, 12, \d+\], and kl takes dimension 1 .*a module"):
        problem_from_model(model, inputs)
    problem_from_model(model, inputs, divergence="cosine")


def test_places_that_a_layer_returns_one_score_for_are_classes():
    problem = problem_from_model(Patches(nn.Linear(12, 1)), torch.randn(20, 192))
    assert [layer.name for layer in problem.layers] == ["body", "last"]


def test_matrices_of_a_network_that_cannot_be_watched_stay_dense():
    assert [layer["name"] for layer in compress_quickly(Watched()).report["layers"]] == ["a", "b"]


class Scaled(nn.Module):
    """Matrices of its own that are scaled before they are multiplied with: by a number, by rows, to length one; and
    what is no matrix, though it multiplies."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (16, 24), (3, 16)))
        self.gain, self.gate = nn.Parameter(torch.rand(16, 1) + 0.5), nn.Parameter(torch.rand(6, 24) + 0.5)

    def forward(self, x):
        hidden = functional.linear(x, self.a * 8**-0.5).relu()[:, None] * self.gate
        hidden = functional.linear(hidden.mean(1), self.gain * self.b / 24**0.5).relu()
        return functional.linear(hidden, functional.normalize(self.c, dim=1))


def test_matrices_that_are_scaled_before_the_product_are_layers(tmp_path):
    problem = problem_from_model(Scaled(), INPUTS, divergence="mse")
    assert [layer.name for layer in problem.layers] == ["a", "b", "c"]
    replica = Replica(ReplicaSetup(problem, 8, "cpu", 1))
    assert isinstance(replica._runner, Engine)
    candidates = [(ZeroingSet(index, np.arange(0, layer.size, 3)),) for index, layer in enumerate(problem.layers)]
    found = replica.evaluate(candidates, range(len(replica.batches)))
    for (candidate,), divergence in zip(candidates, found, strict=True):
        student = Student(problem.teacher, problem.layers)
        student.commit([candidate])
        assert divergence == pytest.approx(mean_divergence(problem, student.module, problem.calibration), rel=1e-4)
    result = compress_quickly(Scaled(), sparsity=0.5, bits=4)
    assert torch.equal(de_ray.load(result.save(tmp_path / "student.der"), model=Scaled())(INPUTS), result.model(INPUTS))


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ValueError, match="seed=18446744073709551616: expected 0 to"):
        compress_quickly(Layers(), seed=2**64)
