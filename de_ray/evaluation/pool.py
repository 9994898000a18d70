"""Pools: replicas behind one contract, `evaluate(candidates, batches) -> fitness in the candidates' order`."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np

from de_ray.evaluation.replica import Edit, Replica, ReplicaSetup
from de_ray.evolution.candidate import Candidate
from de_ray.student import Student


class Evaluator(Protocol):
    """What a search needs of a pool."""

    batches: int
    """Number of calibration batches."""

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int]) -> np.ndarray:
        """Mean divergence over the named batches: float64 [K], in the candidates' order, non-finite for failures."""
        ...


class Pool(Evaluator, Protocol):
    """An evaluator whose replicas follow the driver's student. Use it as a context manager."""

    evaluations: int
    """Candidates evaluated so far."""

    def commit(self, candidate: Candidate) -> None:
        """Carry out a candidate on every replica."""
        ...

    def refresh(self, student: Student) -> None:
        """Send the refitted survivors of a student whose masks the replicas have already."""
        ...

    def load(self, student: Student) -> None:
        """Send a whole student."""
        ...

    def client(self) -> Evaluator:
        """An evaluator on the same replicas for another process; see each pool."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class SerialPool:
    """One replica in this process."""

    def __init__(self, setup: ReplicaSetup) -> None:
        self._replica = Replica(setup)
        self.batches = len(setup.batches)
        self.evaluations = 0

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int]) -> np.ndarray:
        """See `Evaluator.evaluate`."""
        self.evaluations += len(candidates)
        return self._replica.evaluate(candidates, batches)

    def commit(self, candidate: Candidate) -> None:
        """See `Pool.commit`."""
        self._replica.commit(candidate)

    def refresh(self, student: Student) -> None:
        """See `Pool.refresh`."""
        self._replica.set_values(student.values())

    def load(self, student: Student) -> None:
        """See `Pool.load`."""
        self._replica.load_state(student.state())

    def client(self) -> Evaluator:
        """This pool itself: its replica lives in this process."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._replica
