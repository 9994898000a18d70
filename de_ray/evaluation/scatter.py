"""Requests evaluated on actors that may die, raise, hang or answer NaN: tasks handed out, answers placed by index.

Whatever happens to actors, a task's answer is that of a sound replica on exactly the task's candidates, so the fitness
does not depend on what went wrong on the way.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from de_ray.checks import last_line
from de_ray.evaluation.chunks import tasks
from de_ray.evaluation.members import DEATHS_ALLOWED, RESUME, Crew, EvaluationError, Member
from de_ray.evaluation.parcel import Parcel
from de_ray.evolution.request import Request

log = getLogger(__name__)

TASKS_IN_FLIGHT = 2
"""Tasks an actor: one runs while the next one waits at the actor."""


@dataclass(eq=False)
class Job:
    """A request that is under way."""

    request: Request
    tasks: Iterator[list[int]]
    """Indices of candidates, of tasks that nobody was given yet; candidates may be bred as they are read."""
    fitness: np.ndarray
    """float64 [K]"""
    unsettled: int = 0
    """Of the tasks that were read."""
    settled: dict[Member, list["Task"]] = field(default_factory=lambda: defaultdict(list))
    """Tasks by who answered them."""


@dataclass(eq=False)
class Task:
    """Candidates that are evaluated in one call."""

    job: Job
    indices: list[int]
    losses: int = 0
    """Actors that were lost over it."""
    raised: bool = False
    """Whether an actor raised an exception over it."""
    doubted: tuple[Member, np.ndarray] | None = None
    """An answer that is not all finite, and who gave it: another actor is to say whether that is the candidates'."""


class Scatter:
    """Evaluates requests, several at a time if need be; see `Dispatch`.

    Args:
        crew: its dead, hung and faulty members are retired on the way.
        stack: candidates a task, at most.
    """

    def __init__(self, crew: Crew, stack: int) -> None:
        self._crew, self._stack = crew, stack
        self.candidates = 0
        """Submitted so far."""
        self._jobs: list[Job] = []
        """Those whose answer was not fetched."""
        self._unread: deque[Job] = deque()
        """Those that may have tasks which nobody was given, the next one first."""
        self._done: deque[Job] = deque()
        self._todo: deque[Task] = deque()
        self._flying: dict[Any, Task] = {}
        self._owners: dict[Any, Member] = {}  # of all calls that are awaited, starts and commits among them
        self._arrived: set[Any] = set()
        now = time.monotonic()
        for member in crew.members:
            member.since = now  # nobody was listening before
            self._await_calls_of(member)
        self._next_check = now + crew.task_seconds

    def submit(self, request: Request) -> None:
        """See `Dispatch.submit`. Candidates that are only screened are handed out after all others."""
        count = len(request.candidates)
        self.candidates += count
        job = Job(request, tasks(request.candidates, self._stack), np.full(count, np.nan))
        self._jobs.append(job)
        if count == 0:
            self._done.append(job)
        elif request.screening:
            self._unread.append(job)
        else:
            self._unread.insert(sum(not other.request.screening for other in self._unread), job)

    def next(self) -> tuple[Request, np.ndarray]:
        """See `Dispatch.next`.

        Returns:
            A request, and its fitness; non-finite where two replicas agree on it.

        Raises:
            EvaluationError: two replicas raised over a task, more than `DEATHS_ALLOWED` were lost over one, or there
                is no replica left.
            ValueError: every request has been answered.
        """
        if not self._jobs:
            raise ValueError("every request has been answered")
        self._feed(self._crew.members)
        while not self._done:
            if not self._flying and self._todo:
                self._find_second_opinion()
            self._collect()
        job = self._done.popleft()
        self._jobs.remove(job)
        return job.request, job.fitness

    def muster(self, seconds: float) -> None:
        """Wait until actors have started and caught up; after `seconds`, until at least one has."""
        until = time.monotonic() + seconds
        while self._owners and time.monotonic() < until:
            self._collect(until)
        while not any(member.ready and not member.queue for member in self._crew.members):
            self._collect()

    def _await_calls_of(self, member: Member) -> None:
        self._owners.update((call, member) for call in member.queue)

    # Tasks out.

    def _feed(self, members: Iterable[Member]) -> None:
        """Fill up members' queues, one task a member and round, so that few tasks spread over many members."""
        for _ in range(TASKS_IN_FLIGHT):
            for member in members:
                free = member.ready and sum(c in self._flying for c in member.queue) < TASKS_IN_FLIGHT
                task = self._task_for(member) if free else None
                if task is not None:
                    request = task.job.request
                    candidates = Parcel([request.candidates[k] for k in task.indices])
                    call = member.actor.evaluate.remote(candidates, request.batches, request.screening)
                    member.push(call)
                    self._flying[call], self._owners[call] = task, member

    def _task_for(self, member: Member) -> Task | None:
        """The first task that is not a doubt about this very member."""
        for position, task in enumerate(self._todo):
            if task.doubted is None or task.doubted[0] is not member:
                del self._todo[position]
                return task
        return self._read()

    def _read(self) -> Task | None:
        """The next task of those that nobody was given yet."""
        while self._unread:
            task = self._read_of(self._unread[0])
            if task is not None:
                return task
            self._unread.popleft()
        return None

    @staticmethod
    def _read_of(job: Job) -> Task | None:
        indices = next(job.tasks, None)
        job.unsettled += indices is not None
        return None if indices is None else Task(job, indices)

    def _find_second_opinion(self) -> None:
        """The only ready member's own doubtful answers are left: have it replaced, or let them stand."""
        ready = [member for member in self._crew.members if member.ready]
        if not ready:
            return
        assert len(ready) == 1, "a second member would have taken the tasks"
        if self._crew.starts_actors:
            self._dismiss(ready[0])
        else:
            while self._todo:
                task = self._todo.popleft()
                self._settle(task, *task.doubted)

    # Answers in.

    def _collect(self, until: float = math.inf) -> None:
        """Wait for a call to end, at most until some time, take all that have ended, and hand out tasks."""
        if not self._owners:
            return
        patience = max(0.0, min(self._next_check, until) - time.monotonic())
        ended, others = ray.wait(list(self._owners), num_returns=1, timeout=patience)
        if ended and others:
            ended += ray.wait(others, num_returns=len(others), timeout=0)[0]
        waiting = len(self._todo)
        touched = {}
        for call in ended:
            touched[self._owners.pop(call)] = None
            self._arrived.add(call)
        for member in touched:
            # In the order of the calls: a task's answer counts only if the commits before it succeeded.
            while member.queue and member.queue[0] in self._arrived:
                self._hear(member, member.queue.popleft())
        self._retire_the_hung()
        # Tasks that came back are for anybody.
        self._feed(self._crew.members if len(self._todo) > waiting else touched)

    def _hear(self, member: Member, call: Any) -> None:
        self._arrived.discard(call)
        task = self._flying.pop(call, None)
        member.since = time.monotonic()
        try:
            answer = ray.get(call)
        except RayTaskError as error:
            if task is not None and task.raised:
                raise EvaluationError(f"two replicas could not evaluate a candidate: {error.cause!r}") from error
            if task is not None:
                task.raised = True
            self._lose(member, task, f"it raised {error.cause!r}")
        except RayError as error:
            self._lose(member, task, last_line(error))
        else:
            if task is not None:
                member.proven = True
                self._judge(member, task, answer)
            elif not member.ready:
                self._crew.welcome(member, answer)
                self._await_calls_of(member)

    def _judge(self, member: Member, task: Task, answer: np.ndarray) -> None:
        """Settle a task, or ask for a second opinion; of two opinions the finite one is right."""
        finite = np.isfinite(answer)
        if task.doubted is None:
            if finite.all():
                self._settle(task, member, answer)
            else:
                task.doubted = member, answer
                self._todo.appendleft(task)
            return
        first, before = task.doubted
        task.doubted = None
        first_is_faulty = bool((finite & ~np.isfinite(before)).any())
        second_is_faulty = bool((np.isfinite(before) & ~finite).any())
        if not first_is_faulty:
            self._settle(task, first, before)
        elif not second_is_faulty:
            self._settle(task, member, answer)
        else:
            self._charge(task, "two replicas answered NaN for different candidates")
            self._todo.appendleft(task)
        for faulty in [first] * first_is_faulty + [member] * second_is_faulty:
            log.warning("a replica answered NaN where another one did not; it is replaced and what it answered of "
                        "this evaluation is evaluated again")
            self._disown(faulty)

    def _settle(self, task: Task, member: Member, answer: np.ndarray) -> None:
        job = task.job
        job.fitness[task.indices] = answer
        job.settled[member].append(task)
        job.unsettled -= 1
        if job.unsettled:
            return
        another = self._read_of(job)  # else nobody may be there to ask for one and find that there is none
        if another is not None:
            self._todo.append(another)
        else:
            self._done.append(job)

    # Actors that fail.

    def _disown(self, member: Member) -> None:
        """Take back all that a faulty member answered of requests whose answers were not fetched; part with it."""
        for job in self._jobs:
            answered = job.settled.pop(member, [])
            if answered and job in self._done:
                self._done.remove(job)
            job.unsettled += len(answered)
            self._todo.extend(answered)
        for task in [*self._todo, *self._flying.values()]:
            if task.doubted is not None and task.doubted[0] is member:
                task.doubted = None
        self._dismiss(member)

    def _lose(self, member: Member, task: Task | None, why: str) -> None:
        """Give up a member that died, raised or hung over a task, or over what came before its tasks (None)."""
        log.warning("a replica is lost; its candidates are evaluated again: %s", why)
        if task is not None:
            self._charge(task, why)
        self._dismiss(member, why)
        if task is not None:
            self._todo.appendleft(task)

    def _charge(self, task: Task, why: str) -> None:
        """Count a loss against the task over which it happened, so that a task that kills replicas ends the run."""
        task.losses += 1
        if task.losses > DEATHS_ALLOWED:
            raise EvaluationError(f"{task.losses} replicas were lost over the same candidates, the last one because: "
                                  f"{why}; {RESUME}")

    def _dismiss(self, member: Member, why: str = "it answered NaN") -> None:
        """Part with a member; its tasks are the next to be handed out."""
        for call in reversed(member.queue):
            self._owners.pop(call, None)
            self._arrived.discard(call)
            if call in self._flying:
                self._todo.appendleft(self._flying.pop(call))
        member.queue.clear()
        member.ready = False
        successor = self._crew.retire(member)
        if successor is not None:
            self._await_calls_of(successor)
        if not self._crew.members:
            raise EvaluationError(f"no replica is left, the last one is lost because: {why}; {RESUME}")
        if not any(other.ready for other in self._crew.members):
            for other in self._crew.members:
                other.since = time.monotonic()  # until now it was not needed

    def _retire_the_hung(self) -> None:
        """Treat members whose call has taken longer than the limit as dead."""
        now, limit = time.monotonic(), self._crew.task_seconds
        if now < self._next_check:
            return
        for member in list(self._crew.members):
            if not member.queue or now - member.since < limit:
                continue
            if not any(other.ready for other in self._crew.members):
                raise EvaluationError(f"no replica could start within pool.task_seconds={limit:g}: the cluster has no "
                                      f"resources left for one, or its start hangs; {RESUME}")
            call = member.queue.popleft()
            self._owners.pop(call)
            self._lose(member, self._flying.pop(call, None), f"no answer within pool.task_seconds={limit:g}")
        # Calls that are sent from now on have more time than those that are under way.
        self._next_check = min((m.since for m in self._crew.members if m.queue), default=now) + limit
