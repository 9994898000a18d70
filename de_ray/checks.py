"""Values that users give, held to what is allowed: one error that names the key, the value and the way out."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping

WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise `ValueError` naming the configuration key, the offending value and what is allowed."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {allowed}")


def first_line(error: BaseException) -> str:
    """What an error says, in short; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def last_line(error: BaseException | str) -> str:
    """What an error says at its end, where tracebacks have what happened; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    require(value in choices, key, value, "one of " + ", ".join(choices))


def require_types(group: object, prefix: str = "") -> None:
    """Raise `ValueError` unless the fields of a dataclass hold what they say. Hydra sees to it; callers of the library
    meet it here, before a comparison fails in its own words.

    Args:
        group: the dataclass; those within are their own affair.
        prefix: of its keys, with the dot.
    """
    for name, hint in typing.get_type_hints(type(group)).items():
        value = getattr(group, name)
        require(_fits(value, hint), prefix + name, value, _told(hint))


def _fits(value: object, hint: object) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0]) and _fits(entry, parts[1]) for key, entry in value.items())
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(entry, parts[0]) for entry in value)
    if hint in (int, float):  # NumPy's own numbers too, but True is none
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and (
            hint is int or math.isfinite(value))
    return isinstance(value, hint)


def _told(hint: object) -> str:
    """A type in a user's words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_told, parts))
    if origin is list:
        return f"a list, each entry {_told(parts[0])}"
    if origin is dict:
        return "values by key"
    return f"{hint.__name__}(...)" if dataclasses.is_dataclass(hint) else WORDS[hint]
