"""Exported graphs with in-place operations: what they compute, and which need no second tracing."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional

from de_ray.evaluation.capture import CaptureError, capture


class Network(nn.Module):
    """What a function makes of a linear layer and inputs."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.function(self.layer, x)


def in_place(layer, x):
    y = functional.relu_(layer(x))
    y += layer(x)
    y = functional.hardtanh_(torch.dropout_(y, 0.5, False))
    return torch.dropout_(y.flatten(1), 0.5, False) * 2


def of_a_view(layer, x):
    y = layer(x)
    y[:, :3].relu_()
    return y


def of_a_view_behind_dropout(layer, x):
    y = layer(x)
    part = torch.dropout_(y.flatten(1), 0.5, False).relu_()
    return y + part


def of_a_parameter_read_again(layer, x):
    scale = layer.bias.expand(x.shape[0], 6)
    return layer(x) * scale + torch.dropout_(scale, 0.5, False)


def read_before_and_after(layer, x):
    y = layer(x)
    view = y.view(-1, 2, 3)
    return functional.silu(y, inplace=True) + view.sum(1).repeat(1, 2)


def of_another_type(layer, x):
    return layer(x).add_(x.double())


def to_another_type(layer, x):
    return layer(x).gt_(0)


def by_position(layer, x):
    y = layer(x)
    y[:, 0] = 0
    return y


def traced(function):
    """How often PyTorch had to trace a network again; what the network makes of other inputs is checked."""
    torch.manual_seed(0)
    module = Network(function).eval()
    with mock.patch.object(ExportedProgram, "run_decompositions", autospec=True,
                           side_effect=ExportedProgram.run_decompositions) as again:
        program = capture(module, torch.randn(8, 6))
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(program.outputs(inputs), module(inputs))
    return again.call_count


@pytest.mark.parametrize("function", [in_place, of_a_parameter_read_again])
def test_operations_in_place_of_what_nobody_reads_are_captured_at_once(function):
    assert traced(function) == 0


@pytest.mark.parametrize("function", [of_a_view, of_a_view_behind_dropout, read_before_and_after, of_another_type,
                                      to_another_type, by_position])
def test_operations_in_place_that_somebody_sees_compute_what_they_did(function):
    assert traced(function) == 1


def test_a_norm_that_changes_its_statistics_is_refused_and_changes_none():
    class Normed(nn.BatchNorm1d):
        def forward(self, x):
            return functional.batch_norm(x, self.running_mean, self.running_var, training=True)

    module = Normed(4).eval()
    with pytest.raises(CaptureError, match="it changes its buffers"):
        capture(module, torch.randn(8, 4) + 3)
    assert module.running_mean.tolist() == [0.0] * 4
