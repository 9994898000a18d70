"""Batch norm folded in place: the architecture, and so the state dict's keys, stay as they are.

In eval mode batch norm is y = a (x - m) + b with a = w / sqrt(v + eps). Behind a convolution or linear layer
x = W i + c that nothing else reads, W becomes a W, c becomes 0, and the batch norm keeps only its shift:
w = 1, m = 0, v = 1 - eps, b = b + a (c - m). Elsewhere a batch norm keeps its slope as well, w = a. Either way
four vectors of statistics become one or two that say something, and layers have the scale with which they act.
"""

import inspect
import logging
from collections import Counter
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from de_ray.problem.layers import PRODUCTS

log = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Exact types only, here and below: a subclass may compute something else.


@torch.no_grad()
def fold_batch_norm(model: nn.Module, sample: Tensor) -> int:
    """Fold every batch norm of `model` that can be folded and simplify the others; outputs stay equal up to rounding.

    Batch norms without affine parameters or without running statistics, and ones that share tensors with another
    module, are left alone. A model that `torch.fx` cannot trace keeps its layers: its batch norms are simplified only.

    Args:
        model: in eval mode; changed in place.
        sample: [N, ...] inputs that it accepts.

    Returns:
        How many batch norms went into the layer before them.
    """
    uses = Counter(id(tensor) for module in model.modules()
                   for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None)
    norms = {name: module for name, module in model.named_modules()
             if type(module) in NORMS and module.affine and module.running_var is not None
             and _unshared(module, ("weight", "bias", "running_mean", "running_var"), uses)}
    if not norms:
        return 0
    pairs = {norm: layer for norm, layer in _pairs(model, norms, uses).items()
             if _by_channel(model, sample, norms[norm], model.get_submodule(layer))}
    for name, norm in norms.items():
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()  # [C]
        mean = norm.running_mean.clone()
        if name in pairs:
            layer = model.get_submodule(pairs[name])
            layer.weight.mul_(slope.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                mean -= layer.bias
                layer.bias.zero_()
            norm.weight.fill_(1)
        else:
            norm.weight.copy_(slope)
        norm.bias.sub_(slope * mean)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    return len(pairs)


def _unshared(module: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> bool:
    tensors = {**module._parameters, **module._buffers}
    return all(name in tensors and (tensors[name] is None or uses[id(tensors[name])] == 1) for name in names)


def _pairs(model: nn.Module, norms: dict[str, nn.Module], uses: Counter[int]) -> dict[str, str]:
    """Batch norm -> the layer whose only reader it is, both called once; {} for a model that cannot be traced."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(model.forward).parameters.items()
                if parameter.default is not parameter.empty}
    try:
        graph = fx.Tracer().trace(model, concrete_args=defaults)
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies: anything may come out of it
        log.info("batch norm stays apart from its layers: torch.fx cannot trace the model (%s)", error)
        return {}
    names = {id(module): name for name, module in model.named_modules()}  # one name for modules that have several
    module_of = {node: names[id(model.get_submodule(node.target))] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(module_of.values())
    # Tensors that forward reads by itself, past their modules.
    read = {id(attrgetter(node.target)(model)) for node in graph.nodes if node.op == "get_attr"}
    pairs = {}
    for node, norm in module_of.items():
        before = node.args[0] if node.args else None
        if norm not in norms or not isinstance(before, fx.Node) or before not in module_of or len(before.users) != 1:
            continue
        layer = module_of[before]
        module = model.get_submodule(layer)
        if (type(module) in PRODUCTS and calls[layer] == calls[norm] == 1
                and _unshared(module, ("weight", "bias"), uses)
                and not {id(module.weight), id(module.bias)} & read):
            pairs[norm] = layer
    return pairs


def _by_channel(model: nn.Module, sample: Tensor, norm: nn.Module, layer: nn.Module) -> bool:
    """Whether the layer's output units lie along dimension 1, where batch norm looks for channels.

    A Linear layer on [N, L, D] puts them last, and they may be as many as L.
    """
    dimensions = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: dimensions.append(inputs[0].ndim))
    model(sample)
    hook.remove()
    return dimensions == [layer.weight.ndim]
