"""What of a divergence does not matter, in the divergence's own unit."""

from dataclasses import replace

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from de_ray.config import Config
from de_ray.problem.base import Output, Problem
from de_ray.problem.measure import mean_divergence

INPUTS = 16
"""Calibration inputs, at most, of which it is measured what a constant output costs."""


def with_negligible(problem: Problem, config: Config) -> Config:
    """The configuration whose `quantization.negligible` is the configured one times what a constant output would cost,
    where that is below 1.

    Squared errors are in the unit of the outputs' squares: of outputs of a thousandth any error would be negligible.

    Args:
        problem: its teacher on the device where it runs.
        config: the whole configuration.
    """
    scale = constant_divergence(problem, problem.calibration[:INPUTS])
    if not 0 < scale < 1:  # of a single input, any output is constant
        return config
    negligible = scale * config.quantization.negligible
    return replace(config, quantization=replace(config.quantization, negligible=negligible))


def constant_divergence(problem: Problem, inputs: Tensor) -> float:
    """Mean divergence of the teacher's outputs for inputs [N, ...] from their mean over the inputs of a pass."""
    return mean_divergence(problem, _Constant(problem.teacher), inputs)


class _Constant(nn.Module):
    """A network whose outputs are the means of another one's over the samples."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network

    def forward(self, inputs: Tensor) -> Output:
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.mean(0, keepdim=True).expand_as(leaf)
                                    if leaf.is_floating_point() and leaf.ndim else leaf, self._network(inputs))
