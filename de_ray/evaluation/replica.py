"""A resident student on one device, which evaluates candidates against the teacher."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from de_ray.device import resolve_device, threads
from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.problem.base import Divergence, Layer, Problem
from de_ray.student import Student


class WeightEdit(Protocol):
    """A change of one layer's weight other than a zeroing set, such as a choice of levels."""

    layer: int

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight; the given one stays as it is."""
        ...


Edit = ZeroingSet | WeightEdit


class ReplicaSetup:
    """What a replica is built from, without the inputs that only the driver needs; travels to actors once."""

    def __init__(self, problem: Problem, batch: int, device: str, thread_count: int) -> None:
        self.teacher: nn.Module = problem.teacher
        self.layers: tuple[Layer, ...] = problem.layers
        self.batches: tuple[Tensor, ...] = problem.calibration.split(batch)
        self.divergence: Divergence = problem.divergence
        self.device = device
        self.threads = thread_count


class Replica:
    """A student with the calibration batches and the teacher's outputs on them."""

    def __init__(self, setup: ReplicaSetup) -> None:
        self.device = resolve_device(setup.device)
        self.threads = setup.threads
        self.divergence = setup.divergence
        self.student = Student(setup.teacher, setup.layers, self.device)
        self.batches = [batch.to(self.device) for batch in setup.batches]
        with threads(self.threads), torch.inference_mode():
            # The student is still the teacher here, so that no second network is needed.
            self.teacher_outputs = [self.student.module(batch) for batch in self.batches]

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int]) -> np.ndarray:
        """Mean divergence of each candidate over the named calibration batches.

        Args:
            candidates: K candidates; each is undone before the next one is tried.
            batches: indices of calibration batches.

        Returns:
            float64 [K]; non-finite where a candidate's divergence is.
        """
        with threads(self.threads), torch.inference_mode():
            return np.array([self._evaluate_one(candidate, batches) for candidate in candidates], np.float64)

    def _evaluate_one(self, candidate: tuple[Edit, ...], batches: Sequence[int]) -> float:
        total, samples = 0.0, 0
        with self._edited(candidate):
            for b in batches:
                divergence = self.divergence(self.teacher_outputs[b], self.student.module(self.batches[b]))  # [N]
                total += float(divergence.double().sum())
                samples += len(divergence)
        return total / samples

    @contextlib.contextmanager
    def _edited(self, candidate: tuple[Edit, ...]) -> Iterator[None]:
        """Carry out a candidate's edits for the time of the context."""
        undo = []
        try:
            for edit in candidate:
                weight = self.student.weights[edit.layer].data
                if isinstance(edit, ZeroingSet):
                    changed = torch.from_numpy(np.concatenate([edit.zero, edit.revive])).to(self.device)
                    flat = weight.view(-1)
                    undo.append((flat, changed, flat[changed]))
                    flat[changed[:len(edit.zero)]] = 0.0
                    revived = changed[len(edit.zero):]
                    flat[revived] = self.student.dormant[edit.layer].view(-1)[revived]
                else:
                    undo.append((weight, slice(None), weight.clone()))
                    weight.copy_(edit.apply(weight))
            yield
        finally:
            for tensor, index, values in reversed(undo):
                tensor[index] = values

    def commit(self, candidate: Candidate) -> None:
        """Carry out a candidate for good."""
        self.student.commit(candidate)

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Take over refitted survivors; see `Student.values`."""
        self.student.set_values(values)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a whole student; see `Student.state`."""
        self.student.load_state(state)
