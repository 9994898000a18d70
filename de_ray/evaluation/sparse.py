"""y += dW x for the few entries of dW that are not zero, for linear layers and convolutions alike.

Samples lie innermost, so that every entry is a run of multiply-adds over contiguous memory whatever the stride,
padding, groups or dilation. The order of a row's sums is that of its entries: the same numbers on every machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from de_ray.evaluation.operations import SPATIAL, WeightedOp

SPARSE_COST = 10.0
"""Seconds of one multiply-add here, relative to one of a dense convolution or product, transpositions included.
Measured: 6 to 14 over layers of LeNet-300-100, LeNet-5 and YOLOv3-tiny. A constant, since a choice by the clock would
round differently from run to run."""


@dataclass(frozen=True)
class Entries:
    """Entries of a weight's change, grouped by row."""

    rows: np.ndarray
    """int64 [T], ascending: rows that have entries."""
    starts: np.ndarray
    """int64 [T + 1]: entries of rows[t] are starts[t] to starts[t + 1]."""
    columns: np.ndarray
    """int64 [E]: input channel within the row's group."""
    offsets: np.ndarray
    """int64 [E, 3]: place in the kernel."""
    values: np.ndarray
    """float32 [E]."""


def entries(shape: tuple[int, ...], positions: np.ndarray, values: np.ndarray) -> Entries:
    """Entries from flat positions.

    Args:
        shape: of the weight, [R, ...].
        positions: int64 [E], ascending, distinct.
        values: float32 [E].
    """
    if len(shape) == 2:
        row, column = np.divmod(positions, shape[1])
        offsets = np.zeros((len(positions), SPATIAL), np.int64)
    else:
        kernel = (1,) * (SPATIAL + 2 - len(shape)) + tuple(shape[2:])
        row, column, *places = np.unravel_index(positions, (shape[0], shape[1], *kernel))
        offsets = np.stack(places, 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(row, prepend=-1))  # positions ascend, and so do their rows
    values = values.astype(np.float32, copy=False)
    return Entries(row[starts], np.append(starts, len(positions)), column, offsets, values)


def samples_innermost(op: WeightedOp, inputs: Tensor) -> np.ndarray:
    """The operation's inputs as the kernel reads them: float32 [C, depth, height, width, N]."""
    inputs = inputs.float()  # products are float32, whatever precision the pass screens in
    if op.spatial == 0:
        flat = inputs.reshape(-1, inputs.shape[-1])  # [N * positions, D]
        return flat.t().contiguous().reshape(flat.shape[1], 1, 1, 1, flat.shape[0]).numpy()
    filled = inputs.reshape(*inputs.shape[:2], *(1,) * (SPATIAL - op.spatial), *inputs.shape[2:])
    return filled.permute(1, 2, 3, 4, 0).contiguous().numpy()


def add_products(op: WeightedOp, out: Tensor, base: Tensor | None, inputs: np.ndarray, change: Entries) -> None:
    """out = base + dW x.

    Args:
        op: the operation.
        out: [N, ...] of the operation's result; see `WeightedOp.room`.
        base: of the same shape, or a bias [R], or None for zeros.
        inputs: see `samples_innermost`.
        change: dW.
    """
    # A linear layer's samples and positions are all the same to it.
    target = out.view(-1, out.shape[-1]) if op.spatial == 0 else out  # [N, R, positions...]
    if base is None:
        target.zero_()
    elif base.ndim == 1:
        target.copy_(base.reshape(1, -1, *[1] * (target.ndim - 2)).expand_as(target))
    else:
        target.copy_(base.reshape(target.shape))
    if not len(change.rows):
        return
    positions = (1,) * (SPATIAL - op.spatial) + tuple(target.shape[2:])
    sums = np.zeros((len(change.rows), *positions, inputs.shape[-1]), np.float32)  # [T, depth, height, width, N]
    rows, groups = target.shape[1], op.groups
    _sum(sums, inputs, change.rows, change.starts, change.columns, change.offsets, change.values, np.array(op.stride),
         np.array(op.padding), np.array(op.dilation), rows // groups, inputs.shape[0] // groups)
    channels_last = target.movedim(1, -1)
    if target.is_contiguous():
        products = torch.from_numpy(sums).reshape(len(sums), *target.shape[2:], -1).movedim(-1, 0)  # [N, T, ...]
        if len(sums) == rows:
            target.add_(products)
        else:
            target.index_add_(1, torch.from_numpy(change.rows), products)
    else:
        assert channels_last.is_contiguous()
        _add_channels_last(channels_last.reshape(len(target), -1, rows).numpy(),
                           sums.reshape(len(sums), -1, len(target)), change.rows)


def transposed_rows(out: np.ndarray, k: int, base: np.ndarray, inputs: np.ndarray, change: Entries,
                    rectify: bool) -> None:
    """A linear layer's result with its samples innermost, so that nothing has to be transposed.

    Args:
        out: [R, K, N], of which the part of candidate k is written.
        k: index of the candidate.
        base: [R, N], the result without the change.
        inputs: [D, N].
        change: dW.
        rectify: whether to apply max(0, y) to the result, while it is in the cache.
    """
    _rows(out, k, base, inputs, change.rows, change.starts, change.columns, change.values, rectify)


@njit(nogil=True, cache=True)
def _rows(out, k, base, inputs, rows, starts, columns, values, rectify):  # pragma: no cover - compiled
    t, zero = 0, np.float32(0)
    for r in range(out.shape[0]):
        target, before = out[r, k], base[r]
        for n in range(len(target)):
            target[n] = before[n]
        if t < len(rows) and rows[t] == r:
            for e in range(starts[t], starts[t + 1]):
                value, source = values[e], inputs[columns[e]]
                for n in range(len(target)):
                    target[n] += value * source[n]
            t += 1
        if rectify:
            for n in range(len(target)):
                target[n] = zero if target[n] < zero else target[n]  # NaN stays


BLOCK = 16
"""Samples that are transposed together: as many cache lines are written at a time."""


@njit(nogil=True, cache=True)
def _add_channels_last(target, sums, rows):  # pragma: no cover - compiled
    """target [N, P, R] += sums [T, P, N]; PyTorch took 1.7 times as long in a cycle of LeNet-5."""
    samples = target.shape[0]
    for start in range(0, samples, BLOCK):
        stop = min(start + BLOCK, samples)
        for p in range(target.shape[1]):
            for t in range(len(rows)):
                for n in range(start, stop):
                    target[n, p, rows[t]] += sums[t, p, n]


@njit(nogil=True, cache=True)
def _sum(sums, inputs, rows, starts, columns, offsets, values, stride, padding, dilation, group_rows,
         group_channels):  # pragma: no cover - compiled
    depth, height, width, samples = inputs.shape[1], inputs.shape[2], inputs.shape[3], inputs.shape[4]
    flat_in, flat_out = inputs.reshape(-1), sums.reshape(-1)
    out_depth, out_height, out_width = sums.shape[1], sums.shape[2], sums.shape[3]
    for t in range(len(rows)):
        first_channel = rows[t] // group_rows * group_channels
        for d in range(out_depth):
            for h in range(out_height):
                out_line = ((t * out_depth + d) * out_height + h) * out_width * samples
                for e in range(starts[t], starts[t + 1]):
                    z = d * stride[0] + offsets[e, 0] * dilation[0] - padding[0]
                    y = h * stride[1] + offsets[e, 1] * dilation[1] - padding[1]
                    if z < 0 or z >= depth or y < 0 or y >= height:
                        continue
                    shift = offsets[e, 2] * dilation[2] - padding[2]
                    low = max(0, -(shift // stride[2]))
                    high = min(out_width, (width - 1 - shift) // stride[2] + 1)
                    value = values[e]
                    line = (((first_channel + columns[e]) * depth + z) * height + y) * width * samples
                    if stride[2] == 1:
                        if high > low:
                            count = (high - low) * samples
                            source = flat_in[line + (low + shift) * samples:line + (low + shift) * samples + count]
                            target = flat_out[out_line + low * samples:out_line + low * samples + count]
                            for n in range(count):
                                target[n] += value * source[n]
                    else:
                        for w in range(low, high):
                            start = line + (w * stride[2] + shift) * samples
                            source = flat_in[start:start + samples]
                            target = flat_out[out_line + w * samples:out_line + (w + 1) * samples]
                            for n in range(samples):
                                target[n] += value * source[n]
