"""Layers that a network in eval mode never reads: heads that serve training alone, towers that a wrapper leaves out.

Zeroing them costs nothing, so that they would take the zeros that were asked for of the others.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from de_ray.problem.base import Layer
from de_ray.problem.outputs import flatten
from de_ray.problem.probing import PART
from de_ray.problem.reads import parameter_reads

log = logging.getLogger(__name__)

INPUTS = 128
"""Inputs, at most, of all passes."""


@torch.no_grad()
def empty_idle(teacher: nn.Module, layers: Sequence[Layer], inputs: Tensor) -> tuple[Layer, ...]:
    """Zero the layers that no pass reads, with a warning; returns the others.

    Args:
        teacher: in eval mode, on the CPU; changed in place.
        layers: of the network.
        inputs: [M, ...], the first `INPUTS` of which are looked at: what only some of them reach is read.
    """
    idle = {layer: teacher.get_parameter(layer.parameter) for layer in layers}
    for part in inputs[:INPUTS].split(PART):
        reads = parameter_reads(teacher, part)
        idle = {layer: weight for layer, weight in idle.items() if reads.misses(weight)}
        if not idle:
            break
    if len(idle) in (0, len(layers)):
        return tuple(layers)
    before, kept = flatten(teacher(inputs[:PART])), [weight.clone() for weight in idle.values()]
    for weight in idle.values():
        weight.zero_()
    if not all(map(torch.equal, before, flatten(teacher(inputs[:PART])))):  # read in ways that cannot be watched
        for weight, values in zip(idle.values(), kept, strict=True):
            weight.copy_(values)
        return tuple(layers)
    share = sum(layer.size for layer in idle) / sum(layer.size for layer in layers)
    log.warning("no pass in eval mode reads %s%s, %.0f %% of the weights that may be zeroed: they end as zeros, which "
                "do not count towards the sparsity; what exclude names stays as it is",
                ", ".join(layer.name for layer in list(idle)[:3]), ", ..." if len(idle) > 3 else "", 100 * share)
    return tuple(layer for layer in layers if layer not in idle)
