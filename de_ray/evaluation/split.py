"""Linear layers and convolutions of which a suffix has to run a part only.

They are linear. Where a concatenation's inputs are joined, and only some of them depend on the changed layers, the
result is the sum of what the others contribute, which is kept with the bias, and of the convolution of the changed
channels alone. Channels that were upsampled are convolved before it (`upsampled.py`). Between concatenation or
upsampling and the convolution there may be functions that act on each channel by itself: they are carried out before it
instead.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from de_ray.evaluation.operations import SPATIAL, WeightedOp, weighted_op
from de_ray.evaluation.program import Program
from de_ray.evaluation.upsampled import Axis, convolved, products

aten = torch.ops.aten

PASS = 32
"""Products that take as long as adding one value to another in memory: a split has to save more of them."""
ELEMENTWISE = frozenset(op.default for op in (
    aten.relu, aten.leaky_relu, aten.silu, aten.gelu, aten.sigmoid, aten.tanh, aten.hardtanh, aten.hardswish,
    aten.hardsigmoid, aten.relu6, aten.elu, aten.softplus, aten.mish, aten.clamp, aten.clone))
"""Functions of one tensor and constants."""
POOLING = frozenset(op.default for op in (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d,
                                          aten.avg_pool2d, aten.avg_pool3d))
"""The same over windows of a channel."""
UPSAMPLING = frozenset((aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec))


@dataclass(frozen=True)
class Channels:
    """Some of an operation's inputs' channels, possibly before they are upsampled."""

    node: fx.Node
    start: int
    stop: int
    """Columns of the weight that read them."""
    axes: tuple[Axis, ...] | None = None
    """Of the convolution, where `node` is yet to be upsampled."""


@dataclass(frozen=True)
class OfChannels:
    """y = W[:, channels] x + b, as an operation of a graph."""

    op: WeightedOp
    ranges: tuple[tuple[int, int], ...]
    __name__ = "of_channels"

    def __call__(self, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        """Inputs: [N, C, ...] (a linear layer's: [N, ..., C]) for each range, which are joined."""
        columns = [weight[:, start:stop] for start, stop in self.ranges]
        if len(inputs) == 1:
            return self.op.run(inputs[0], columns[0], bias)
        return self.op.run(torch.cat(list(inputs), _axis(self.op)), torch.cat(columns, 1), bias)


@dataclass(frozen=True)
class Split:
    """How a suffix computes an operation.

    Args:
        op: the operation.
        plain: channels that are convolved as they are.
        upsampled: channels that are convolved before they are upsampled.
        kept: node of the other channels' contribution and the bias; None: there are none.
        products: for each value of the result.
    """

    op: WeightedOp
    plain: tuple[Channels, ...]
    upsampled: tuple[Channels, ...]
    kept: fx.Node | None
    products: float

    @property
    def reads(self) -> list[fx.Node]:
        """Nodes whose values `run` asks for."""
        bias = self.op.bias if self.kept is None else self.kept
        return [*(one.node for one in (*self.plain, *self.upsampled)), self.op.weight, *([bias] if bias else [])]

    def run(self, value_of: Callable[[fx.Node], Tensor], shape: tuple[int, ...]) -> Tensor:
        """The operation's result for K candidates.

        Args:
            value_of: values of `reads`; that of `kept` [N, ...] is the same for all candidates.
            shape: [K * N, ...] of the result.
        """
        weight = value_of(self.op.weight)
        bias = None if self.kept is not None or self.op.bias is None else value_of(self.op.bias)
        added = None if self.kept is None else value_of(self.kept)
        out = None
        if self.plain:
            of_channels = OfChannels(self.op, tuple((one.start, one.stop) for one in self.plain))
            out = of_channels([value_of(one.node) for one in self.plain], weight, bias)
            if added is not None:
                out.unflatten(0, (-1, len(added))).add_(added)
        for one in self.upsampled:
            small = value_of(one.node)
            for places, part in convolved(small, weight[:, one.start:one.stop], one.axes):
                there = (slice(None), slice(None), *places)
                if out is None:
                    out = self.op.room(shape, small)
                if one is not self.upsampled[0] or self.plain:
                    out[there] += part
                elif added is not None:
                    torch.add(part.unflatten(0, (-1, len(added))), added[there],
                              out=out[there].unflatten(0, (-1, len(added))))
                else:
                    out[there] = part if bias is None else part + bias.view(-1, *[1] * len(places))
        return out


def splits(program: Program, plan: Collection[fx.Node], changed: Collection[fx.Node]) -> dict[fx.Node, Split]:
    """Operations of which less than the whole needs to be run.

    Args:
        program: is given the operations that compute what is kept, and what takes the place of functions in between.
        plan: operations that depend on the changed layers.
        changed: operations whose own weight differs between candidates.
    """
    inside = set(plan)
    found = {}
    for node in plan:
        op = weighted_op(node)
        # Where the weight itself is computed from a changed one, nothing is known of it.
        whole = op is None or node in changed or op.groups > 1 or op.inputs not in inside or op.weight in inside
        if not whole:
            split = _Splitter(program, op, inside).split()
            if split is not None and op.weight.meta["val"][0].numel() - split.products > PASS:
                found[node] = split
    return found


@dataclass(frozen=True)
class _Part:
    """Some channels of a value."""

    node: fx.Node
    depends: bool
    """On the changed layers."""
    upsampling: fx.Node | None = None
    """Whose result the channels would be, were it given those of `node`."""


class _Splitter:
    """Looks from one operation upwards."""

    def __init__(self, program: Program, op: WeightedOp, inside: Collection[fx.Node]) -> None:
        self._program, self._op, self._inside = program, op, inside
        self._axis = _axis(op)

    def split(self) -> Split | None:
        """How to compute the operation, or None where it has to be run whole."""
        op = self._op
        if op.spatial and op.inputs.meta["val"].ndim != op.spatial + 2:  # a single sample without a batch axis
            return None
        changed, constant, start = [], [], 0
        for part in self._parts(op.inputs):
            stop = start + part.node.meta["val"].shape[self._axis]
            axes = self._axes(part) if part.depends else None
            channels = Channels(self._whole(part) if axes is None else part.node, start, stop, axes)
            (changed if part.depends else constant).append(channels)
            start = stop
        upsampled = tuple(one for one in changed if one.axes is not None)
        if not constant and not upsampled:
            return None
        kept = None
        if constant:
            of_channels = OfChannels(op, tuple((one.start, one.stop) for one in constant))
            kept = self._program.derive(of_channels, [one.node for one in constant], op.weight, op.bias)
        plain = tuple(one for one in changed if one.axes is None)
        kernel = math.prod(op.weight.meta["val"].shape[2:])
        run = sum((one.stop - one.start) * (products(one.axes) if one.axes else kernel) for one in changed)
        return Split(op, plain, upsampled, kept, run)

    def _parts(self, node: fx.Node) -> list[_Part]:
        """A value's channels in order, by what they depend on."""
        if node not in self._inside or node.kwargs:
            return [_Part(node, node in self._inside)]
        if node.target is aten.cat.default and (node.args[1:] or (0,))[0] % node.meta["val"].ndim \
                == self._axis % node.meta["val"].ndim:
            return [part for one in node.args[0] for part in self._parts(one)]
        if not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) > 1:
            return [_Part(node, True)]
        if node.target in ELEMENTWISE:
            parts = self._parts(node.args[0])
            if parts == [_Part(node.args[0], True)]:
                return [_Part(node, True)]
            return [replace(part, node=self._carried_out(node, part.node)) for part in parts]
        if self._op.spatial and node.target in POOLING | UPSAMPLING:
            parts = self._parts(node.args[0])
            nodes = [self._whole(part) for part in parts]
            if node.target in UPSAMPLING and _factors(node) is not None:
                return [_Part(one, part.depends, node) for one, part in zip(nodes, parts, strict=True)]
            return [_Part(self._carried_out(node, one), part.depends) for one, part in zip(nodes, parts, strict=True)]
        return [_Part(node, True)]

    def _carried_out(self, node: fx.Node, inputs: fx.Node) -> fx.Node:
        """An operation with other inputs."""
        return node if inputs is node.args[0] else self._program.derive(node.target, inputs, *node.args[1:])

    def _whole(self, part: _Part) -> fx.Node:
        return part.node if part.upsampling is None else self._carried_out(part.upsampling, part.node)

    def _axes(self, part: _Part) -> tuple[Axis, ...] | None:
        """Axes of the convolution before upsampling, where that saves products."""
        op, last = self._op, slice(SPATIAL - self._op.spatial, None)
        if part.upsampling is None or any(stride != 1 for stride in op.stride[last]):
            return None
        kernel = tuple(op.weight.meta["val"].shape[2:])
        axes = tuple(map(Axis, kernel, op.padding[last], op.dilation[last], _factors(part.upsampling),
                         part.node.meta["val"].shape[2:], op.node.meta["val"].shape[2:]))
        return axes if products(axes) < math.prod(kernel) else None


def _axis(op: WeightedOp) -> int:
    """Along which an operation's inputs have their channels."""
    return 1 if op.spatial else -1


def _factors(node: fx.Node) -> tuple[int, ...] | None:
    """By which an upsampling repeats every position along each axis; None: not all of them equally often."""
    small, large = (one.meta["val"].shape[2:] for one in (node.args[0], node))
    if not all(isinstance(length, int) for length in (*small, *large)):
        return None
    if any(b % a for a, b in zip(small, large, strict=True)):
        return None
    factors = tuple(b // a for a, b in zip(small, large, strict=True))
    numbers = torch.arange(math.prod(small), dtype=torch.float64).reshape(1, 1, *small)
    repeated = numbers
    for axis, factor in enumerate(factors):
        repeated = repeated.repeat_interleave(factor, 2 + axis)
    # Positions are computed in floating point: for some factors and sizes one may be off.
    return factors if torch.equal(node.target(numbers, *node.args[1:]), repeated) else None
