"""Actors of a pool as one evaluation sees them: what they were asked, since when, and what may be done about them."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

DEATHS_ALLOWED = 3
"""Actors that may be lost over one task, or in one place before any of them answered."""
RESUME = "a run that has a folder continues from its last checkpoint with: python launch.py resume=RUN_FOLDER"


class EvaluationError(RuntimeError):
    """Candidates could not be evaluated on any replica."""


@dataclass(eq=False)
class Member:
    """An actor of a pool."""

    actor: Any
    """Handle of a `Replica`."""
    ready: bool = True
    """False while it starts, or waits for resources to start with: it is given no tasks."""
    queue: deque[Any] = field(default_factory=deque)
    """Calls that it has not answered, in the order in which it carries them out."""
    since: float = 0.0
    """When the first of them could begin; of `time.monotonic`."""
    proven: bool = False
    """Whether it has ever answered a task."""
    losses: int = 0
    """Actors that were lost in its place, one after the other, without having answered a task."""

    def push(self, call: Any) -> None:
        """Add a call that was sent to the actor."""
        if not self.queue:
            self.since = time.monotonic()
        self.queue.append(call)


class Crew(Protocol):
    """Actors of a pool or of a client, and what may be done about them."""

    members: list[Member]
    task_seconds: float
    """Time limit of a call."""
    starts_actors: bool
    """Whether `retire` may start others."""

    def welcome(self, member: Member, warnings: list[str]) -> None:
        """Bring an actor that has just started to the driver's student, and mark it ready; pass its warnings on."""
        ...

    def retire(self, member: Member) -> Member | None:
        """Part with an actor; returns the one that takes its place, if one does. Never blocks."""
        ...
