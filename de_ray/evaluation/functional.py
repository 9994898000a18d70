"""Exported graphs of which every operation just computes a result."""

import torch
from torch import Tensor, fx

from de_ray.evaluation.operations import aten

_FRESH = {aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
          aten.linear, aten.batch_norm, aten.layer_norm, aten.group_norm, aten.add, aten.sub, aten.mul, aten.div,
          aten.cat}
"""Operations whose result shares memory with nothing else. Others may give back what they were given, as dropout does
in eval mode, without telling of it."""
_OUT_OF_PLACE = {getattr(aten, f"{name}_"): getattr(aten, name) for name in (
    "relu", "relu6", "leaky_relu", "silu", "hardswish", "hardsigmoid", "hardtanh", "elu", "celu", "selu", "mish",
    "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "dropout", "add", "sub", "mul", "div")}
"""Operations that write to their first argument alone, and those that compute the same of tensors of one type."""
_OF_NUMBERS = {"_operator", "math", "torch"}
"""Modules of what computes sizes and takes results apart; operations with graphs of their own have other ones."""


def make_functional(graph: fx.Graph) -> bool:
    """Put in-place operations out of place where nobody could tell the two apart, and leave out what nobody reads.

    This is for what most networks have: activations and sums that take the place of a layer's result. PyTorch makes any
    graph functional, by tracing it once more, which takes as long as the first time.

    Args:
        graph: as `torch.export` makes it; changed in place.

    Returns:
        Whether no operation of the graph changes anything, nor has graphs of its own.
    """
    fresh: set[fx.Node] = set()
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _OUT_OF_PLACE:
            alone = _is_alone(node, fresh)
            if alone or _is_idle(node):
                node.target = getattr(_OUT_OF_PLACE[packet], node.target._overloadname)
            if alone:
                fresh.add(node)
        elif packet in _FRESH:
            fresh.add(node)
    if not all(map(_changes_nothing, graph.nodes)):
        return False
    graph.eliminate_dead_code()
    return True


def _is_alone(node: fx.Node, fresh: set[fx.Node]) -> bool:
    """Whether what an operation changes is read by nothing else, and no type of a tensor is lost in it."""
    changed = node.args[0]
    types = {value.dtype for value in (one.meta["val"] for one in node.all_input_nodes) if isinstance(value, Tensor)}
    return changed in fresh and len(changed.users) == 1 and len(types) == 1


def _is_idle(node: fx.Node) -> bool:
    """Whether it is dropout in eval mode."""
    return node.target == aten.dropout_.default and not node.args[2]


def _changes_nothing(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target.__module__ in _OF_NUMBERS
    if node.target == aten.batch_norm.default:  # it does not tell that it changes running statistics
        _, _, _, statistics, _, by_batch, *_ = node.args
        return statistics is None or not by_batch
    return not node.target._schema.is_mutable
