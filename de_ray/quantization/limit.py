"""A file within a limit of bytes, whose size is known only once levels have been refitted and everything is coded."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Plan(Protocol):
    """What is decided of a file before its levels are refitted; equal plans make equal files."""

    @property
    def bytes(self) -> int:
        """That its layers take before levels are refitted."""
        ...


P = TypeVar("P", bound=Plan)

ATTEMPTS = 3
"""At a file: each costs a refit of the levels."""
CLOSE = 0.97
"""Share of the limit that a file should use."""
UNDER, OVER = 0.9, 1.2
"""Of the bytes that a file is off by, those that the next one is allowed more or less: it had better end below."""


def within(limit: int, allowance: int, plan: Callable[[int], P], make: Callable[[P], tuple[int, T]]) -> tuple[int, T]:
    """Make files until one uses most of a limit, `ATTEMPTS` at most and none twice.

    Args:
        limit: bytes that the file may have.
        allowance: bytes that the layers of the first file may take before levels are refitted.
        plan: an allowance -> the best plan within it.
        make: a plan -> bytes of the file, and the file.

    Returns:
        Size and file: of those that fit the largest, and where none fits the smallest.
    """
    best: tuple[int, T] | None = None
    made: list[P] = []
    for _ in range(ATTEMPTS):
        decided = plan(allowance)
        if decided in made:
            log.info("nothing else takes about %d bytes", allowance)
            break
        size, file = make(decided)
        made.append(decided)
        log.info("a file of %d bytes, of %d allowed", size, limit)
        if best is None or (size > limit, abs(size - limit)) < (best[0] > limit, abs(best[0] - limit)):
            best = size, file
        if CLOSE * limit <= size <= limit:
            break
        # From what was taken, not from what was allowed: where that is too much, the same may not be taken again.
        allowance = max(1, decided.bytes + round((UNDER if size < limit else OVER) * (limit - size)))
    assert best is not None
    return best
