"""Hidden units of a captured network: which axes of which parameters number the same ones.

Units that nobody outside sees may be renumbered: the rows of the layer that makes them, their biases, and the columns
of the layers that read them, all alike, and the network computes what it did. Channels are followed from the layer that
makes them through operations that treat each by itself, sums that tie two layers' channels together, concatenations and
flattening. Where an operation is not known to be such a one, or an output shows the channels, their numbers stay.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from de_ray.evaluation.operations import WeightedOp, aten, weighted_op
from de_ray.evaluation.program import Program

_EACH_BY_ITSELF = {
    aten.relu.default, aten.leaky_relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default,
    aten.tanh.default, aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.elu.default,
    aten.softplus.default, aten.mish.default, aten.clamp.default, aten.clamp_min.default, aten.neg.default,
    aten.abs.default, aten.exp.default, aten.clone.default, aten.alias.default, aten.contiguous.default,
    aten.dropout.default, aten.pad.default, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec, aten.upsample_bilinear2d.vec}
"""Operations on one tensor that make of each channel what is independent of its number; channels are the second axis of
what pools and resizes, and padding is looked at."""
_PAIRS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default,
          aten.minimum.default}
_NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
"""Batch norm as it is exported, and as it is where in-place operations were made functional, whose first result is
meant."""
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints}


@dataclass(frozen=True)
class Axis:
    """Where a parameter counts a group's units: each of them has `repeat` places side by side, from `start` on."""

    parameter: str
    """State-dict key."""
    dim: int
    start: int = 0
    repeat: int = 1

    @property
    def reads(self) -> bool:
        """Whether these are inputs, not what makes the units."""
        return self.dim == 1


@dataclass(eq=False)
class Group:
    """Units that may be renumbered among themselves."""

    size: int
    axes: list[Axis] = field(default_factory=list)


@dataclass(frozen=True)
class _Channels:
    """How a value's axis `dim` consists of groups' units: pieces (group, places a unit), None for fixed ones."""

    dim: int
    pieces: tuple[tuple[Group | None, int], ...]
    sizes: tuple[int, ...]
    """Places of each piece."""


def hidden_groups(program: Program, state: Mapping[str, Tensor]) -> list[Group]:
    """Groups of a network's hidden units, in the order in which they are made.

    Args:
        program: the captured network.
        state: its parameters and buffers by state-dict key, as the program reads them. One that has several keys goes
            by the first, as layers do.
    """
    names: dict[int, str] = {}
    for name, value in state.items():
        names.setdefault(value.data_ptr(), name)
    return _Tracer(program, names).run()


class _Tracer:
    def __init__(self, program: Program, names: dict[int, str]) -> None:
        self._program, self._names = program, names
        read = (one for node in program.operations for one in node.all_input_nodes if one in program.state)
        self._reads = Counter(program.state[one].data_ptr() for one in read)
        self._groups: list[Group] = []
        self._merged: dict[Group, Group] = {}
        self._fixed: set[Group] = set()
        self._channels: dict[fx.Node, _Channels] = {}

    def run(self) -> list[Group]:
        """See `hidden_groups`."""
        for node in self._program.operations:
            computes = "val" in node.meta and not self._program.is_size(node)  # assertions have no value
            if computes and not self._follow(node):
                self._fix(node.all_input_nodes)
        self._fix(self._program.result_nodes)
        fixed = set(map(self._find, self._fixed))
        return [group for group in self._groups if group not in self._merged and group not in fixed]

    def _follow(self, node: fx.Node) -> bool:
        """Note the channels of an operation's result; False where its inputs' numbers are to stay."""
        if node.target in _NORMS:
            return self._normalize(node)
        if node.target is operator.getitem:
            source, index = node.args
            return index == 0 and source.target in _NORMS and self._same(source, node)
        weighted = weighted_op(node)
        if weighted is not None:
            return self._weigh(weighted)
        if node.target in _EACH_BY_ITSELF:
            return len(node.all_input_nodes) == 1 and self._keep(node)
        if node.target in _PAIRS:
            return self._pair(node)
        if node.target in _RESHAPES:
            return self._reshape(node)
        if node.target == aten.mean.dim:
            return self._average(node)
        return node.target == aten.cat.default and self._concatenate(node)

    # Operations.

    def _weigh(self, op: WeightedOp) -> bool:
        parameters = [self._name(one) for one in (op.weight, op.bias) if one is not None]
        if None in parameters:
            return False  # nor are the units that it makes told
        count = int(op.weight.meta["val"].shape[0])
        group = Group(count, [Axis(name, 0) for name in parameters])
        self._groups.append(group)
        axis = 1 if op.spatial else op.node.meta["val"].ndim - 1
        self._channels[op.node] = _Channels(axis, ((group, 1),), (count,))
        given = self._channels.get(op.inputs)
        if op.groups != 1:
            self._fixed.add(group)
            return False
        if given is None:
            return True
        if given.dim != (1 if op.spatial else op.inputs.meta["val"].ndim - 1):
            return False
        self._count(given, parameters[0], 1)
        return True

    def _normalize(self, node: fx.Node) -> bool:
        channels = self._channels.get(node.args[0])
        if channels is None:
            return False
        parameters = [self._name(one) for one in node.args[1:5] if one is not None]
        if None in parameters or channels.dim != 1:
            return False
        for name in parameters:
            self._count(channels, name, 0)
        self._channels[node] = channels
        return True

    def _pair(self, node: fx.Node) -> bool:
        if len(node.all_input_nodes) == 1:
            return self._keep(node)
        one, other = (self._channels.get(arg) if isinstance(arg, fx.Node) else None for arg in node.args[:2])
        if (one is None or other is None or node.kwargs or (one.dim, one.sizes) != (other.dim, other.sizes)
                or node.args[0].meta["val"].ndim != node.args[1].meta["val"].ndim):
            return False
        for (a, repeat), (b, same) in zip(one.pieces, other.pieces, strict=True):
            if a is None or b is None or repeat != same:
                self._fixed.update(group for group in (a, b) if group is not None)
            else:
                self._merge(self._find(a), self._find(b))
        self._channels[node] = one
        return True

    def _keep(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0]
        channels = self._channels.get(source)
        if channels is None:
            return True  # nothing there that could be renumbered
        before, after = source.meta["val"].shape, node.meta["val"].shape
        # Places of each channel may change in number, channels may not.
        if len(before) != len(after) or before[channels.dim] != after[channels.dim]:
            return False
        others = [axis for axis in range(1, len(before)) if axis != channels.dim and before[axis] != after[axis]]
        return (channels.dim == 1 or not others) and self._same(source, node)

    def _average(self, node: fx.Node) -> bool:
        source, dims = node.args[0], node.args[1] or [0]  # None: over all of them
        if source not in self._channels:
            return True
        inside = min(dim % source.meta["val"].ndim for dim in dims) > 1
        return self._channels[source].dim == 1 and inside and self._same(source, node)

    def _reshape(self, node: fx.Node) -> bool:
        source = node.args[0]
        channels = self._channels.get(source)
        if channels is None:
            return True
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(before) == len(after) and all(a == b for a, b in zip(before[1:], after[1:], strict=True)):
            return self._same(source, node)
        if not all(isinstance(n, int) for n in (*before[1:], *after[1:])):  # samples are among them
            return False
        places = math.prod(before[2:])
        if channels.dim != 1 or len(after) != 2 or after[1] != before[1] * places:
            return False
        self._channels[node] = _Channels(1, tuple((group, repeat * places) for group, repeat in channels.pieces),
                                         tuple(size * places for size in channels.sizes))
        return True

    def _concatenate(self, node: fx.Node) -> bool:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        dim %= node.meta["val"].ndim
        pieces, sizes = [], []
        for part in parts:
            if part.meta["val"].ndim != node.meta["val"].ndim:
                continue  # an empty vector, as caches of keys and values begin with: PyTorch passes it over
            channels = self._channels.get(part)
            if channels is None:
                length = part.meta["val"].shape[dim]
                if not isinstance(length, int):  # samples lie there
                    return False
                pieces.append((None, 1))
                sizes.append(length)
            elif channels.dim != dim:
                return False
            else:
                pieces += channels.pieces
                sizes += channels.sizes
        self._channels[node] = _Channels(dim, tuple(pieces), tuple(sizes))
        return True

    # Groups.

    def _count(self, channels: _Channels, parameter: str, dim: int) -> None:
        """Note that a parameter's axis counts these channels."""
        start = 0
        for (group, repeat), size in zip(channels.pieces, channels.sizes, strict=True):
            if group is not None:
                self._find(group).axes.append(Axis(parameter, dim, start, repeat))
            start += size

    def _same(self, source: fx.Node, node: fx.Node) -> bool:
        if source in self._channels:
            self._channels[node] = self._channels[source]
        return True

    def _find(self, group: Group) -> Group:
        while group in self._merged:
            group = self._merged[group]
        return group

    def _merge(self, one: Group, other: Group) -> None:
        if one is not other:
            one.axes += other.axes
            self._merged[other] = one

    def _name(self, node: fx.Node) -> str | None:
        """The key of what an operation reads and no other one does: shared or tied, it would count two groups."""
        value = self._program.state.get(node)
        return None if value is None or self._reads[value.data_ptr()] > 1 else self._names.get(value.data_ptr())

    def _fix(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node in self._channels:
                self._fixed.update(group for group, _ in self._channels[node].pieces if group is not None)
