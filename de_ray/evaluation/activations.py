"""Activations that an evaluator keeps between passes, within a budget of memory."""

from collections.abc import Collection, Hashable
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

Key = tuple[int, Hashable]
"""(calibration batch, what): a node of the graph, or something that was derived from one."""


class Activations:
    """Values by batch and node.

    Batches are gone through again and again in the same order, so that throwing out what was used longest ago would
    throw out everything just before it is needed. Only values that an earlier call wanted last make room; where these
    do not suffice, a new value is not kept.

    Args:
        budget: bytes, >= 0.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._call = budget, 0
        self.held = 0
        """Bytes."""
        self._values: dict[Key, Any] = {}
        self._wanted: dict[Key, int] = {}

    def next_call(self) -> None:
        """From here on, what is not wanted again may make room."""
        self._call += 1

    def peek(self, key: Key) -> Any:
        """The value, or None; whether it is wanted remains open."""
        return self._values.get(key)

    def get(self, key: Key) -> Any:
        """The value, or None; wanted by this call."""
        if key not in self._values:
            return None
        self._wanted[key] = self._call
        return self._values[key]

    def known(self, batch: int) -> set[Hashable]:
        """What is held of a batch."""
        return {what for b, what in self._values if b == batch}

    def put(self, key: Key, value: Any) -> bool:
        """Keep a value if there is room for it; whether it is kept."""
        if key in self._values:
            return True
        size = _bytes(value)
        if self.held + size > self._budget:
            for old in [one for one, call in self._wanted.items() if call < self._call]:
                self._drop(old)
                if self.held + size <= self._budget:
                    break
        if self.held + size > self._budget:
            return False
        self._values[key], self._wanted[key] = value, self._call
        self.held += size
        return True

    def forget(self, whats: Collection[Hashable] | None = None) -> None:
        """Drop values that the student's change made wrong: of these nodes, or all."""
        for key in [key for key in self._values if whats is None or key[1] in whats]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self.held -= _bytes(self._values.pop(key))
        del self._wanted[key]


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, (Tensor, np.ndarray)))
