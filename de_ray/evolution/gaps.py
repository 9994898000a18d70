"""Ascending indices on the wire: all of a message's in one array, as gaps of one to eight bytes each."""

from collections.abc import Sequence

import numpy as np

Packed = tuple[list[int], list[int], np.ndarray]
"""Lengths of R runs, the first index of each that is not empty, and the gap before each index, 0 before a first one."""


def packed(runs: Sequence[np.ndarray]) -> Packed:
    """Pack R >= 1 runs of ascending indices, int64 [k] each; k may be 0."""
    lengths = np.array([len(run) for run in runs])
    together = np.concatenate(runs)
    starts = _starts(lengths)
    gaps = np.empty_like(together)
    np.subtract(together[1:], together[:-1], out=gaps[1:])
    gaps[starts] = 0
    narrow = gaps.astype(np.min_scalar_type(int(gaps.max(initial=0))))
    return lengths.tolist(), together[starts].tolist(), narrow


def unpacked(lengths: list[int], firsts: list[int], gaps: np.ndarray) -> list[np.ndarray]:
    """The runs that were packed, int64."""
    counts = np.array(lengths)
    indices = np.cumsum(gaps, dtype=np.int64)
    indices += np.repeat(np.array(firsts, np.int64) - indices[_starts(counts)], counts[counts > 0])
    return np.split(indices, np.cumsum(counts)[:-1])


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where the runs that are not empty begin."""
    return (np.cumsum(lengths) - lengths)[lengths > 0]
