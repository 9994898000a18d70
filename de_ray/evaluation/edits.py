"""What a candidate does to the student's weights, carried out for a while or described by its few entries."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from de_ray.evaluation.sparse import SPARSE_COST, Entries, entries
from de_ray.evolution.candidate import ZeroingSet
from de_ray.student import Student


class WeightEdit(Protocol):
    """A change of one layer's weight other than a zeroing set, such as a choice of levels."""

    layer: int

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight; the given one stays as it is."""
        ...


Edit = ZeroingSet | WeightEdit


class LayerChange:
    """One edit of a student, prepared once for all calibration batches.

    Args:
        student: stays as it is outside `applied`.
        edit: of one of its layers.
    """

    def __init__(self, student: Student, edit: Edit) -> None:
        self.layer = edit.layer
        self._edit = edit
        self._weight = student.weights[edit.layer].data
        self.delta: Entries | None = None
        """What differs from the student's weight, where that is cheaper than the whole weight."""
        self._dormant = student.dormant[edit.layer]
        if isinstance(edit, ZeroingSet) and self._pays(len(edit.zero) + len(edit.revive)):
            self.delta = self._difference()

    @cached_property
    def _indices(self) -> Tensor:
        return torch.from_numpy(np.concatenate([self._edit.zero, self._edit.revive])).to(self._weight.device)

    @cached_property
    def _values(self) -> Tensor:
        dormant = self._dormant.view(-1)
        zeroed = len(self._edit.zero)
        return torch.cat([dormant.new_zeros(zeroed), dormant[self._indices[zeroed:]]])

    @cached_property
    def survivors(self) -> Entries | None:
        """What is left of the changed weight, where that is cheaper than the whole weight."""
        if not self._pays(0):  # to count would have a GPU waited for
            return None
        with self.applied() as weight:
            flat = weight.reshape(-1)
            if not self._pays(int(torch.count_nonzero(flat))):
                return None
            positions = torch.nonzero(flat).view(-1)
            return entries(tuple(weight.shape), positions.numpy(), flat[positions].numpy())

    def _pays(self, count: int) -> bool:
        """Whether as many entries are cheaper by themselves than as a whole weight; GPUs have no kernel for them."""
        return self._weight.device.type == "cpu" and count * SPARSE_COST < self._weight.numel()

    def _difference(self) -> Entries:
        # In NumPy, whose calls take a fraction of PyTorch's time on so few numbers.
        weight, dormant = self._weight.view(-1).numpy(), self._dormant.view(-1).numpy()
        zero, revive = self._edit.zero, self._edit.revive
        if not len(revive):
            return entries(tuple(self._weight.shape), zero, -weight[zero])
        indices = np.concatenate([zero, revive])
        delta = np.concatenate([-weight[zero], dormant[revive] - weight[revive]])
        order = np.argsort(indices)
        return entries(tuple(self._weight.shape), indices[order], delta[order])

    @contextlib.contextmanager
    def applied(self) -> Iterator[Tensor]:
        """The changed weight, for the time of the context; zeroing sets are carried out in place and undone."""
        if not isinstance(self._edit, ZeroingSet):
            yield self._edit.apply(self._weight)
            return
        flat = self._weight.view(-1)
        before = flat[self._indices]
        flat[self._indices] = self._values
        try:
            yield self._weight
        finally:
            flat[self._indices] = before
