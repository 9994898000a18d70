import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from de_ray.problem.fold import fold_batch_norm


def lively(model: nn.Module) -> nn.Module:
    """Statistics and slopes as after training, some negative or zero, in place of the neutral ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor, generator=generator)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.1, 3, generator=generator)
            if module.weight is not None:
                module.weight.data[0] = 0
    return model.eval()


def check(model: nn.Module, sample: torch.Tensor, folded: int) -> nn.Module:
    """Fold a copy: outputs equal up to rounding, `folded` pairs, and the keys and shapes of the state dict kept."""
    lively(model)
    result = copy.deepcopy(model)
    assert fold_batch_norm(result, sample) == folded
    with torch.no_grad():
        torch.testing.assert_close(result(sample), model(sample), rtol=1e-4, atol=1e-5)
    model.load_state_dict(result.state_dict())  # strict: the user's own class takes it
    return result


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=2), nn.BatchNorm2d(4)
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        x = functional.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        x = x + self.bn2(y) + y  # bn2 is not the only reader
        return self.bn3(x if scale is None else x * scale)


def test_batch_norm_behind_a_layer_goes_into_it_and_keeps_a_shift():
    model = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                                nn.BatchNorm1d(5)), torch.randn(6, 3, 4, 4), folded=2)
    for layer, norm in ((model[0], model[1]), (model[4], model[5])):
        assert norm.weight.eq(1).all()
        assert norm.running_mean.eq(0).all()
        assert norm.running_var.eq(1 - norm.eps).all()
        assert layer.bias.eq(0).all()
        assert layer.weight[0].eq(0).all()  # its slope was 0


def test_only_a_sole_reader_is_folded_and_the_others_are_simplified():
    model = check(Residual(), torch.randn(2, 3, 5, 5), folded=1)
    assert model.bn1.weight.eq(1).all()
    for norm in (model.bn2, model.bn3):
        assert not norm.weight.eq(1).all()
        assert norm.running_mean.eq(0).all()


def test_a_layer_called_twice_keeps_its_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.conv(self.conv(x)))

    model = Twice()
    weight = model.conv.weight.clone()
    assert check(model, torch.randn(2, 3, 4), folded=0).conv.weight.equal(weight)


def test_a_weight_that_forward_reads_by_itself_is_kept():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.fc(x)) + functional.linear(x, self.fc.weight)

    check(Peeks(), torch.randn(4, 3), folded=0)


def test_a_linear_layer_whose_units_are_not_the_channels_is_kept():
    # [N, L, D] with L = D: batch norm works along L, the layer's units lie along D.
    check(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 4, 3), folded=0)


def test_a_network_that_cannot_be_traced_is_simplified_only():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else self.bn(self.conv(-x))

    model = check(Branches(), torch.randn(2, 3, 4), folded=0)
    assert model.bn.running_mean.eq(0).all()


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norm_without_parameters_or_statistics_is_left_alone(options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))
    result = check(model, torch.randn(2, 3, 5, 5), folded=0)
    for name, value in model.state_dict().items():
        assert value.equal(result.state_dict()[name])


def test_layers_and_batch_norms_that_share_tensors_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(),
                          nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    model[5].bias = model[3].bias
    check(model, torch.randn(2, 3, 4, 4), folded=0)
