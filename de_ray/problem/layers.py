"""Which weights of a network may be zeroed."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from de_ray.problem.base import Layer

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose rows are multiplied with what they are called with."""
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose rows are looked up. They stay dense: some inputs do not show what rows are worth that others need."""
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Modules whose `weight` scales by element, in as many dimensions as the inputs have."""
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Attention's own parameters; its output projection is a Linear."""


def find_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The layers that `include` and not `exclude` name, in the order of `named_modules`.

    Candidates are the weights of Linear, convolutions and transposed convolutions of one to three dimensions, the
    projections of MultiheadAttention, the matrices of RNN, LSTM, GRU and their cells, and the parameter `weight` of
    other modules where it is a matrix or more; subclasses too. Not those of normalizations and embeddings, nor what is
    tied to one, nor what is recomputed from others (weight norm). A module, or a weight, that is used in several
    places counts once, under its first name.

    Args:
        model: the network.
        include, exclude: globs of `Layer.name`; each must match a candidate.

    Raises:
        ValueError: for a pattern that matches nothing, when no layer is left, and for weights that are not finite.
    """
    check_finite(model)
    candidates = _candidates(model)
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


def told_of_recomputed(model: nn.Module) -> str:
    """What to do about weights that weight norm and its like compute from other parameters; empty without them."""
    names = [name for name, module in model.named_modules() if isinstance(module, PRODUCTS)
             and "weight" not in module._parameters]
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
    return module if isinstance(module, PRODUCTS) else None


def _candidates(model: nn.Module) -> list[Layer]:
    refused = {id(parameter) for module in model.modules() for name, parameter in module._parameters.items()
               if parameter is None or not parameter.numel() or not _may_be_zeroed(module, name)}
    found = []
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if id(weight) in refused:
                continue
            refused.add(id(weight))  # the next time that it is met
            key = None if name == "weight" else f"{path}.{name}" if path else name
            found.append(Layer(path if key is None else key, tuple(weight.shape), key))
    return found


def _may_be_zeroed(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module's own is a candidate."""
    if isinstance(module, nn.MultiheadAttention):
        return name in PACKED
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return name.startswith("weight_")
    if name != "weight" or isinstance(module, (*LOOKUPS, *NORMS)):
        return False
    shape = module._parameters[name].shape
    return isinstance(module, PRODUCTS) or sum(length > 1 for length in shape) > 1
