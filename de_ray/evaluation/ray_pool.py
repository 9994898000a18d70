"""Replicas in Ray actors, one a device. Actors that die are replaced and their candidates evaluated again."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from de_ray.config import PoolConfig
from de_ray.evaluation.replica import Edit, Replica, ReplicaSetup
from de_ray.evolution.candidate import Candidate
from de_ray.student import Student

log = logging.getLogger(__name__)

TASKS_IN_FLIGHT = 2
"""Tasks an actor: one runs while the next one waits at the actor."""
TASKS_AN_ACTOR = 4
"""Tasks into which an evaluation is cut for each actor, so that fast actors take over from slow ones."""
DEATHS_ALLOWED = 3
"""Actors that may die one after the other without any task finishing in between."""


def ensure_ray() -> None:
    """Start Ray in this process unless it runs: the jobs of a multirun share one session."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)


class EvaluationError(RuntimeError):
    """A candidate could not be evaluated on any replica."""


def scatter(actors: list[Any], candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int],
            replace: Any) -> np.ndarray:
    """Evaluate candidates on actors, a bounded number of tasks in flight, and place the answers by index.

    Args:
        actors: handles of `Replica` actors; a dead one's entry is replaced in place.
        candidates: K candidates.
        batches: indices of calibration batches.
        replace: index of a dead actor -> a new handle.

    Returns:
        float64 [K].

    Raises:
        EvaluationError: a replica raised, or `DEATHS_ALLOWED` actors in a row died without an answer.
    """
    size = max(1, len(candidates) // (TASKS_AN_ACTOR * len(actors)))
    todo = deque(range(start, min(start + size, len(candidates))) for start in range(0, len(candidates), size))
    fitness = np.full(len(candidates), np.nan)
    flying: dict[Any, tuple[int, range]] = {}
    deaths = 0
    while todo or flying:
        for a, actor in enumerate(actors):
            while todo and sum(owner == a for owner, _ in flying.values()) < TASKS_IN_FLIGHT:
                chunk = todo.popleft()
                flying[actor.evaluate.remote([candidates[k] for k in chunk], list(batches))] = (a, chunk)
        ready, _ = ray.wait(list(flying), num_returns=1)
        a, chunk = flying.pop(ready[0])
        try:
            fitness[chunk.start:chunk.stop] = ray.get(ready[0])
            deaths = 0
        except RayActorError as error:
            deaths += 1
            if deaths > DEATHS_ALLOWED:
                raise EvaluationError(f"{deaths} replicas died one after the other, the last with: {error}") from error
            log.warning("replica %d died; it is replaced and its candidates are evaluated again", a)
            lost = [ref for ref, (owner, _) in flying.items() if owner == a]
            todo.extendleft([chunk, *(flying.pop(ref)[1] for ref in lost)])
            actors[a] = replace(a)
        except RayTaskError as error:
            raise EvaluationError(f"a replica could not evaluate a candidate: {error.cause!r}") from error
    return fitness


class RayClient:
    """Evaluates on a pool's resident actors from another process, such as a Tune trial; owns no CPU itself."""

    def __init__(self, actors: list[Any], batches: int) -> None:
        self._actors = actors
        self.batches = batches

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int]) -> np.ndarray:
        """See `Evaluator.evaluate`. A dead actor's tasks go to the next one: only the driver starts new actors."""
        return scatter(list(self._actors), candidates, batches, lambda a: self._actors[(a + 1) % len(self._actors)])


class RayPool:
    """Replicas in Ray actors.

    Args:
        setup: travels through the object store once.
        config: number of actors, their GPUs and threads.
        student: the driver's; a replaced actor takes it over as it then is.
    """

    def __init__(self, setup: ReplicaSetup, config: PoolConfig, student: Student) -> None:
        ensure_ray()
        resources = ray.cluster_resources()
        cluster_gpus = resources.get("GPU", 0)
        gpus = config.gpus if config.gpus is not None else float(cluster_gpus > 0)
        if gpus > cluster_gpus:
            raise ValueError(f"pool.gpus={gpus}: expected at most the cluster's {cluster_gpus:g} GPUs")
        places = int(cluster_gpus / gpus) if gpus else int(resources.get("CPU", 1) / config.threads)
        count = config.actors or max(1, places)
        if count > places:
            raise ValueError(f"pool.actors={config.actors}: expected at most {places}, which is what the cluster's "
                             f"{resources.get('CPU', 0):g} CPUs and {cluster_gpus:g} GPUs have room for with "
                             f"pool.threads={config.threads} and pool.gpus={gpus:g}")
        setup.device = "cuda" if gpus else "cpu"
        self._actor_class = ray.remote(Replica).options(num_cpus=0 if gpus else config.threads, num_gpus=gpus)
        self._setup = ray.put(setup)
        self._student = student
        self.batches = len(setup.batches)
        self.evaluations = 0
        self._actors = [self._actor_class.remote(self._setup) for _ in range(count)]

    def _replace(self, _: int) -> Any:
        """A new actor that holds the driver's student."""
        actor = self._actor_class.remote(self._setup)
        actor.load_state.remote(self._student.state())
        return actor

    def evaluate(self, candidates: Sequence[tuple[Edit, ...]], batches: Sequence[int]) -> np.ndarray:
        """See `Evaluator.evaluate`."""
        self.evaluations += len(candidates)
        return scatter(self._actors, candidates, batches, self._replace)

    def _broadcast(self, method: str, payload: Any) -> None:
        """Call a method of every actor; each actor runs its tasks in order, so nothing needs to be awaited."""
        reference = ray.put(payload)
        for actor in self._actors:
            getattr(actor, method).remote(reference)

    def commit(self, candidate: Candidate) -> None:
        """See `Pool.commit`."""
        self._broadcast("commit", candidate)

    def refresh(self, student: Student) -> None:
        """See `Pool.refresh`."""
        self._broadcast("set_values", student.values())

    def load(self, student: Student) -> None:
        """See `Pool.load`."""
        self._broadcast("load_state", student.state())

    def client(self) -> RayClient:
        """A light object that travels to other processes."""
        return RayClient(list(self._actors), self.batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
