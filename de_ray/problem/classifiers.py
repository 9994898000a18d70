"""The built-in classifiers' architectures, untrained, and their metric.

Plain `nn.Sequential`s with short names: any graph capture reads them, and state-dict keys stay small in a file.

    digits_mlp  64-256-128-10, 50,826 parameters
    lenet300    784-300-100-10, 266,610 parameters (LeCun et al., Gradient-based learning applied to document
                recognition, 1998)
    lenet5      the Caffe form 20-50-500-10 with one ReLU, 431,080 parameters
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*sizes: int) -> nn.Sequential:
    """Fully connected layers fc1, fc2, ... with ReLU between them.

    Args:
        sizes: of the input, the hidden layers and the output, at least two.

    Returns:
        A module from [N, ...] with sizes[0] values a sample to logits [N, sizes[-1]].
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        parts[f"fc{number}"] = nn.Linear(inputs, outputs)
        if number < len(sizes) - 1:
            parts[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(parts)


class ChannelsLast(nn.Module):
    """Lays images out channels last, in which a CPU convolves LeNet-5's few channels twice as fast."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W], the same values."""
        return inputs.to(memory_format=torch.channels_last)


def lenet5() -> nn.Sequential:
    """LeNet-5 as Caffe has it: [N, 1, 28, 28] -> logits [N, 10]."""
    return nn.Sequential(OrderedDict(
        layout=ChannelsLast(),
        conv1=nn.Conv2d(1, 20, 5),  # [N, 20, 24, 24]
        pool1=nn.MaxPool2d(2),  # [N, 20, 12, 12]
        conv2=nn.Conv2d(20, 50, 5),  # [N, 50, 8, 8]
        pool2=nn.MaxPool2d(2),  # [N, 50, 4, 4]
        flatten=nn.Flatten(),  # [N, 800]
        fc1=nn.Linear(800, 500),
        relu1=nn.ReLU(),
        fc2=nn.Linear(500, 10),
    ))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "digits_mlp": lambda: mlp(64, 256, 128, 10),
    "lenet300": lambda: mlp(784, 300, 100, 10),
    "lenet5": lenet5,
}


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Percent of `inputs` [N, ...] whose largest logit is the one of `labels` [N], on the model's device."""
    device = next(model.parameters()).device
    correct = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum())
                  for x, y in zip(inputs.split(batch), labels.split(batch), strict=True))
    return 100 * correct / len(labels)
