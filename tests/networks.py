"""Small networks and problems that several tests share."""

import torch
from torch import Tensor, nn

from de_ray.problem.base import Problem
from de_ray.problem.custom import problem_from_model


class Branchy(nn.Module):
    """Convolutions with a skip, groups, stride, dilation, a batch norm and two heads in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding="valid")
        self.head = nn.Linear(6, 5)
        self.scale = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.grouped(x))
        x = self.down(x).mean((2, 3))
        return {"classes": self.head(x), "scale": self.scale(x)}


def branchy_problem(divergence: str = "mse", samples: int = 40) -> Problem:
    """`Branchy` with random weights and inputs."""
    torch.manual_seed(0)
    model = Branchy()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return problem_from_model(model, torch.randn(samples, 3, 9, 9), divergence=divergence)


def mlp_problem(samples: int = 200) -> Problem:
    """A two-layer perceptron with random weights under kl."""
    torch.manual_seed(0)
    return problem_from_model(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)), torch.randn(samples, 12))


def small_cfg(classes: int) -> str:
    """A Darknet configuration of two convolutions and one head of two anchors."""
    return f"""[net]
[convolutional]
filters=4
size=3
stride=4
pad=1
activation=leaky
[convolutional]
filters={2 * (5 + classes)}
size=1
stride=8
activation=linear
[yolo]
mask=0,1
anchors=10,14, 23,27
classes={classes}
num=2
"""


class Counts(nn.Module):
    """Counts its own passes."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 4)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layer(x)
