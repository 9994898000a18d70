"""What must be run again for candidates of given layers: the operations that depend on those layers' weights.

K candidates share one pass: they are stacked along the batch axis, candidate by candidate, [K * N, ...]. Only the
changed layers differ. Where such a layer's inputs are the same for all candidates, its result is y - (W . S_k) x, a
sparse correction of a cached product; further down it is computed from each candidate's own inputs, and from the
survivors alone where they are few. The dense form is taken wherever it is cheaper. Other layers are run whole, unless
`split.py` finds that part of their inputs is the same for all candidates, or need not be upsampled.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from de_ray.evaluation.edits import LayerChange
from de_ray.evaluation.operations import WeightedOp, aten, weighted_op
from de_ray.evaluation.program import Program, Values, execute, last_uses
from de_ray.evaluation.sparse import add_products, samples_innermost, transposed_rows
from de_ray.evaluation.split import Split, splits

FLOAT = 4
"""Bytes."""


class Suffix:
    """The part of a program that depends on some layers.

    Args:
        program: the whole network.
        readers: placeholders of each changed layer's weight.
    """

    def __init__(self, program: Program, readers: Mapping[int, frozenset[fx.Node]]) -> None:
        self.program = program
        self.layer_of = {node: layer for layer, nodes in readers.items() for node in nodes}
        """Weight's placeholder -> changed layer."""
        self.splits: dict[fx.Node, Split] = {}
        """Operations that are not run whole."""
        self.plan = self._needed(program.dependents(self.layer_of))
        inside = set(self.plan)
        ops = [(node, weighted_op(node)) for node in self.plan
               if any(one in self.layer_of for one in node.all_input_nodes)]
        # A weight that something else reads (a norm of it, say) is put in its place, one candidate at a time.
        regular = all(op is not None and op.weight in self.layer_of and op.inputs not in self.layer_of
                      and op.bias not in self.layer_of for _, op in ops)
        self.ops = {node: op for node, op in ops} if regular else {}
        self.roots = [op for op in self.ops.values() if op.inputs not in inside]
        """Changed operations whose inputs are the same for all candidates."""
        self.constant = [node for node in program.result_nodes if node not in inside]
        """Results that no candidate changes."""
        self.stackable = regular and self._samples_lie_first()
        if self.stackable:
            self.splits = splits(program, self.plan, self.ops)
            self.plan = self._needed(program.dependents(self.layer_of))
        self.cut = self._cut()
        """Nodes outside whose values the suffix reads."""
        added = {split.kept for split in self.splits.values()}
        self._repeated = {node for node in [*self.cut, *self.constant] if node not in added
                          and program.holds_samples(node)} if self.stackable else set()
        """Outer values that are repeated for each candidate."""
        self.rectified = self._rectified()
        """Linear layers whose candidates' results are rectified as they are computed -> the operation that did that."""
        self._last = last_uses(self.plan, self._reads)
        self._bytes: dict[int, int] = {}

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """What an operation is computed from."""
        return self.splits[node].reads if node in self.splits else node.all_input_nodes

    def _rectified(self) -> dict[fx.Node, fx.Node]:
        users: dict[fx.Node, list[fx.Node]] = {}
        for node in self.plan:
            for one in self._reads(node):
                users.setdefault(one, []).append(node)
        found = {}
        for op in self.roots:
            readers = users.get(op.node, [])
            if op.is_matrix and [one.target for one in readers] == [aten.relu.default] \
                    and op.node not in self.program.result_nodes:
                found[op.node] = readers[0]
        return found

    def _needed(self, plan: list[fx.Node]) -> list[fx.Node]:
        """Of the operations that depend on the layers, those that the results need."""
        wanted, found = set(self.program.result_nodes), []
        for node in reversed(plan):
            if node in wanted:
                wanted.update(self._reads(node))
                found.append(node)
        return found[::-1]

    def _cut(self) -> list[fx.Node]:
        inside = set(self.plan)
        read = {one for node in self.plan for one in self._reads(node)} - inside - set(self.program.state)
        return sorted((one for one in read if not self.program.is_size(one)), key=lambda one: one.name)

    def _samples_lie_first(self) -> bool:
        """Whether every outer value holds its samples along the first axis, or none at all, and what the changed
        operations read does so too: inside an attention, say, they may lie along another axis."""
        try:
            for node in [*self._cut(), *self.constant]:
                self.program.holds_samples(node)
            return all(self.program.holds_samples(op.inputs) for op in self.ops.values())
        except LookupError:
            return False

    @property
    def needs(self) -> list[fx.Node]:
        """Nodes whose values must be given to `run`."""
        bases = [op.node for op in self.roots] if self.stackable else []
        return list(dict.fromkeys([*self.cut, *self.constant, *bases]))

    def bytes_a_candidate(self, samples: int) -> int:
        """The most that a pass holds at once for each stacked candidate."""
        if samples not in self._bytes:
            self._bytes[samples] = self._peak_bytes(samples)
        return self._bytes[samples]

    def _peak_bytes(self, samples: int) -> int:
        size = {node: FLOAT * self.program.floats(node, samples) for node in self.plan}
        # Values that are the same for all candidates are copied for each of them while they are read.
        copied = {node: FLOAT * sum(self.program.floats(one, samples) for one in self._reads(node)
                                    if one in self._repeated and node not in self.ops) for node in self.plan}
        held = peak = 0
        for node in self.plan:
            held += size[node]
            peak = max(peak, held + copied[node])
            held -= sum(size[done] for done in self._last.get(node, ()) if done not in self.program.result_nodes)
        return peak + FLOAT * sum(self.program.floats(node, samples) for node in self.constant)

    def run(self, changes: Sequence[Mapping[int, LayerChange]], given: Mapping[fx.Node, Any], innermost: Mapping,
            samples: int) -> Values:
        """The network's results under K candidates.

        Args:
            changes: of each candidate, by layer; one candidate unless the suffix is stackable.
            given: values of `needs`, [N, ...] each.
            innermost: root operation's node -> its inputs as `sparse.samples_innermost` lays them out, and of those on
                matrices ("result", node) -> the student's own result [R, N].
            samples: N.

        Returns:
            Values [K * N, ...] of the program's result nodes, candidate by candidate.
        """
        if not self.stackable:
            (only,) = changes
            with contextlib.ExitStack() as stack:
                weights = {layer: stack.enter_context(change.applied()) for layer, change in only.items()}
                edited = {node: weights[layer] for node, layer in self.layer_of.items()}
                return self.program.run(self.program.result_nodes, {**given, **edited}, samples)
        live: Values = dict(self.program.state)
        copies: Values = {}
        count = len(changes)
        done: set[fx.Node | None] = set()

        def value_of(node: fx.Node) -> Any:
            if node in live:
                return live[node]
            if self.program.is_size(node):
                return self.program.size(node, count * samples)
            if node not in copies:
                repeat = count > 1 and node in self._repeated
                copies[node] = torch.cat([given[node]] * count) if repeat else given[node]
            return copies[node]

        def compute(node: fx.Node) -> Any:
            copies.clear()
            if node in self.splits:
                return self.splits[node].run(value_of, self.program.shape(node, count * samples))
            if node in done:
                return live[node.args[0]]
            op = self.ops.get(node)
            if op is None:
                return self.program.call(node, value_of)
            mine = [change[self.layer_of[op.weight]] for change in changes]
            bias = None if op.bias is None else value_of(op.bias)
            if op.inputs in live:
                return self._below(op, mine, bias, live[op.inputs], samples)
            if op.node in innermost and op.is_matrix and all(one.delta is not None for one in mine):
                rectify = self.rectified.get(node)
                done.add(rectify)
                return _transposed(mine, innermost["result", node], innermost[node], rectify is not None)
            return self._at_root(op, mine, bias, given, innermost)

        execute(self.plan, self._last, live, set(self.program.result_nodes), compute)
        return {node: value_of(node) for node in self.program.result_nodes}

    @staticmethod
    def _at_root(op: WeightedOp, changes: Sequence[LayerChange], bias: Tensor | None, given: Mapping[fx.Node, Any],
                 innermost: Mapping) -> Tensor:
        """All candidates from the same inputs: corrections of the student's own result."""
        base, inputs = given[op.node], given[op.inputs]
        samples = len(base)
        if len(changes) == 1 and changes[0].delta is None and changes[0].survivors is None:
            with changes[0].applied() as weight:
                return op.run(inputs, weight, bias)
        stacked = op.room((len(changes) * samples, *base.shape[1:]), base)
        for k, change in enumerate(changes):
            out = stacked[k * samples:(k + 1) * samples]
            if change.delta is not None:
                add_products(op, out, base, innermost[op.node], change.delta)
            elif change.survivors is not None:
                add_products(op, out, bias, innermost[op.node], change.survivors)
            else:
                with change.applied() as weight:
                    out.copy_(op.run(inputs, weight, bias))
        return stacked

    def _below(self, op: WeightedOp, changes: Sequence[LayerChange], bias: Tensor | None, inputs: Tensor,
               samples: int) -> Tensor:
        """Each candidate from its own inputs."""
        found = []
        for part, change in zip(inputs.split(samples), changes, strict=True):
            if change.survivors is not None:
                out = op.room(self.program.shape(op.node, samples), part)
                add_products(op, out, bias, samples_innermost(op, part), change.survivors)
                found.append(out)
            else:
                with change.applied() as weight:
                    found.append(op.run(part, weight, bias))
        return torch.cat(found) if len(found) > 1 else found[0]


def _transposed(changes: Sequence[LayerChange], base: np.ndarray, inputs: np.ndarray, rectify: bool) -> Tensor:
    """Corrections of a linear layer's result [R, N] for K candidates: [K * N, R], with samples innermost in memory.

    Element-wise operations keep that layout, and a matrix product takes it as it is.
    """
    # PyTorch's memory is aligned alike in every process, on which the rounding of a product may depend; NumPy's is not.
    out = torch.empty(len(base), len(changes), base.shape[1])
    inputs = inputs.reshape(-1, base.shape[1])  # [D, N]
    for k, change in enumerate(changes):
        transposed_rows(out.numpy(), k, base, inputs, change.delta, rectify)
    return out.view(len(base), -1).t()
