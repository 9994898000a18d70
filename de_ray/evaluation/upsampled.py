"""Convolutions of nearest-neighbour upsampled maps, computed on the small map.

Upsampled f-fold, small position i is read at positions f i to f i + f - 1. Output position f j + p, of phase p, sums
taps t of the kernel at upsampled positions f j + p + t D - P (D the dilation, P the padding), which are those of the
small map at j + floor((p + t D - P) / f). Taps that fall together are added up beforehand: a 3 x 3 kernel over a map
that was upsampled twofold is four 2 x 2 kernels, 2.25 times fewer products. Padding stays exact, since f divides the
upsampled length: a zero beyond the one map's edge is a zero beyond the other's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from de_ray.evaluation.operations import CONVOLUTIONS


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution with stride 1."""

    kernel: int
    padding: int
    """Zeros before the first position of the upsampled map."""
    dilation: int
    factor: int
    small: int
    """Length of the map before it is upsampled."""
    size: int
    """Length of the convolution's result."""

    @property
    def offsets(self) -> list[list[int]]:
        """[f, k]: small positions that a phase's taps read, relative to j."""
        return [[(p + t * self.dilation - self.padding) // self.factor for t in range(self.kernel)]
                for p in range(self.factor)]

    @property
    def starts(self) -> list[int]:
        """[f]: the first of them, in the small map after it was padded for all phases."""
        return [min(row) - min(map(min, self.offsets)) for row in self.offsets]

    @property
    def taps(self) -> int:
        """Length of a phase's kernel."""
        return max(max(row) - min(row) + 1 for row in self.offsets)

    @property
    def positions(self) -> list[int]:
        """[f]: results of a phase."""
        return [max(0, -((p - self.size) // self.factor)) for p in range(self.factor)]

    @property
    def length(self) -> int:
        """Positions for which all phases' kernels are run together."""
        return max(start + count for start, count in zip(self.starts, self.positions, strict=True))

    @property
    def margins(self) -> tuple[int, int]:
        """Zeros to put before and behind the small map; negative ones cut."""
        before = -min(map(min, self.offsets))
        return before, self.length + self.taps - 1 - before - self.small


def products(axes: Sequence[Axis]) -> float:
    """Of an input channel, for each value of a result channel."""
    return math.prod(axis.factor * axis.taps * axis.length / axis.size for axis in axes)


def convolved(small: Tensor, weight: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """The convolution of the upsampled map, phase by phase.

    Args:
        small: [N, C, ...] before it is upsampled.
        weight: [R, C, ...].
        axes: one a spatial axis.

    Yields:
        (where in the result's spatial axes, values [N, R, ...] there), for each phase; together they are the whole.
    """
    rows = len(weight)
    folded = _folded(weight, tuple(axes))
    margins = [margin for axis in reversed(axes) for margin in axis.margins]
    padded = functional.pad(small, margins) if any(margins) else small
    found = CONVOLUTIONS[len(axes)](padded, folded)  # [N, phases * R, ...]
    for index, phase in enumerate(product(*(range(axis.factor) for axis in axes))):
        pairs = list(zip(axes, phase, strict=True))
        there = tuple(slice(p, axis.size, axis.factor) for axis, p in pairs)
        mine = tuple(slice(axis.starts[p], axis.starts[p] + axis.positions[p]) for axis, p in pairs)
        yield there, found[(slice(None), slice(index * rows, (index + 1) * rows), *mine)]


def _folded(weight: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """[R, C, ...] -> [phases * R, C, taps...], with input channels innermost in memory."""
    rows, columns = weight.shape[:2]
    places = weight.flatten(2).transpose(1, 2)  # [R, k, C], k all places of the kernel
    found = torch.matmul(_fold(axes, weight.dtype, weight.device), places)  # [R, phases * taps, C]
    found = found.unflatten(1, (-1, math.prod(axis.taps for axis in axes))).transpose(0, 1).flatten(0, 1)
    return found.transpose(1, 2).unflatten(2, [axis.taps for axis in axes])


@lru_cache(maxsize=256)
def _fold(axes: tuple[Axis, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[phases * taps, k]: which places of the kernel each tap of a phase adds up."""
    fold = torch.ones(1, 1, 1)
    for axis in axes:
        one = torch.zeros(axis.factor, axis.taps, axis.kernel)
        for p, row in enumerate(axis.offsets):
            for t, offset in enumerate(row):
                one[p, offset - min(row), t] = 1
        fold = torch.kron(fold, one)
    return fold.flatten(0, 1).to(device, dtype)
