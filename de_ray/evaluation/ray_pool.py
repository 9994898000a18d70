"""Replicas in Ray actors, one a device. Actors that fail are replaced, and the pool follows the cluster's size."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from logging import getLogger
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError

from de_ray.checks import first_line
from de_ray.cluster.join import ensure_ray
from de_ray.config import PoolConfig
from de_ray.evaluation.edits import Edit
from de_ray.evaluation.hidden import Group
from de_ray.evaluation.members import DEATHS_ALLOWED, RESUME, EvaluationError, Member
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evaluation.scatter import Scatter
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.request import Request
from de_ray.student import Student

__all__ = ["EvaluationError", "RayClient", "RayPool"]

log = getLogger(__name__)

MUSTER_SECONDS = 30.0
"""How long a client waits for actors that are still starting before it does without them."""


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn Ray's errors about a full store, disk or memory, where spilling did not help, into one that says what to do.

    Raises:
        EvaluationError: instead of them.
    """
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError, OutOfMemoryError) as error:
        raise EvaluationError(f"Ray has no room left ({type(error).__name__}: {first_line(error)}); free memory or "
                              f"disk space, then {RESUME}") from error


def _one(scatter: Scatter, request: Request) -> np.ndarray:
    """Fitness of a single request."""
    scatter.submit(request)
    return scatter.next()[1]


class RayClient:
    """Evaluates on a pool's resident actors from another process, such as a Tune trial; owns no CPU itself.

    Args:
        actors: handles of the pool's `Replica` actors, which hold the driver's student.
        batches: number of calibration batches.
        config: of the pool.
    """

    starts_actors = False

    def __init__(self, actors: list[Any], batches: int, config: PoolConfig) -> None:
        self.members = [Member(actor) for actor in actors]
        self.batches = batches
        self.task_seconds = config.task_seconds
        self._stack = config.stack

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
                 screening: bool = False) -> np.ndarray:
        """See `Evaluator.evaluate`. A lost actor's tasks go to the others: only the driver starts and kills actors."""
        # Clients with a single candidate each, as Tune's trials are, must not all turn to the first actor.
        start = os.getpid() % max(1, len(self.members))
        self.members = self.members[start:] + self.members[:start]
        with _memory_explained():
            return _one(Scatter(self, self._stack), Request(candidates, batches, screening))

    def welcome(self, member: Member, warnings: list[str]) -> None:
        """See `Crew.welcome`; a client's actors have all started."""

    def retire(self, member: Member) -> None:
        """See `Crew.retire`; the driver finds out about the actor itself."""
        if member in self.members:
            self.members.remove(member)


class RayPool:
    """Replicas in Ray actors.

    Args:
        setup: travels through the object store once.
        config: number of actors, their GPUs and threads, the size and time limit of tasks.
        student: the driver's; an actor that starts later takes it over as it then is.
        replica: class of the actors.

    Raises:
        ValueError: the cluster has no room for the configured actors, and no autoscaler that would make some.
    """

    starts_actors = True

    def __init__(self, setup: ReplicaSetup, config: PoolConfig, student: Student,
                 replica: type[Replica] = Replica) -> None:
        ensure_ray()
        resources = ray.cluster_resources()
        cluster_gpus = resources.get("GPU", 0)
        idle = config.autoscale and not resources.get("CPU")  # a head alone, whose workers are to be started
        self._gpus = config.gpus if config.gpus is not None else float(cluster_gpus > 0 or idle)
        if self._gpus > cluster_gpus and not config.autoscale:
            raise ValueError(f"pool.gpus={self._gpus}: expected at most the cluster's {cluster_gpus:g} GPUs")
        self._config = config
        places = self._places()
        if max(1, config.actors) > places and not config.autoscale:
            raise ValueError(f"pool.actors={config.actors}: expected at most {places}, which is what the cluster's "
                             f"{resources.get('CPU', 0):g} CPUs and {cluster_gpus:g} GPUs have room for with "
                             f"pool.threads={config.threads} and pool.gpus={self._gpus:g}")
        if self._gpus and student.weights[0].device.type == "cpu":
            log.warning("evaluators have GPUs, and this process has none: it takes its CPU for saliencies, refit and "
                        "reports; start it on a machine with a GPU, or take pool.gpus=0")
        setup = setup.for_device("cuda" if self._gpus else "cpu")
        # Spread: a node that leaves should take few of them along, and object stores and memory are per node. Within a
        # trial of Tune's they take the places that it has reserved, which any strategy of their own would pass by.
        reserved = ray.util.get_current_placement_group() is not None
        self._actor_class = ray.remote(replica).options(num_cpus=0 if self._gpus else config.threads,
                                                        num_gpus=self._gpus,
                                                        **({} if reserved else {"scheduling_strategy": "SPREAD"}))
        with _memory_explained():
            self._setup = ray.put(setup)
        self._student = student
        self._student_moved = False  # until then new replicas, which hold the teacher, need nothing
        self._state: Any = None  # the student in the object store, while new replicas of one evaluation need it
        self.batches = len(setup.batches)
        self.evaluations = 0
        self.task_seconds = config.task_seconds
        self.members: list[Member] = []
        self._warned: set[str] = set()
        self._grow()

    @property
    def actors(self) -> list[Any]:
        """Handles of the actors that have started."""
        return [member.actor for member in self.members if member.ready]

    def _places(self) -> int:
        """Actors for which the cluster has room, as it is now."""
        resources = ray.cluster_resources()
        if self._gpus:
            gpus = resources.get("GPU", 0)
            return int(gpus) * int(1 / self._gpus) if self._gpus < 1 else int(gpus / self._gpus)  # none is on two GPUs
        return int(resources.get("CPU", 1) / self._config.threads)

    def _grow(self) -> None:
        """Start actors up to the configured number, or to what the cluster now has room for; does not wait for them.

        An actor for which nothing is free stays in Ray's queue and starts when a node joins.
        """
        self._size = self._config.actors or max(1, self._places())
        while len(self.members) < self._size:
            self._start(losses=0)

    def _start(self, losses: int) -> Member:
        actor = self._actor_class.remote(self._setup)
        member = Member(actor, ready=False, losses=losses)
        member.push(actor.warnings.remote())
        self.members.append(member)
        return member

    def welcome(self, member: Member, warnings: list[str]) -> None:
        """See `Crew.welcome`."""
        for text in warnings:
            if text not in self._warned:  # one actor warns of what the others do
                self._warned.add(text)
                log.warning("%s", text)
        if self._student_moved:
            self._state = self._state or ray.put(self._student.state())
            member.push(member.actor.load_state.remote(self._state))
        member.ready = True

    def retire(self, member: Member) -> Member | None:
        """See `Crew.retire`."""
        if member not in self.members:
            return None
        self.members.remove(member)
        ray.kill(member.actor)
        losses = 0 if member.proven else member.losses + 1
        # Where no actor ever comes to answer, something is wrong that a further one does not cure.
        return self._start(losses) if len(self.members) < self._size and losses <= DEATHS_ALLOWED else None

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
                 screening: bool = False) -> np.ndarray:
        """See `Evaluator.evaluate`."""
        with self.dispatch() as scatter:
            return _one(scatter, Request(candidates, batches, screening))

    @contextlib.contextmanager
    def dispatch(self) -> Iterator[Scatter]:
        """See `Pool.dispatch`. Grows at first, and leaves no copy of the student in the object store at last."""
        try:
            with _memory_explained():
                self._grow()
                scatter = Scatter(self, self._config.stack)
                yield scatter
                self.evaluations += scatter.candidates
        finally:
            self._state = None

    def _broadcast(self, method: str, payload: Any) -> None:
        """Call a method of every actor that has started; the others take over the whole student when they have.

        Each actor carries out its calls in order, so nothing is awaited here. The next evaluation looks whether they
        succeeded; the payload leaves the object store with the last of them.
        """
        self._student_moved = True
        with _memory_explained():
            reference = ray.put(payload)
            for member in self.members:
                if member.ready:
                    member.push(getattr(member.actor, method).remote(reference))

    def commit(self, candidate: Candidate) -> None:
        """See `Pool.commit`."""
        self._broadcast("commit", candidate)

    def refresh(self, student: Student) -> None:
        """See `Pool.refresh`."""
        self._broadcast("set_values", student.values())

    def load(self, student: Student) -> None:
        """See `Pool.load`."""
        self._broadcast("load_state", student.state())

    def hidden(self) -> list[Group]:
        """See `Pool.hidden`; of the first actor that answers.

        Raises:
            EvaluationError: none does.
        """
        for _ in range(DEATHS_ALLOWED + 1):
            with self.dispatch() as scatter:
                scatter.muster(0.0)
            for member in [member for member in self.members if member.ready]:
                try:
                    return ray.get(member.actor.hidden.remote(), timeout=self.task_seconds)
                except RayError as error:
                    log.warning("a replica is lost before it told the network's hidden units: %r", error)
                    self.retire(member)
        raise EvaluationError(f"no replica tells the network's hidden units; {RESUME}")

    def client(self) -> RayClient:
        """A light object that travels to other processes.

        Raises:
            EvaluationError: no actor could start.
        """
        with self.dispatch() as scatter:
            # Another process's calls are not queued behind the driver's: only actors that are up to date may go.
            scatter.muster(MUSTER_SECONDS)
        return RayClient([member.actor for member in self.members if member.ready and not member.queue], self.batches,
                         self._config)

    def peak_mb(self) -> list[float]:
        """See `Pool.peak_mb`; of the actors that have started and answer."""
        peaks = []
        for call in [actor.peak_mb.remote() for actor in self.actors]:
            with contextlib.suppress(RayError):  # it died, which the next evaluation deals with
                peaks.append(ray.get(call, timeout=self.task_seconds))
        return peaks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if ray.is_initialized():  # else the session took its actors with it, and ray.kill would start another one
            for member in self.members:
                ray.kill(member.actor)
        self.members = []
