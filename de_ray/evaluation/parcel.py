"""A task's candidates on the wire: zeroing sets together, since the price of a message is that of its objects."""

import numpy as np

from de_ray.evaluation.edits import Edit
from de_ray.evolution.candidate import ZeroingSet
from de_ray.evolution.gaps import packed, unpacked


class Parcel:
    """Candidates that arrive as the list that they were.

    Args:
        candidates: of zeroing sets or other edits; the latter travel as they are.
    """

    def __init__(self, candidates: list[tuple[Edit, ...]]) -> None:
        self._candidates = candidates

    def __reduce__(self) -> tuple:
        edits = [edit for candidate in self._candidates for edit in candidate]
        if not edits or not all(isinstance(edit, ZeroingSet) for edit in edits):
            return list, (self._candidates,)
        runs = [run for edit in edits for run in (edit.zero, edit.revive)]
        return _opened, ([len(candidate) for candidate in self._candidates], [edit.layer for edit in edits],
                         *packed(runs))


def _opened(counts: list[int], layers: list[int], lengths: list[int], firsts: list[int],
            gaps: np.ndarray) -> list[tuple[Edit, ...]]:
    runs = unpacked(lengths, firsts, gaps)
    sets = map(ZeroingSet, layers, runs[::2], runs[1::2])
    return [tuple(next(sets) for _ in range(count)) for count in counts]
