"""Zeroing sets: which surviving parameters to zero next, as index arrays of a few kilobytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from de_ray.evolution.gaps import packed, unpacked

BLOCK = 256
"""Candidates that become ready together, at least: who reads a request's candidates block by block can have the first
ones evaluated while others are still to be bred."""


def blocks(count: int, least: int = BLOCK) -> Iterator[range]:
    """Ranges of about equal length, one after the other, of `least` at least where there are as many."""
    parts = max(1, count // least)
    return (range(part * count // parts, (part + 1) * count // parts) for part in range(parts))


def _no_indices() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ZeroingSet:
    """A change of one layer's mask. Zeroed parameters that return take the value they had when they were zeroed.

    Travels with its indices as gaps.
    """

    layer: int
    """Index into the problem's layers."""
    zero: np.ndarray
    """int64 [k], sorted flat indices of survivors to zero."""
    revive: np.ndarray = field(default_factory=_no_indices)
    """int64 [r], sorted flat indices of zeroed parameters to bring back."""

    def __reduce__(self) -> tuple:
        return _unpacked, (self.layer, *packed([self.zero, self.revive]))


def _unpacked(layer: int, *indices: Any) -> ZeroingSet:
    return ZeroingSet(layer, *unpacked(*indices))


Candidate = tuple[ZeroingSet, ...]
"""Zeroing sets that are evaluated together, at most one a layer, by ascending layer."""
