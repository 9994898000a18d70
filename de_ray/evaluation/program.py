"""A captured network as a list of operations: what depends on what, and running the part that is asked for."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg

from de_ray.evaluation.operations import call
from de_ray.problem.base import Output

Values = dict[fx.Node, Any]
"""What nodes evaluated to: a tensor, or a tuple of tensors."""


class Program:
    """A functional graph with a free batch size.

    Args:
        nodes: placeholders and operations in an order in which they can run.
        given: the placeholder of the network's inputs.
        state: placeholder -> live parameter, buffer or constant.
        results: the output's leaves: nodes, or constants.
        rebuild: leaves -> the module's output.
        batch: the symbol of the batch size in shapes.
    """

    def __init__(self, nodes: list[fx.Node], given: fx.Node, state: dict[fx.Node, Tensor], results: list[Any],
                 rebuild: Callable[[list], Output], batch: Any) -> None:
        self.nodes, self.given, self.state, self.results = nodes, given, state, results
        self._rebuild, self._batch = rebuild, batch
        self.operations = [node for node in nodes if node.op == "call_function"]
        """Nodes that compute something."""
        self.result_nodes = [node for node in results if isinstance(node, fx.Node)]
        self.numbered: frozenset[fx.Node] = frozenset()
        """Values that count samples, as arange(N) does, or are computed from what does: of a stack of batches they are
        others than a batch's, repeated."""
        self._derived: dict[tuple, fx.Node] = {}
        # As they were captured: a SymInt takes up whatever anybody finds out of it, if only by asking for its number.
        self._sizes = {node: _expressions(node.meta.get("val")) for node in nodes}

    def derive(self, target: Callable, *args: Any) -> fx.Node:
        """A further operation on values of the network, which none of its own operations reads.

        Args:
            target: hashable function with a `__name__`.
            args: nodes, lists of them and constants.

        Returns:
            The operation, the same one for the same arguments.
        """
        key = (target, repr(args))  # nodes have names of their own
        if key not in self._derived:
            node = self.given.graph.call_function(target, args)
            inputs = [one.meta["val"] for one in node.all_input_nodes]
            with detect_fake_mode(inputs) or contextlib.nullcontext(), torch.no_grad():
                node.meta["val"] = self.call(node, lambda one: one.meta["val"])
            self.nodes.insert(1 + max(map(self.nodes.index, node.all_input_nodes)), node)
            self.operations = [one for one in self.nodes if one.op == "call_function"]
            self._derived[key] = node
            self._sizes[node] = _expressions(node.meta["val"])
        return self._derived[key]

    # Dependencies.

    def readers(self, tensor: Tensor) -> frozenset[fx.Node]:
        """Placeholders that stand for a parameter."""
        return frozenset(node for node, value in self.state.items() if value is tensor)

    def dependents(self, sources: Collection[fx.Node]) -> list[fx.Node]:
        """Operations that depend on `sources`, which are left out, and numbered values that those read; in order."""
        reached = set(sources)
        for node in self.operations:
            if any(one in reached for one in node.all_input_nodes):
                reached.add(node)
        todo = [node for node in self.operations if node in reached]
        while todo:
            counted = [one for one in todo.pop().all_input_nodes if one in self.numbered and one not in reached]
            reached.update(counted)
            todo.extend(counted)
        return [node for node in self.operations if node in reached and node not in sources]

    # Shapes.

    def is_size(self, node: fx.Node) -> bool:
        """Whether the node is a number that is computed from shapes."""
        return not isinstance(node.meta["val"], (Tensor, tuple, list))

    def size(self, node: fx.Node, samples: int) -> Any:
        """The number that `is_size` tells of, for a batch of `samples`."""
        value = self._sizes[node]
        return self._number(value, samples) if isinstance(value, sympy.Basic) else value

    def _number(self, value: Any, samples: int) -> int:
        return _substituted(value, self._batch, samples) if isinstance(value, sympy.Basic) else int(value)

    def shape(self, node: fx.Node, samples: int) -> tuple[int, ...]:
        """Of a node's tensor, for a batch of `samples`."""
        return tuple(self._number(length, samples) for length in self._sizes[node])

    def floats(self, node: fx.Node, samples: int) -> int:
        """Values that a node holds, over all its tensors."""
        held = self._sizes[node]
        tensors = held if isinstance(held, list) else [held]
        return sum(math.prod(self._number(n, samples) for n in one) for one in tensors if isinstance(one, tuple))

    def grows(self, node: fx.Node) -> bool:
        """Whether a node holds more for more samples, wherever they lie."""
        held = self._sizes[node]
        shapes = held if isinstance(held, list) else [held]
        return any(isinstance(length, sympy.Basic) and self._batch in length.free_symbols
                   for shape in shapes if isinstance(shape, tuple) for length in shape)

    def holds_samples(self, node: fx.Node) -> bool:
        """Whether samples lie along the first axis of a node's tensor and nowhere else; False: nowhere at all.

        Raises:
            LookupError: samples lie elsewhere, or the node holds several tensors.
        """
        if not isinstance(node.meta["val"], Tensor):
            raise LookupError(node.name)
        shape = self._sizes[node]
        along = [axis for axis, length in enumerate(shape)
                 if isinstance(length, sympy.Basic) and self._batch in length.free_symbols]
        if along and (along != [0] or shape[0] != self._batch):
            raise LookupError(node.name)
        return bool(along)

    # Running.

    def outputs(self, inputs: Tensor) -> Output:
        """What the module returns for `inputs` [N, ...]."""
        return self.assemble(self.run(self.result_nodes, {self.given: inputs}, len(inputs)))

    def assemble(self, values: Mapping[fx.Node, Any]) -> Output:
        """The module's output from its leaves' values."""
        return self._rebuild([values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in self.results])

    def run(self, targets: Iterable[fx.Node], given: Mapping[fx.Node, Any], samples: int,
            keep: Callable[[fx.Node, Any], None] | None = None) -> Values:
        """Compute nodes from others, and nothing that they do not need.

        Args:
            targets: nodes to compute.
            given: values of nodes that are known.
            samples: the batch size.
            keep: told of every operation's value as it is computed.

        Returns:
            The targets' values.
        """
        targets = list(targets)
        plan = self._needed(targets, given)
        live: Values = {**self.state, **given}

        def compute(node: fx.Node) -> Any:
            value = self.size(node, samples) if self.is_size(node) else self.call(node, live.__getitem__)
            if keep is not None:
                keep(node, value)
            return value

        execute(plan, last_uses(plan, inputs_of), live, set(targets), compute)
        return {node: live[node] for node in targets}

    @staticmethod
    def call(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Run one operation on the values of its arguments."""
        return call(node, *map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))

    def _needed(self, targets: Iterable[fx.Node], given: Collection[fx.Node]) -> list[fx.Node]:
        todo, needed = [node for node in targets if node not in given], set()
        while todo:
            node = todo.pop()
            if node not in needed and node.op == "call_function":
                needed.add(node)
                if not self.is_size(node):
                    todo.extend(one for one in node.all_input_nodes if one not in given)
        return [node for node in self.operations if node in needed]


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """What an operation reads as it was captured."""
    return node.all_input_nodes


def execute(plan: Iterable[fx.Node], last: Mapping[fx.Node, list[fx.Node]], live: Values, wanted: Collection[fx.Node],
            compute: Callable[[fx.Node], Any]) -> None:
    """Compute operations in order into `live`, and drop values that nothing reads any more.

    Args:
        plan: operations.
        last: see `last_uses`.
        live: values so far.
        wanted: nodes whose values stay.
        compute: the value of a node, from those in `live`.
    """
    for node in plan:
        live[node] = compute(node)
        for done in last.get(node, ()):
            if done not in wanted:
                del live[done]


def _expressions(value: Any) -> Any:
    """What an operation's result is in size: of a tensor a tuple, of several a list, of a number itself."""
    if isinstance(value, Tensor):
        return tuple(map(_expressions, value.shape))
    if isinstance(value, (tuple, list)):
        return list(map(_expressions, value))
    return value.node.expr if isinstance(value, torch.SymInt) else value


@lru_cache(maxsize=4096)
def _substituted(expression: Any, symbol: Any, number: int) -> int:
    return int(expression.subs(symbol, number))


def last_uses(plan: list[fx.Node], reads: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """Operation -> those of `plan` that nothing after it reads; `reads` tells what an operation reads."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    computed = set(plan)
    for node in reversed(plan):
        for one in (node, *reads(node)):
            if one in computed and one not in seen:
                seen.add(one)
                last.setdefault(node, []).append(one)
    return last
