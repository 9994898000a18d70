"""One pass of a model that nobody knows yet: whether it and its inputs fit each other."""

import inspect
import logging
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from de_ray.problem.divergence import TensorDivergence, kl
from de_ray.problem.outputs import ALONE, flatten, leaves
from de_ray.problem.packing import packing_of, unpacked

log = logging.getLogger(__name__)

PART = 8
"""Inputs of a pass."""
LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
"""Modules whose outputs have features, or classes, along the last axis."""
SUMS_TO_ONE = 1e-3
"""How far sums of probabilities may be from 1: of thousands, in half precision."""
ROUNDING = 1e-3
"""Largest difference of outputs that ought to be equal, relative to the output's largest magnitude."""


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape differ by more than rounding may make of them.

    What is not finite, such as the logits of what is masked, has to be the same.
    """
    finite = one.isfinite() & other.isfinite()
    same = (one == other) | (one.isnan() & other.isnan())
    if not (finite | same).all():
        return True
    one, other = one[finite], other[finite]
    return one.numel() > 0 and float((one - other).abs().max()) > ROUNDING * float(one.abs().max())


@torch.no_grad()
def probe(teacher: nn.Module, sample: Tensor, divergence: TensorDivergence) -> int:
    """Forward passes, so that a model and inputs that do not fit are told apart from everything later.

    A teacher that changes its inputs is given copies of them from then on.

    Returns:
        How many numbers an input is turned into.

    Raises:
        ValueError: the two do not fit each other, or the divergence is not defined on such outputs.
    """
    packing = packing_of(teacher)
    described = f"inputs {packing or f'{list(sample.shape)} of {sample.dtype}'}"
    given = sample.clone()
    try:
        with _LastAxes(teacher) as last:
            output = teacher(given)
            if not torch.equal(given, sample):
                # What it is given is stored, and will be given again.
                teacher.register_forward_pre_hook(_spare, prepend=True)
                output = teacher(sample)
    except Exception as error:  # the user's code on inputs that may not be meant for it
        raise ValueError(f"the model does not accept calibration {described}: "
                         f"{type(error).__name__}: {error}{_hint(error, teacher)}") from error
    named = dict(leaves(output))
    tensors = list(named.values())
    if not tensors:
        raise ValueError("the model's output holds no floating-point tensor")
    for name, tensor in named.items():
        if tensor.ndim == 0 or len(tensor) != len(sample):
            raise ValueError(f"the model turns {described} into {_told(name, tensor)}: expected "
                             f"{len(sample)} samples in front{_way_out(name)}")
        if not tensor.isfinite().all():
            raise ValueError(f"the model's {name} for calibration {described} holds NaN or infinite values")
    with torch.inference_mode():  # in which candidates are evaluated
        repeated, alone = _passed(teacher, sample), _passed(teacher, sample[:1])
    for tensor in alone:
        if tensor.ndim == 0 or len(tensor) != 1:
            raise ValueError(f"the model turns one input {list(sample[:1].shape)} into {list(tensor.shape)}: expected "
                             "1 sample in front; .squeeze(-1), say, where .squeeze() takes the batch's axis too")
    for tensor, again in zip(tensors, repeated, strict=True):
        if differ(tensor, again):
            raise ValueError("the model's outputs for the same inputs differ from pass to pass: expected one function; "
                             "what draws numbers must not do so in eval mode, F.dropout(x, training=self.training) "
                             "say, and no state may be carried from one pass to the next")
    if divergence.of_tensors is kl:
        _check_classes(unpacked(sample, packing), named, last, described)
    divergence(output, output)  # raises where this divergence is not defined on such outputs
    return sum(tensor.numel() for tensor in tensors) // len(sample)


class _LastAxes:
    """While it is entered, notes what modules return that number features, or classes, along the last axis."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, LAST)]
        self._returned: list[weakref.ref[Tensor]] = []

    def __enter__(self) -> "_LastAxes":
        self._hooks = [module.register_forward_hook(self._keep) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _: nn.Module, __: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim > 2 and output.shape[-1] > 1:
            self._returned.append(weakref.ref(output))

    def __contains__(self, tensor: Tensor) -> bool:
        return any(one() is tensor for one in self._returned)


def _told(name: str, tensor: Tensor) -> str:
    return f"{'' if name == 'output' else f'{name} of '}{list(tensor.shape)}"


def _way_out(name: str) -> str:
    """What to do about one output of several."""
    return "" if name == "output" else ALONE


def _check_classes(given: Sequence[Tensor], named: Mapping[str, Tensor], last: _LastAxes, described: str) -> None:
    """Raise `ValueError`, or warn, where outputs are no logits, or classes lie last or seem to, as language models have
    them: kl takes dimension 1 for them."""
    for name, tensor in named.items():
        if tensor.ndim > 1 and tensor.shape[1] > 1 and (tensor >= 0).all() and (
                (tensor.sum(1) - 1).abs().max() <= SUMS_TO_ONE):
            raise ValueError(f"the model turns {described} into {_told(name, tensor)} of probabilities, which add up "
                             "to 1 over dimension 1, and kl takes logits: expected what comes before the softmax, or "
                             f"the probabilities' logarithm, or divergence=mse{_way_out(name)}")
        turned = "transpose(1, 2)" if tensor.ndim == 3 else "movedim(-1, 1)"
        told = (f"the model turns {described} into {_told(name, tensor)}, and kl takes dimension 1 for the classes: "
                f"expected logits.{turned}, or divergence=mse{_way_out(name)}")
        if tensor in last:
            raise ValueError(told)
        if tensor.ndim != 3 or tensor.shape[1] == tensor.shape[2]:  # others than [N, T, V]
            continue
        tokens = [one for one in given if not one.is_floating_point()]
        if any(one.ndim == 2 and tensor.shape[1] == one.shape[1] for one in tokens):
            raise ValueError(told)
        # Of floats [N, T, F], or tokens and their masks [N, 2, T]; channels that are as many as classes look so too.
        if any(one.ndim == 3 and tensor.shape[1] == one.shape[1 if one.is_floating_point() else 2] for one in given):
            log.warning("%s", told)


@torch.no_grad()
def refuses(teacher: nn.Module, sample: Tensor) -> bool:
    """Whether a teacher raises for a sample, or answers what is not finite."""
    try:
        return not all(bool(tensor.isfinite().all())
                       for part in sample.split(PART) for tensor in flatten(teacher(part)))
    except Exception:  # noqa: BLE001 - the user's code, of which anything may come out
        return True


def _hint(error: Exception, model: nn.Module) -> str:
    """What to do about errors of the model's that are of common origin."""
    if isinstance(error, TypeError) and "argument" in str(error):
        if packing_of(model) is not None:
            return f"; its forward takes {inspect.signature(model.forward)}"
        return "; the inputs of a network of several arguments go into a tuple, or into a dict by name"
    if "same device" in str(error):
        return ("; it is copied to the CPU: its forward pass makes tensors where its inputs are (device=x.device), and "
                "register_buffer has those that it keeps go with it")
    if "Long" in str(error):
        return "; token indices are whole numbers of more than 8 bits, as uint8 is taken for pixels"
    return ""


def _passed(teacher: nn.Module, sample: Tensor) -> list[Tensor]:
    """Outputs for a sample."""
    try:
        return flatten(teacher(sample))
    except Exception as error:  # the user's code in another mode, or on another number of inputs
        raise ValueError(f"the model does not accept inputs {list(sample.shape)} of {sample.dtype} in "
                         f"torch.inference_mode: {type(error).__name__}: {error}") from error


def _spare(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook that lets a module change its inputs in place, of which nobody will know."""
    return tuple(value.clone() for value in inputs)
