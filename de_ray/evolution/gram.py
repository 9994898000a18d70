"""Gram matrices of layer inputs: X X^T over samples and positions, one matrix a group of channels."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from de_ray.student import Student

PART_BYTES = 2**30
"""Of Gram matrices that are held at a time: those of a large network's layers would take several times as much."""


def layer_groups(student: Student) -> list[int]:
    """Groups of channels of each layer; 1 for those that are no convolution."""
    return [getattr(module, "groups", 1) for module in student.products]


def layer_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """The vectors that a layer's rows are multiplied with.

    Args:
        module: Linear, Conv1d, Conv2d or Conv3d.
        inputs: what the module was called with.

    Returns:
        [G, P, D]: G groups, P samples times positions, D inputs of a row.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, -1, module.in_features)
    spatial = module.weight.ndim - 2
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        pads = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, pads, mode=mode)
    else:
        inputs = functional.pad(inputs, [p for side in reversed(module.padding) for p in (side, side)])
    patches = inputs
    for axis in range(spatial):
        window = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        patches = patches.unfold(2 + axis, window, module.stride[axis])[..., ::module.dilation[axis]]
    # [N, C, positions..., kernel...] -> [G, N * positions, C / G * kernel]
    samples, channels = patches.shape[:2]
    grouped = patches.reshape(samples, module.groups, channels // module.groups, *patches.shape[2:])
    positions = list(range(3, 3 + spatial))
    kernel = list(range(3 + spatial, 3 + 2 * spatial))
    return grouped.permute(1, 0, *positions, 2, *kernel).reshape(module.groups, -1, module.weight[0].numel())


def layer_input(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """What a layer was called with, as hooks are told of it: networks may name the argument."""
    return args[0] if args else kwargs["input"]


def with_constant(rows: Tensor) -> Tensor:
    """Vectors [G, P, D] with a 1 at their end, which a bias is multiplied with."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def layer_grams(student: Student, inputs: Tensor, batch: int, biases: bool = False,
                only: Sequence[int] | None = None) -> list[Tensor | None]:
    """X X^T / (samples times positions) of layers, float64 [G, D, D]; None where no module is called on the inputs.

    Attention reads the weights of its projections by itself, and so do recurrent layers; others are of training alone.
    Their inputs are taken to be alike, and independent: what a multiple of the unit matrix would say is said without.

    Args:
        student: its layers' inputs are collected in its present state.
        inputs: [M, ...] unlabelled inputs.
        batch: inputs a pass.
        biases: whether D counts a constant input, the last, of layers that have a bias.
        only: indices of the layers; None: all.
    """
    def gram(module: nn.Module, rows: Tensor) -> Tensor:
        if biases and module.bias is not None:
            rows = with_constant(rows)
        return torch.bmm(rows.transpose(1, 2), rows)

    return _means(student, inputs, batch, gram, range(len(student.layers)) if only is None else only)


def layer_squares(student: Student, inputs: Tensor, batch: int) -> list[Tensor | None]:
    """The diagonals of `layer_grams` alone, float64 [G, D]: the rest of such a matrix may be larger than a network."""
    return _means(student, inputs, batch, lambda _, rows: rows.square().sum(1), range(len(student.layers)))


def _means(student: Student, inputs: Tensor, batch: int, total: Callable[[nn.Module, Tensor], Tensor],
           layers: Sequence[int]) -> list[Tensor | None]:
    """Totals over the vectors [G, P, D] of each layer's inputs, by their number P: float64."""
    sums: dict[int, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def collect(index: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], _: Tensor) -> None:
            rows = layer_rows(module, layer_input(args, kwargs))
            found = total(module, rows).double()
            sums[index] = sums[index] + found if index in sums else found
            counts[index] += rows.shape[1]
        return hook

    hooks = [module.register_forward_hook(collect(i), with_kwargs=True) for i in layers
             if (module := student.products[i]) is not None]
    try:
        with torch.no_grad():
            for part in inputs.split(batch):
                student.module(part.to(student.weights[0].device))
    finally:
        for hook in hooks:
            hook.remove()
    return [sums[index] / counts[index] if counts[index] else None for index in layers]


def grams_in_parts(student: Student, inputs: Tensor, batch: int, biases: bool = False,
                   only: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor | None]]:
    """Layers' indices and Gram matrices, in as many passes over the inputs as keep `PART_BYTES`; see `layer_grams`."""
    part: list[int] = []
    held, groups = 0, layer_groups(student)
    for index in range(len(student.layers)) if only is None else only:
        size = 8 * groups[index] * student.weights[index][0].numel() ** 2 if student.products[index] is not None else 0
        if part and held + size > PART_BYTES:
            yield from zip(part, layer_grams(student, inputs, batch, biases, part), strict=True)
            part, held = [], 0
        part.append(index)
        held += size
    yield from zip(part, layer_grams(student, inputs, batch, biases, part), strict=True)
