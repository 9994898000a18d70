"""Outputs of any model as a flat sequence of float tensors."""

from collections.abc import Iterator, Mapping
from numbers import Number

from torch import Tensor

from de_ray.problem.base import Output

ALONE = "; a module around the model may return what counts alone, `return self.model(x).logits` say"
"""What to do about a model that returns more than that."""


def flatten(output: Output) -> list[Tensor]:
    """The floating-point tensors of an output, in order: tuples, lists and dicts are opened, nested at will.

    Integer, boolean and empty tensors, numbers, strings and None are passed over: no divergence is defined on them.

    Raises:
        ValueError: for other types, complex numbers among them.
    """
    return [tensor for _, tensor in leaves(output)]


def leaves(output: Output, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """As `flatten`, each tensor with its place: `output[0]['boxes']`."""
    if isinstance(output, Tensor):
        if output.is_complex():
            raise ValueError(f"{path} is {str(output.dtype).removeprefix('torch.')}: expected real numbers, "
                             "torch.view_as_real(output)")
        if output.is_floating_point() and output.numel():
            yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from leaves(value, f"{path}[{index}]")
    elif output is not None and not isinstance(output, (Number, str)):
        raise ValueError(f"{path} is a {type(output).__name__}: expected tensors, or tuples, lists or dicts of them"
                         f"{ALONE}")
