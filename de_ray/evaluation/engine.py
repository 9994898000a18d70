"""Evaluates candidates by running only what depends on the layers that they change."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from de_ray.device import precision
from de_ray.evaluation.activations import Activations, Key
from de_ray.evaluation.edits import Edit, LayerChange
from de_ray.evaluation.program import Program, Values
from de_ray.evaluation.sparse import samples_innermost
from de_ray.evaluation.suffix import Suffix
from de_ray.evolution.candidate import Candidate
from de_ray.problem.base import Output
from de_ray.student import Student

MEGABYTE = 2**20
CPU_STACK_BYTES = 16 * MEGABYTE
"""What a stack of candidates may take on a CPU. Stacking saves calls, but a stack that leaves the caches loses more:
with 256 images, LeNet-5's first convolution takes 1.6 times as long stacked 16-fold, its last layer 0.7 times."""
SUFFIXES = 512
"""Suffixes that are remembered; a search may leave out any layers from a candidate."""

Changes = Mapping[int, LayerChange]
"""A candidate's edits by layer."""


class Engine:
    """Outputs of a student under candidates.

    Args:
        program: the student's module, captured.
        student: whose weights the program reads.
        batches: calibration batches [N, ...].
        cache_mb: megabytes of activations to keep, and again what a stack of candidates may take.
    """

    def __init__(self, program: Program, student: Student, batches: Sequence[Tensor], cache_mb: int) -> None:
        self.program, self._student, self._batches = program, student, batches
        self._budget = cache_mb * MEGABYTE
        self._activations = Activations(self._budget)
        self._readers = [program.readers(weight) for weight in student.weights]
        self._suffixes: dict[tuple[int, ...], Suffix] = {}
        singles = [self.suffix((layer,)) for layer in range(len(student.weights))]
        self._worth_keeping = frozenset(node for one in singles for node in one.needs)

    def outputs(self, candidates: Sequence[Changes], batch: int, in_precision: str) -> Iterator[tuple[int, Output]]:
        """The student's outputs under candidates that change the same layers.

        Args:
            candidates: K candidates, see `changes`.
            batch: index of a calibration batch.
            in_precision: of the pass; see `device.precision`.

        Yields:
            (k, outputs [k * N, ...]) for the next k candidates, stacked.
        """
        layers = tuple(candidates[0])
        samples = len(self._batches[batch])
        if not layers:
            values = self._values(self.program.result_nodes, batch)
            for _ in candidates:
                yield 1, self.program.assemble(values)
            return
        suffix = self.suffix(layers)
        given = self._values(suffix.needs, batch)
        stack = self.stack(layers, samples)
        for start in range(0, len(candidates), stack):
            some = candidates[start:start + stack]
            innermost = self._innermost(suffix, some, given, batch) if suffix.stackable else {}
            with precision(in_precision, self._student.weights[0].device):
                values = suffix.run(some, given, innermost, samples)
            yield len(some), self.program.assemble(values)

    def changes(self, candidate: tuple[Edit, ...]) -> Changes:
        """A candidate prepared for any number of batches."""
        return {edit.layer: LayerChange(self._student, edit) for edit in candidate}

    def stack(self, layers: tuple[int, ...], samples: int) -> int:
        """Candidates of these layers that fit into the budget together."""
        suffix = self.suffix(layers)
        if not suffix.stackable:
            return 1
        on_cpu = self._student.weights[0].device.type == "cpu"
        room = min(self._budget, CPU_STACK_BYTES) if on_cpu else self._budget
        return max(1, room // max(1, suffix.bytes_a_candidate(samples)))

    def committed(self, candidate: Candidate) -> None:
        """The student's masks changed: forget what depends on them."""
        weights = [node for change in candidate for node in self._readers[change.layer]]
        if weights:
            stale = self.program.dependents(weights)
            self._activations.forget({*stale, *((kind, node) for kind in ("innermost", "result") for node in stale)})

    def refitted(self) -> None:
        """The student's values changed: forget everything."""
        self._activations.forget()

    def next_call(self) -> None:
        """Another evaluation starts."""
        self._activations.next_call()

    def suffix(self, layers: tuple[int, ...]) -> Suffix:
        """What is run again for candidates of these layers."""
        if layers not in self._suffixes:
            if len(self._suffixes) >= SUFFIXES:
                del self._suffixes[next(iter(self._suffixes))]
            self._suffixes[layers] = Suffix(self.program, {layer: self._readers[layer] for layer in layers})
        return self._suffixes[layers]

    def _values(self, targets: Sequence[fx.Node], batch: int) -> Values:
        """Values of nodes under the student as it is, from what is kept as far as that goes."""
        found: Values = {self.program.given: self._batches[batch]}
        missing = []
        for node in targets:
            value = self._activations.get((batch, node))
            if value is not None:
                found[node] = value
            elif node not in found:
                missing.append(node)
        if missing:
            for what in self._activations.known(batch):
                if isinstance(what, fx.Node) and what not in found:
                    found[what] = self._activations.peek((batch, what))

            def keep(node: fx.Node, value: Any) -> None:
                if node in self._worth_keeping or node in missing:
                    self._activations.put((batch, node), value)

            found |= self.program.run(missing, found, len(self._batches[batch]), keep)
        return {node: found[node] for node in targets}

    def _innermost(self, suffix: Suffix, changes: Sequence[Changes], given: Values,
                   batch: int) -> dict[Hashable, np.ndarray]:
        """Inputs and results of root operations in the layout of sparse corrections; see `Suffix.run`."""
        found = {}
        for op in suffix.roots:
            layer = suffix.layer_of[op.weight]
            if all(change[layer].delta is None and change[layer].survivors is None for change in changes):
                continue
            found[op.node] = self._laid_out((batch, ("innermost", op.inputs)),
                                            lambda op=op: samples_innermost(op, given[op.inputs]))
            if op.is_matrix:
                found["result", op.node] = self._laid_out((batch, ("result", op.node)),
                                                          lambda op=op: given[op.node].float().t().contiguous().numpy())
        return found

    def _laid_out(self, key: Key, compute: Callable[[], np.ndarray]) -> np.ndarray:
        value = self._activations.get(key)
        if value is None:
            value = compute()
            self._activations.put(key, value)
        return value
