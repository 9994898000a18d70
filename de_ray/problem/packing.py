"""Inputs of several arguments as one tensor.

Whatever draws, splits, moves, augments or stores inputs has one tensor [N, ...] to do it with. Networks of several
arguments are given such a tensor too: the arguments of a sample lie one behind the other in whole words, and a hook in
front of the network takes them apart again, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from de_ray.problem.hooks import drop_pre_hooks

WORD = torch.int64
"""In which arguments are packed; as long as the longest of their types."""

Arguments = tuple[Tensor, ...] | Mapping[int | str, Tensor]
"""Arguments [N, ...] of a network, by position or by name."""


@dataclass(frozen=True)
class Field:
    """One argument of a sample."""

    place: int | str
    """Position, or name."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of one sample."""

    @property
    def numbers(self) -> int:
        """How many there are in a sample."""
        return prod(self.shape)

    @property
    def in_word(self) -> int:
        """How many fit into a word."""
        return WORD.itemsize // self.dtype.itemsize

    @property
    def words(self) -> int:
        """How many a sample takes."""
        return -(-self.numbers // self.in_word)

    @property
    def name(self) -> str:
        """As files and servers have it: of an argument by position, `input` and its number."""
        return self.place if isinstance(self.place, str) else f"input{self.place}"

    def __str__(self) -> str:
        name = self.place if isinstance(self.place, str) else f"argument {self.place}"
        return f"{name} {['N', *self.shape]} of {self.dtype}".replace("'", "")


@dataclass(frozen=True)
class Packing:
    """Which arguments a packed tensor holds, in their order."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, arguments: Arguments) -> "Packing":
        """The packing of arguments [N, ...] like these."""
        return cls(tuple(Field(place, value.dtype, tuple(value.shape[1:]))
                         for place, value in _by_place(arguments).items()))

    def pack(self, arguments: Arguments, key: str) -> Tensor:
        """Arguments as one tensor.

        Args:
            arguments: those of the packing, named ones in any order, and as many samples of each.
            key: what they are called in messages.

        Returns:
            [N, words] of `WORD`.

        Raises:
            ValueError: for other arguments, types or shapes.
        """
        found = Packing.of(arguments)
        if set(found.fields) != set(self.fields):
            raise ValueError(f"{key} has {found}: expected {self}")
        by_place = _by_place(arguments)
        return self.joined([by_place[field.place] for field in self.fields])

    def joined(self, values: list[Tensor]) -> Tensor:
        """[N, words]: values [N, ...] in the order of the fields, of their types and shapes."""
        parts = []
        for field, value in zip(self.fields, values, strict=True):
            flat = value.reshape(len(value), field.numbers)
            parts.append(F.pad(flat, (0, -field.numbers % field.in_word)).contiguous().view(WORD))
        return torch.cat(parts, 1)

    def values(self, packed: Tensor) -> list[Tensor]:
        """The values [N, ...], in the order of the fields, of which `joined` made [N, words]; copies."""
        found, start = [], 0
        for field in self.fields:
            flat = packed[:, start:start + field.words].contiguous().view(field.dtype)[:, :field.numbers]
            shaped = flat.reshape(packed.shape[0], *field.shape)
            found.append(shaped.clone(memory_format=torch.contiguous_format))  # a network may change what it is given
            start += field.words
        return found

    def arguments(self, values: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Values in the order of the fields as positional and named arguments of a call."""
        by_place = {field.place: value for field, value in zip(self.fields, values, strict=True)}
        named = {place: value for place, value in by_place.items() if isinstance(place, str)}
        return tuple(value for place, value in by_place.items() if place not in named), named

    def __str__(self) -> str:
        return ", ".join(map(str, self.fields))


def _by_place(arguments: Arguments) -> dict[int | str, Tensor]:
    return dict(enumerate(arguments)) if isinstance(arguments, tuple) else dict(arguments)


@dataclass(frozen=True)
class _Unpack:
    """A hook in front of a module that takes packed inputs apart."""

    packing: Packing

    def __call__(self, _: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        (packed,) = given
        return self.packing.arguments(self.packing.values(packed))


def unpacked(inputs: Tensor, packing: Packing | None) -> list[Tensor]:
    """The values [N, ...] of inputs, of which there is one where they are not packed."""
    return [inputs] if packing is None else packing.values(inputs)


def take_packed(module: nn.Module, packing: Packing) -> None:
    """Have a module called with packed inputs from now on; hooks of its own see them taken apart."""
    module.register_forward_pre_hook(_Unpack(packing), prepend=True, with_kwargs=True)


def take_arguments(module: nn.Module) -> nn.Module:
    """Undo `take_packed`, where it was done; returns the module."""
    return drop_pre_hooks(module, lambda hook: isinstance(hook, _Unpack))


def packing_of(module: nn.Module) -> Packing | None:
    """What a module takes apart; None: it takes its inputs as they are."""
    return next((hook.packing for hook in module._forward_pre_hooks.values() if isinstance(hook, _Unpack)), None)
