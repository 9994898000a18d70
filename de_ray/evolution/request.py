"""What a search asks to have evaluated, and who answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from de_ray.evolution.candidate import Candidate


@dataclass(frozen=True, eq=False)
class Request:
    """Candidates to be evaluated on calibration batches."""

    candidates: Sequence[Candidate]
    """May be bred as they are read, in order, `BLOCK` or more at a time; afterwards they are at hand."""
    batches: Sequence[int]
    screening: bool = False
    """Whether the answers only decide who is evaluated again: lower precision will do, and others go first."""


class Dispatch(Protocol):
    """Evaluates several requests at a time."""

    def submit(self, request: Request) -> None:
        """Take a request, whose candidates are read no sooner than they are handed out."""
        ...

    def next(self) -> tuple[Request, np.ndarray]:
        """Wait for the next request that is answered, whichever of those submitted.

        Returns:
            It, and its fitness: float64 [K], in the candidates' order, non-finite for failures.

        Raises:
            ValueError: every request that was submitted has been answered.
        """
        ...
