"""Matrices that a network keeps in buffers and multiplies its values with, as networks translated from ONNX do."""

import logging

import torch
from torch import Tensor, nn

from de_ray.problem.outputs import flatten
from de_ray.problem.probing import differ
from de_ray.problem.reads import tensor_reads

log = logging.getLogger(__name__)


@torch.no_grad()
def promote(teacher: nn.Module, sample: Tensor) -> None:
    """Make parameters of such buffers, in place and under their names, so that they are zeroed, quantized and counted.

    Where the network does not work so, one that assigns them in its forward pass say, they stay what they are.

    Args:
        teacher: in eval mode, on the CPU.
        sample: [N, ...] inputs that it accepts.
    """
    found = [(module, name, buffer) for module in teacher.modules() for name, buffer in module._buffers.items()
             if buffer is not None and name not in module._non_persistent_buffers_set and buffer.is_floating_point()
             and sum(length > 1 for length in buffer.shape) > 1]
    if not found:
        return
    reads = tensor_reads(teacher, (buffer for *_, buffer in found), sample)
    found = [(module, name, buffer) for module, name, buffer in found if reads.multiplies(buffer)]
    if not found:
        return
    expected = flatten(teacher(sample))
    parameters: dict[int, nn.Parameter] = {}
    for module, name, buffer in found:
        del module._buffers[name]
        parameter = parameters.setdefault(id(buffer), nn.Parameter(buffer, requires_grad=False))
        module.register_parameter(name, parameter)
    try:
        same = not any(differ(one, other) for one, other in zip(expected, flatten(teacher(sample)), strict=True))
    except Exception as error:  # noqa: BLE001 - the user's code
        log.info("buffers stay what they are: %s", error)
        same = False
    if same:
        log.info("matrices in %d buffers are compressed as parameters are", len(found))
        return
    for module, name, buffer in found:
        module._parameters.pop(name, None)
        module.register_buffer(name, buffer)
