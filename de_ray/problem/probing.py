"""One pass of a model that nobody knows yet: whether it and its inputs fit each other."""

import logging

import torch
from torch import Tensor, nn

from de_ray.problem.divergence import TensorDivergence, kl
from de_ray.problem.outputs import flatten

log = logging.getLogger(__name__)

PART = 8
"""Inputs of a pass."""
ROUNDING = 1e-3
"""Largest difference of outputs that ought to be equal, relative to the output's largest magnitude."""


@torch.no_grad()
def probe(teacher: nn.Module, sample: Tensor, divergence: TensorDivergence) -> int:
    """Forward passes, so that a model and inputs that do not fit are told apart from everything later.

    A teacher that changes its inputs is given copies of them from then on.

    Returns:
        How many numbers an input is turned into.

    Raises:
        ValueError: the two do not fit each other, or the divergence is not defined on such outputs.
    """
    described = f"inputs {list(sample.shape)} of {sample.dtype}"
    given = sample.clone()
    try:
        output = teacher(given)
        if not torch.equal(given, sample):
            teacher.register_forward_pre_hook(_spare)  # what it is given is stored, and will be given again
            output = teacher(sample)
    except Exception as error:  # the user's code on inputs that may not be meant for it
        raise ValueError(f"the model does not accept calibration {described}: "
                         f"{type(error).__name__}: {error}{_hint(error)}") from error
    tensors = flatten(output)
    if not tensors:
        raise ValueError("the model's output holds no floating-point tensor")
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(sample):
            raise ValueError(f"the model turns {described} into {list(tensor.shape)}: expected "
                             f"{len(sample)} samples in front")
        if not tensor.isfinite().all():
            raise ValueError(f"the model's output for calibration {described} holds NaN or infinite values")
    with torch.inference_mode():  # in which candidates are evaluated
        repeated, alone = _passed(teacher, sample), _passed(teacher, sample[:1])
    for tensor in alone:
        if tensor.ndim == 0 or len(tensor) != 1:
            raise ValueError(f"the model turns one input {list(sample[:1].shape)} into {list(tensor.shape)}: expected "
                             "1 sample in front; .squeeze(-1), say, where .squeeze() takes the batch's axis too")
    for tensor, again in zip(tensors, repeated, strict=True):
        if float((tensor - again).abs().max()) > ROUNDING * float(tensor.abs().max()):
            raise ValueError("the model's outputs for the same inputs differ from pass to pass: expected one function; "
                             "what draws numbers must not do so in eval mode, F.dropout(x, training=self.training) "
                             "say, and no state may be carried from one pass to the next")
    if divergence.of_tensors is kl:
        _check_classes(sample, tensors, described)
    divergence(output, output)  # raises where this divergence is not defined on such outputs
    return sum(tensor.numel() for tensor in tensors) // len(sample)


def _check_classes(sample: Tensor, tensors: list[Tensor], described: str) -> None:
    """Raise `ValueError`, or warn, where classes seem to lie last, as language models have them: kl takes dimension 1
    for them."""
    for tensor in tensors:  # [N, T, V]
        if tensor.ndim != 3 or tensor.shape[1] == tensor.shape[2]:
            continue
        told = (f"the model turns {described} into {list(tensor.shape)}, and kl takes dimension 1 for the classes: "
                "expected logits.transpose(1, 2), or divergence=mse")
        if not sample.is_floating_point() and sample.ndim == 2 and tensor.shape[1] == sample.shape[1]:
            raise ValueError(told)
        # Of floats [N, T, F], or tokens and their masks [N, 2, T]; channels that are as many as classes look so too.
        if sample.ndim == 3 and tensor.shape[1] == sample.shape[1 if sample.is_floating_point() else 2]:
            log.warning("%s", told)


@torch.no_grad()
def refuses(teacher: nn.Module, sample: Tensor) -> bool:
    """Whether a teacher raises for a sample, or answers what is not finite."""
    try:
        return not all(bool(tensor.isfinite().all())
                       for part in sample.split(PART) for tensor in flatten(teacher(part)))
    except Exception:  # noqa: BLE001 - the user's code, of which anything may come out
        return True


def _hint(error: Exception) -> str:
    """What to do about errors of the model's that are of common origin."""
    if isinstance(error, TypeError) and "argument" in str(error):
        return "; wrap a network of several inputs in a module that takes them as one tensor and divides it"
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
