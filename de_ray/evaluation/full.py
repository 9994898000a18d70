"""Outputs by full forward passes, for networks that cannot be run in parts."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from de_ray.device import precision
from de_ray.evaluation.edits import Edit, LayerChange
from de_ray.evolution.candidate import Candidate
from de_ray.problem.base import Output
from de_ray.student import Student


class FullForwards:
    """Behind the same methods as `Engine`; weights are edited in place and restored."""

    def __init__(self, student: Student, batches: Sequence[Tensor]) -> None:
        self._student, self._batches = student, batches

    def changes(self, candidate: tuple[Edit, ...]) -> list[LayerChange]:
        """A candidate prepared for any number of batches."""
        return [LayerChange(self._student, edit) for edit in candidate]

    def outputs(self, candidates: Sequence[list[LayerChange]], batch: int,
                in_precision: str) -> Iterator[tuple[int, Output]]:
        """One by one; see `Engine.outputs`."""
        for changes in candidates:
            with contextlib.ExitStack() as stack:
                for change in changes:
                    weight = self._student.weights[change.layer]
                    edited = stack.enter_context(change.applied())
                    if edited.data_ptr() != weight.data_ptr():
                        stack.callback(weight.data.copy_, weight.data.clone())
                        weight.data.copy_(edited)
                stack.enter_context(precision(in_precision, self._student.weights[0].device))
                output = self._student.module(self._batches[batch])
            yield 1, output

    def committed(self, candidate: Candidate) -> None:
        """Nothing is kept."""

    def refitted(self) -> None:
        """Nothing is kept."""

    def next_call(self) -> None:
        """Nothing is kept."""
