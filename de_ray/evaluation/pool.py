"""Pools: replicas behind one contract, `evaluate(candidates, batches) -> fitness in the candidates' order`."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, Self

import numpy as np

from de_ray.evaluation.chunks import tasks
from de_ray.evaluation.edits import Edit
from de_ray.evaluation.hidden import Group
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.request import Dispatch, Request
from de_ray.student import Student


class Evaluator(Protocol):
    """What a search needs of a pool."""

    batches: int
    """Number of calibration batches."""

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
                 screening: bool = False) -> np.ndarray:
        """Mean divergence of each candidate over the named batches.

        Args:
            candidates: K candidates.
            batches: indices of calibration batches.
            screening: whether a lower precision, where one is configured, is good enough.

        Returns:
            float64 [K], in the candidates' order, non-finite for failures.
        """
        ...


class Pool(Evaluator, Protocol):
    """An evaluator whose replicas follow the driver's student. Use it as a context manager."""

    evaluations: int
    """Candidates evaluated so far."""

    def dispatch(self) -> AbstractContextManager[Dispatch]:
        """Several requests at a time, within a `with` statement in which the pool does nothing else."""
        ...

    def commit(self, candidate: Candidate) -> None:
        """Carry out a candidate on every replica."""
        ...

    def refresh(self, student: Student) -> None:
        """Send the refitted survivors of a student whose masks the replicas have already."""
        ...

    def load(self, student: Student) -> None:
        """Send a whole student."""
        ...

    def hidden(self) -> list[Group]:
        """See `Replica.hidden`."""
        ...

    def client(self) -> Evaluator:
        """An evaluator on the same replicas for another process; see each pool."""
        ...

    def peak_mb(self) -> list[float]:
        """Peak resident memory by evaluator, in MB."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def students_divergence(pool: Evaluator) -> float:
    """Of the student that the replicas hold, on all batches."""
    return float(pool.evaluate([()], range(pool.batches))[0])


class SerialPool:
    """One replica in this process.

    Args:
        setup: what the replica is built from.
        stack: the most candidates that it is given at a time, >= 1.
        replica: its class.
    """

    def __init__(self, setup: ReplicaSetup, stack: int, replica: type[Replica] = Replica) -> None:
        self._replica = replica(setup)
        self._stack = stack
        self.batches = len(setup.batches)
        self.evaluations = 0

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
                 screening: bool = False) -> np.ndarray:
        """See `Evaluator.evaluate`."""
        self.evaluations += len(candidates)
        fitness = np.full(len(candidates), np.nan)  # [K]
        for indices in tasks(candidates, self._stack):
            fitness[indices] = self._replica.evaluate([candidates[k] for k in indices], batches, screening)
        return fitness

    @contextmanager
    def dispatch(self) -> Iterator[Dispatch]:
        """See `Pool.dispatch`; one after the other, in the order in which they are submitted."""
        yield InOrder(self)

    def commit(self, candidate: Candidate) -> None:
        """See `Pool.commit`."""
        self._replica.commit(candidate)

    def refresh(self, student: Student) -> None:
        """See `Pool.refresh`."""
        self._replica.set_values(student.values())

    def load(self, student: Student) -> None:
        """See `Pool.load`."""
        self._replica.load_state(student.state())

    def hidden(self) -> list[Group]:
        """See `Pool.hidden`."""
        return self._replica.hidden()

    def client(self) -> Evaluator:
        """This pool itself: its replica lives in this process."""
        return self

    def peak_mb(self) -> list[float]:
        """See `Pool.peak_mb`; of this process."""
        return [self._replica.peak_mb()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._replica


class InOrder:
    """Evaluates requests one after the other; see `Dispatch`.

    Args:
        pool: evaluates.
    """

    def __init__(self, pool: Evaluator) -> None:
        self._pool = pool
        self._requests: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """See `Dispatch.submit`."""
        self._requests.append(request)

    def next(self) -> tuple[Request, np.ndarray]:
        """See `Dispatch.next`."""
        if not self._requests:
            raise ValueError("every request has been answered")
        request = self._requests.popleft()
        return request, self._pool.evaluate(request.candidates, request.batches, request.screening)
