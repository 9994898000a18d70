"""Which weights of a network may be zeroed."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from de_ray.problem.base import Layer
from de_ray.problem.reads import Reads, parameter_reads

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose rows are multiplied with what they are called with."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose rows are looked up. They stay dense, as do others' parameters in which rows are: calibration inputs do
not show what rows are worth that other inputs need."""
_PACKED = re.compile(r"(in|q|k|v)_proj_weight")  # attention's own parameters; its output projection is a Linear
_STATE = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
_LEFT = re.compile(r"weight\w*_(g|orig)")  # by weight norm, spectral norm and pruning as they were before parametrize


def find_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = (),
                sample: Tensor | None = None) -> tuple[Layer, ...]:
    """The layers that `include` and not `exclude` name, in the order of `named_modules`.

    Candidates are the weights of Linear, Bilinear, convolutions and transposed convolutions of one to three dimensions,
    the projections of MultiheadAttention and the matrices of RNN, LSTM, GRU and their cells; subclasses too. With a
    sample, other modules' parameters as well, where the network multiplies its values with them. Not those in which
    rows are looked up, nor what is tied to such a one, nor what is recomputed from others (weight norm). A module, or a
    weight, that is used in several places counts once, under its first name.

    Args:
        model: the network.
        include, exclude: globs of `Layer.name`; each must match a candidate.
        sample: [N, ...] inputs that the network accepts, on the CPU with it.

    Raises:
        ValueError: for a pattern that matches nothing, when no layer is left, and for weights that are not finite.
    """
    check_finite(model)
    candidates = _candidates(model, _reads(model, sample))
    names = [layer.name for layer in candidates]
    for key, patterns in (("problem.include", include), ("problem.exclude", exclude)):
        for pattern in patterns:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key}: {pattern!r} matches no layer; there are {', '.join(names)}")
    layers = tuple(layer for layer in candidates if _matches(layer.name, include) and not _matches(layer.name, exclude))
    if not layers:
        raise ValueError(f"no layer to zero: problem.include={list(include)} and problem.exclude={list(exclude)} leave "
                         f"none of the linear, convolutional, attention and recurrent layers "
                         f"({', '.join(names) or 'there are none'}){told_of_recomputed(model)}")
    return layers


def layer_weights(model: nn.Module, sample: Tensor | None = None) -> set[str]:
    """State-dict keys of all weights that may be zeroed, whatever `include` and `exclude` say; see `find_layers`."""
    return {layer.parameter for layer in _candidates(model, _reads(model, sample))}


def _reads(model: nn.Module, sample: Tensor | None) -> Reads:
    return Reads(()) if sample is None else parameter_reads(model, sample)


def told_of_recomputed(model: nn.Module) -> str:
    """What to do about weights that weight norm and its like compute from other parameters; empty without them."""
    names = [name for name, module in model.named_modules()
             if parametrize.is_parametrized(module) or any(map(_LEFT.fullmatch, module._parameters))]
    if not names:
        return ""
    more = ", ..." if len(names) > 1 else ""
    return (f"; the weight of {names[0]}{more} is computed from other parameters, which "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove undo")


def check_finite(model: nn.Module) -> None:
    """Raise `ValueError` naming the first parameter or buffer of `model` that holds NaN or infinite values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not value.isfinite().all():  # modules may keep other state there
            reason = "its training went wrong, or its file"
            if name not in parameters and not value.isnan().any():
                reason = "no file can hold it; a mask that is computed anew may be registered with persistent=False"
            raise ValueError(f"the teacher's {name} holds NaN or infinite values: {reason}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def product_of(model: nn.Module, layer: Layer) -> nn.Module | None:
    """The module that multiplies a layer's rows with what it is called with; None where there is no such module.

    The latter are attention, recurrent and transposed layers: nothing is known of their rows' inputs.
    """
    module = model.get_submodule(layer.name) if layer.key is None else None
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    elif isinstance(module, PRODUCTS):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    else:
        return None
    return module if layer.shape == shape else None  # a subclass may have as many weights as it likes


def _candidates(model: nn.Module, reads: Reads) -> list[Layer]:
    looked_up = {id(parameter) for module in model.modules() if isinstance(module, LOOKUPS)
                 for parameter in module._parameters.values()}
    found, seen = [], set()
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or id(weight) in seen or not weight.numel() or not weight.is_floating_point():
                continue
            if id(weight) in looked_up or reads.looks_up(weight):
                continue
            if _is_weight(module, name) or (_is_matrix(module, name) and reads.multiplies(weight)):
                seen.add(id(weight))
                key = None if name == "weight" else f"{path}.{name}" if path else name
                found.append(Layer(path if key is None else key, tuple(weight.shape), key))
    return found


def _is_weight(module: nn.Module, name: str) -> bool:
    """Whether a parameter is what modules of PyTorch's multiply with."""
    if isinstance(module, nn.MultiheadAttention):
        return _PACKED.fullmatch(name) is not None
    if isinstance(module, RECURRENT):
        return _STATE.fullmatch(name) is not None
    return name == "weight" and isinstance(module, (*PRODUCTS, *TRANSPOSED, nn.Bilinear))


def _is_matrix(module: nn.Module, name: str) -> bool:
    """Whether another parameter is a matrix or more, and nothing that a module's weight is computed from."""
    computed = isinstance(module, parametrize.ParametrizationList) or _LEFT.fullmatch(name)
    return not computed and sum(length > 1 for length in module._parameters[name].shape) > 1
