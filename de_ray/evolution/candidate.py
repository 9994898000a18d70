"""Zeroing sets: which surviving parameters to zero next, as index arrays of a few kilobytes."""

from dataclasses import dataclass, field

import numpy as np


def _no_indices() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class ZeroingSet:
    """A change of one layer's mask. Zeroed parameters that return take the value they had when they were zeroed."""

    layer: int
    """Index into the problem's layers."""
    zero: np.ndarray
    """int64 [k], sorted flat indices of survivors to zero."""
    revive: np.ndarray = field(default_factory=_no_indices)
    """int64 [r], sorted flat indices of zeroed parameters to bring back."""


Candidate = tuple[ZeroingSet, ...]
"""Zeroing sets that are evaluated together, at most one a layer, by ascending layer."""
