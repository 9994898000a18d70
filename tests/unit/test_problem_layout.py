"""Images channels last, where a network takes them so."""

import pytest
import torch
from torch import Tensor, nn

import de_ray
from de_ray.config import EvolutionConfig, QuantizationConfig, RefitConfig
from de_ray.problem.custom import problem_from_model


class Net(nn.Module):
    """Keeps the strides of what its second convolution is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        self.last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return self.head(self.flat(torch.relu(self.second(x))))

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Viewed(Net):
    """Takes no other layout."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class Strided(Net):
    """Takes any, and answers otherwise."""

    def flat(self, x: Tensor) -> Tensor:
        return x.as_strided((len(x), 64), (64, 1))


@pytest.mark.parametrize(("network", "last"), [(Net, True), (Viewed, False), (Strided, False)])
def test_convolutions_run_channels_last_where_the_network_takes_them_so(network, last):
    torch.manual_seed(0)
    model, inputs = network().eval(), torch.randn(20, 3, 8, 8)
    problem = problem_from_model(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(problem.teacher(inputs), model(inputs))
        assert problem.teacher.last is last and model.last is False, "the user's own stays as it is"


def test_images_on_the_way_through_a_network_without_convolutions_stay_as_they_are():
    torch.manual_seed(0)
    problem = problem_from_model(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.randn(20, 3, 4, 4))
    assert not problem.teacher._forward_pre_hooks


@pytest.mark.parametrize("network", [Net, Viewed])
def test_what_is_given_back_lays_nothing_out(network):
    torch.manual_seed(0)
    model, inputs = network().eval(), torch.randn(20, 3, 8, 8)
    result = de_ray.compress(model, inputs, evolution=EvolutionConfig(cycles=1, population=3),
                             refit=RefitConfig(steps=2, final_steps=2), quantization=QuantizationConfig(refit_steps=2),
                             device="cpu")
    assert not result.model._forward_pre_hooks and not result.student._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(result.model(inputs), result.student(inputs)) and result.model.last is False
