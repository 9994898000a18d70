"""Which modules of a network have weights that may be zeroed."""

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from de_ray.problem.base import Layer

ZEROABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The layers that `include` and not `exclude` name, in the order of `named_modules`.

    A candidate is a Linear, Conv1d, Conv2d or Conv3d (subclasses too) whose weight is a parameter of its own: not
    recomputed from others (weight norm), and not tied to a module of another kind, an embedding say, which zeroing
    would change too. A module, or a weight, that is used in several places counts once, under its first name.

    Args:
        model: the network.
        include, exclude: globs of module names; each must match a candidate.

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
                         f"none of the Linear and Conv1d/2d/3d layers ({', '.join(names) or 'there are none'})")
    return layers


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


def _candidates(model: nn.Module) -> list[Layer]:
    owners: dict[int, list[nn.Module]] = defaultdict(list)  # by parameter identity
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].append(module)
    found, seen = [], set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, ZEROABLE) or weight is None or not weight.numel() or id(weight) in seen:
            continue
        if all(isinstance(owner, ZEROABLE) for owner in owners[id(weight)]):
            seen.add(id(weight))
            found.append(Layer(name, tuple(weight.shape)))
    return found
