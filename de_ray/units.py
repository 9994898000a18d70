"""Hidden units in an order that is cheap to code, and without those that nobody reads.

Which number a hidden unit has means nothing to a network, but costs bits: the coder has to be told, row by row and
column by column, which units have many survivors, few or none. In the order of their survivors each unit resembles the
one before. A unit that nobody reads any more needs no weights and no bias either.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from de_ray.evaluation.capture import CaptureError, require_close
from de_ray.evaluation.hidden import Group
from de_ray.student import Student

log = logging.getLogger(__name__)

Renumbering = Mapping[str, list[tuple[int, np.ndarray]]]
"""State-dict key -> (dimension, which place comes to stand at each: int64 [length])."""


@dataclass(frozen=True)
class Units:
    """A network's hidden units."""

    groups: tuple[Group, ...]

    def order(self, state: Mapping[str, Tensor]) -> Renumbering:
        """Units by the survivors of the rows that make them, then by those that read them, most of them first.

        Args:
            state: parameters by state-dict key; what is zeroed is 0.
        """
        def sorted_units(group: Group) -> np.ndarray:
            return np.lexsort([-_survivors(state, group, reads) for reads in (True, False)])  # the last key counts most
        return self._renumbering(state, {group: sorted_units(group) for group in self.groups})

    def shuffled(self, state: Mapping[str, Tensor], rng: np.random.Generator) -> Renumbering:
        """Units in random order."""
        return self._renumbering(state, {group: rng.permutation(group.size) for group in self.groups})

    @staticmethod
    def _renumbering(state: Mapping[str, Tensor], orders: dict[Group, np.ndarray]) -> Renumbering:
        """What orders of groups' units, int64 [size] each, are to the parameters."""
        found: dict[tuple[str, int], np.ndarray] = {}
        for group, order in orders.items():
            for axis in group.axes:
                places = found.setdefault((axis.parameter, axis.dim), np.arange(state[axis.parameter].shape[axis.dim]))
                part = slice(axis.start, axis.start + group.size * axis.repeat)
                places[part] = places[part].reshape(group.size, axis.repeat)[order].reshape(-1)
        by_name: dict[str, list[tuple[int, np.ndarray]]] = {}
        for (name, dim), places in found.items():
            by_name.setdefault(name, []).append((dim, places))
        return by_name

    def unread_values(self, student: Student) -> int:
        """Values of parameters that are never zeroed which make units that no survivor reads."""
        unread = self.unread(student.module.state_dict())
        return sum(int(idle.sum()) * student.others[name][0].numel() for name, idle in unread.items()
                   if name in student.others)

    def unread(self, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Rows of parameters whose units no survivor reads: state-dict key -> bool [rows]."""
        found: dict[str, np.ndarray] = {}
        for group in self.groups:
            idle = _survivors(state, group, reads=True) == 0
            for axis in group.axes:
                if not axis.reads and any(other.reads for other in group.axes):
                    # Batch norm after a concatenation has rows of several groups; after a flattening, several a unit.
                    rows = found.setdefault(axis.parameter, np.zeros(len(state[axis.parameter]), bool))
                    rows[axis.start:axis.start + group.size * axis.repeat] |= np.repeat(idle, axis.repeat)
        return found

    def restore(self, state: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Number a student's units as the teacher's that they come from, in place.

        Which those are nobody has written down: of all assignments it is the one of least squared error between
        surviving weights and the teacher's, group by group as they are made, so that the columns of each are in place.

        Args:
            state: the student's parameters by state-dict key; what is zeroed is 0.
            teacher: the teacher's.
        """
        from scipy.optimize import linear_sum_assignment  # takes half a second, which only runs with `start` need

        for group in self.groups:
            error = torch.zeros(group.size, group.size, dtype=torch.float64)  # [student's, teacher's]
            for axis in group.axes:
                if not axis.reads and state[axis.parameter].ndim > 1:
                    ours, theirs = (one[axis.parameter].detach().cpu().double().flatten(1) for one in (state, teacher))
                    error += ours.square().sum(1)[:, None] - 2 * ours @ theirs.T + (ours != 0).double() @ theirs.T**2
            _, order = linear_sum_assignment(error.T.numpy())
            renumber(state, self._renumbering(state, {group: order}))


NO_UNITS = Units(())


def find_units(module: nn.Module, inputs: Tensor, groups: Sequence[Group]) -> Units:
    """The hidden units of a network, none where it does not compute what it did once they are renumbered.

    Args:
        module: in eval mode.
        inputs: [N, ...] a batch that it accepts.
        groups: of its units, as its graph tells.
    """
    units, shuffled = Units(tuple(groups)), copy.deepcopy(module).requires_grad_(False)
    state = shuffled.state_dict()
    renumber(state, units.shuffled(state, np.random.default_rng(0)))
    try:
        with torch.inference_mode():
            require_close(shuffled(inputs), module(inputs), "with its units renumbered it computes something else")
    except CaptureError as error:
        log.warning("%s keeps the numbers of its hidden units: %s", type(module).__name__, error)
        return NO_UNITS
    return units


def renumber(state: Mapping[str, Tensor], renumbering: Renumbering) -> None:
    """Renumber tensors in place."""
    for name, axes in renumbering.items():
        for dim, places in axes:
            state[name].copy_(state[name].index_select(dim, torch.from_numpy(places).to(state[name].device)))


def renumbered(array: np.ndarray, axes: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """An array's places in another order; see `Renumbering`."""
    for dim, places in axes:
        array = array.take(places, dim)
    return array


def restored(array: np.ndarray, axes: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The inverse of `renumbered`."""
    return renumbered(array, [(dim, np.argsort(places)) for dim, places in axes])


def tidy(student: Student, units: Units) -> None:
    """Zero all that makes units which nobody reads, and put units in order. Outputs stay as they are but for rounding.

    Replicas know nothing of it: the student must be loaded into them whole.
    """
    silence(student, units)
    state = student.module.state_dict()
    order = units.order(state)
    renumber(state, order)
    for layer, *kept in zip(student.layers, student.masks, student.dormant, strict=True):
        for tensor in kept:
            renumber({layer.parameter: tensor}, {layer.parameter: order.get(layer.parameter, [])})


def silence(student: Student, units: Units) -> None:
    """Zero weights and biases that make units which nobody reads."""
    state, trained = student.module.state_dict(), dict(student.module.named_parameters())
    masks = {layer.parameter: mask for layer, mask in zip(student.layers, student.masks, strict=True)}
    changed = True
    while changed:  # what made such a unit may have been the only reader of others
        changed = False
        for name, idle in units.unread(state).items():
            rows = torch.from_numpy(idle).to(state[name].device)
            for tensor in (trained.get(name), masks.get(name)):
                if tensor is not None and tensor[rows].any():
                    tensor[rows], changed = 0, True


def _survivors(state: Mapping[str, Tensor], group: Group, reads: bool) -> np.ndarray:
    """Weights that are not zero by unit, of what reads the units or of what makes them: int64 [size]."""
    found = np.zeros(group.size, np.int64)
    for axis in group.axes:
        tensor = state[axis.parameter]
        if axis.reads == reads and tensor.ndim > 1:
            places = (tensor != 0).transpose(0, axis.dim).flatten(1).sum(1).cpu().numpy()
            found += places[axis.start:axis.start + group.size * axis.repeat].reshape(group.size, -1).sum(1)
    return found
