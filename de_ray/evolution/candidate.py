"""Zeroing sets: which surviving parameters to zero next, as index arrays of a few kilobytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

WORTH_PACKING = 1024
"""Indices from which on the time for packing is less than the wire's."""

BLOCK = 256
"""Candidates that become ready together, at least: who reads a request's candidates block by block can have the first
ones evaluated while others are still to be bred."""


def blocks(count: int) -> Iterator[range]:
    """Ranges of about equal length, one after the other, of `BLOCK` at least where there are as many."""
    parts = max(1, count // BLOCK)
    return (range(part * count // parts, (part + 1) * count // parts) for part in range(parts))


def _no_indices() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ZeroingSet:
    """A change of one layer's mask. Zeroed parameters that return take the value they had when they were zeroed.

    Travels with its indices as gaps, of one to four bytes each.
    """

    layer: int
    """Index into the problem's layers."""
    zero: np.ndarray
    """int64 [k], sorted flat indices of survivors to zero."""
    revive: np.ndarray = field(default_factory=_no_indices)
    """int64 [r], sorted flat indices of zeroed parameters to bring back."""

    def __reduce__(self) -> tuple:
        return _unpacked, (self.layer, _gaps(self.zero), _gaps(self.revive))


def _gaps(indices: np.ndarray) -> np.ndarray:
    """The first index and the steps from each to the next, in the narrowest type; short sets stay as they are."""
    if len(indices) < WORTH_PACKING:
        return indices
    gaps = np.diff(indices, prepend=0)
    return gaps.astype(np.min_scalar_type(int(gaps.max())))


def _unpacked(layer: int, zero: np.ndarray, revive: np.ndarray) -> ZeroingSet:
    return ZeroingSet(layer, *(part if part.dtype == np.int64 else np.cumsum(part, dtype=np.int64)
                               for part in (zero, revive)))


Candidate = tuple[ZeroingSet, ...]
"""Zeroing sets that are evaluated together, at most one a layer, by ascending layer."""
