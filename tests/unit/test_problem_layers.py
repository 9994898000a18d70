import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from de_ray.problem.base import Layer
from de_ray.problem.layers import find_layers, product_of


class Wide(nn.Linear):
    """A user's subclass."""


def network() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3), nn.BatchNorm2d(4),
                         nn.Embedding(5, 6), nn.ModuleDict({"head": Wide(6, 7), "tail": nn.Linear(7, 1, bias=False)}))


def test_linear_and_convolutional_layers_are_found_in_order_with_their_shapes():
    assert find_layers(network()) == (
        Layer("0", (3, 2, 3)), Layer("1", (4, 2, 3, 3)), Layer("2", (4, 2, 3, 3, 3)), Layer("5.head", (7, 6)),
        Layer("5.tail", (1, 7)))


def test_other_modules_weights_are_found_under_their_own_names():
    model = nn.ModuleDict({
        "up": nn.ConvTranspose1d(3, 2, 4), "packed": nn.MultiheadAttention(4, 2),
        "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True), "cell": nn.GRUCell(2, 3),
        "lstm": nn.LSTM(2, 3, bidirectional=True, proj_size=1), "pairs": nn.Bilinear(2, 3, 4)})
    assert find_layers(model) == (
        Layer("up", (3, 2, 4)),
        Layer("packed.in_proj_weight", (12, 4), "packed.in_proj_weight"), Layer("packed.out_proj", (4, 4)),
        Layer("apart.q_proj_weight", (4, 4), "apart.q_proj_weight"),
        Layer("apart.k_proj_weight", (4, 3), "apart.k_proj_weight"),
        Layer("apart.v_proj_weight", (4, 5), "apart.v_proj_weight"), Layer("apart.out_proj", (4, 4)),
        Layer("cell.weight_ih", (9, 2), "cell.weight_ih"), Layer("cell.weight_hh", (9, 3), "cell.weight_hh"),
        *(Layer(f"lstm.{name}", shape, f"lstm.{name}") for name, shape in (
            ("weight_ih_l0", (12, 2)), ("weight_hh_l0", (12, 1)), ("weight_hr_l0", (1, 3)),
            ("weight_ih_l0_reverse", (12, 2)), ("weight_hh_l0_reverse", (12, 1)), ("weight_hr_l0_reverse", (1, 3)))),
        Layer("pairs", (4, 2, 3)))
    state = model.state_dict()
    assert all(state[layer.parameter].shape == layer.shape for layer in find_layers(model))


def test_a_network_that_is_a_layer_itself_has_a_weight():
    assert [layer.parameter for layer in find_layers(nn.LSTM(2, 3))] == ["weight_ih_l0", "weight_hh_l0"]
    assert [layer.parameter for layer in find_layers(nn.Linear(2, 3))] == ["weight"]


class Own(nn.Module):
    """Layers of somebody's own: matrices, expert by expert, and what is added, scales or is looked up."""

    def __init__(self):
        super().__init__()
        self.table, self.words, self.free = (nn.Parameter(torch.randn(9, 4)) for _ in range(3))
        self.places, self.scales = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 1))
        self.weight, self.experts = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(2, 4, 6))
        self.kernel, self.norm = nn.Parameter(torch.randn(5, 6, 2)), nn.LayerNorm((3, 4))
        self.bytes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        found = self.norm(self.table[x] + functional.embedding(x, self.words) + self.places) @ self.bytes.float()
        mixed = torch.einsum("nld,edk->nelk", found, self.experts).mean(1)
        mixed = mixed + torch.addmm(found.new_zeros(6), found.flatten(0, 1), self.weight).view(len(x), -1, 6)
        scaled = functional.conv1d(mixed.transpose(1, 2), self.kernel) * self.scales.sum()
        return scaled.mean(2) @ self.free[:5] @ self.words.t()


def test_a_sample_shows_what_other_modules_multiply_with():
    model, sample = nn.Sequential(Own(), nn.Linear(9, 2)), torch.randint(9, (5, 3))
    assert find_layers(model, sample=sample) == (
        Layer("0.free", (9, 4), "0.free"), Layer("0", (4, 6)), Layer("0.experts", (2, 4, 6), "0.experts"),
        Layer("0.kernel", (5, 6, 2), "0.kernel"), Layer("1", (2, 9)))
    assert [layer.name for layer in find_layers(model)] == ["1"]


def test_experts_in_one_grouped_product_are_layers():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 8, 4))

        def forward(self, x):
            ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
            return torch._grouped_mm(x, self.experts, offs=ends)

    model = nn.Sequential(nn.Linear(3, 8), Experts())
    assert find_layers(model, sample=torch.randn(6, 3)) == (Layer("0", (8, 3)),
                                                            Layer("1.experts", (2, 8, 4), "1.experts"))


def test_a_linear_layer_with_another_name_for_its_weight_is_one():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 2)})
    model.decoder = model["encoder"].weight
    assert [layer.name for layer in find_layers(model)] == ["encoder"]


def test_what_old_weight_norm_leaves_of_a_recurrent_layer_is_left_out():
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")
    assert [layer.name for layer in find_layers(normed)] == ["weight_ih_l0"]


def test_a_subclass_with_weights_of_its_own_is_no_product_of_rows_and_inputs():
    class Ensemble(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight = nn.Parameter(torch.randn(2, 3, 4))

    model = nn.Sequential(Ensemble(), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(2, 3), nn.ConvTranspose2d(2, 2, 3))
    layers = find_layers(model)
    assert [product_of(model, layer) for layer in layers] == [None, model[1], model[2], None]


def test_what_scales_or_is_looked_up_stays_dense():
    model = nn.Sequential(nn.LayerNorm((4, 5)), nn.RMSNorm((4, 5)), nn.Embedding(5, 6), nn.EmbeddingBag(5, 6),
                          nn.PReLU(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.Linear(5, 5))
    assert [layer.name for layer in find_layers(model)] == ["7"]


def test_globs_include_and_exclude():
    assert [layer.name for layer in find_layers(network(), ["5.*", "1"], ["*.tail"])] == ["1", "5.head"]


@pytest.mark.parametrize("patterns", [{"include": ["*", "fc9"]}, {"exclude": ["fc9"]}])
def test_a_pattern_that_matches_nothing_is_named_with_the_layers_there_are(patterns):
    with pytest.raises(ValueError, match=r"'fc9' matches no layer; there are 0, 1, 2, 5\.head, 5\.tail"):
        find_layers(network(), **patterns)


@pytest.mark.parametrize(("model", "patterns"), [(network(), {"exclude": ["*"]}), (network(), {"include": []}),
                                                 (nn.ReLU(), {})])
def test_no_layer_left_is_a_value_error(model, patterns):
    with pytest.raises(ValueError, match="no layer to zero"):
        find_layers(model, **patterns)


def test_a_layer_tied_to_an_embedding_is_left_out():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 6), "out": nn.Linear(6, 5), "free": nn.Linear(6, 5)})
    model["out"].weight = model["embed"].weight
    assert [layer.name for layer in find_layers(model)] == ["free"]


def test_a_shared_module_and_a_shared_weight_count_once():
    layer, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = layer.weight
    assert [found.name for found in find_layers(nn.Sequential(layer, nn.ReLU(), layer, twin))] == ["0"]


def test_a_weight_that_is_recomputed_from_others_is_left_out():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3),
                          nn.utils.spectral_norm(nn.Linear(3, 3)),
                          nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    model.eval()
    for sample in (None, torch.randn(5, 3)):  # spectral norm multiplies with what it computes the weight from
        assert [layer.name for layer in find_layers(model, sample=sample)] == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [
    nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
    nn.utils.parametrizations.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 2)])
def test_a_network_of_recomputed_weights_is_told_what_undoes_them(norm, layer):
    layer = copy.deepcopy(layer)
    with pytest.raises(ValueError, match=r"the weight of 0 is computed from .*remove_parametrizations.* prune\.remove"):
        find_layers(nn.Sequential(norm(layer), nn.ReLU()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value):
    model = network()
    with torch.no_grad():
        model[1].bias[2] = value
    with pytest.raises(ValueError, match=r"1\.bias holds NaN"):
        find_layers(model)


def test_a_mask_of_minus_infinity_is_told_the_way_out():
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("mask", torch.full((3, 3), -torch.inf))
    with pytest.raises(ValueError, match="teacher's mask holds .*persistent=False"):
        find_layers(model, ["*"], [])


def test_a_buffer_that_training_spoiled_is_no_mask():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model[1].running_var.fill_(torch.nan)
    with pytest.raises(ValueError, match="1.running_var holds NaN.*training went wrong"):
        find_layers(model, ["*"], [])
