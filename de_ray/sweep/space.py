"""The points of a search space: what lists and ranges of a configuration stand for."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from omegaconf import OmegaConf, open_dict

from de_ray.checks import require
from de_ray.config import Config
from de_ray.seeds import numpy_generator

SEARCHED = ("evolution", "refit", "quantization", "seed")
"""Groups whose keys may be searched: all points compress the same network and are measured alike."""
SPARSITY = "evolution.sparsity"
TARGETS = "evolution.targets."
DIGITS = 4
"""Of a number drawn from a range."""

Point = dict[str, Any]
"""Dotted key -> value."""


def points(space: Mapping[str, Any], samples: int, seed: int) -> list[Point]:
    """Every combination of the lists, with so many draws from the ranges each.

    Args:
        space: as `SweepConfig.space`.
        samples: draws a combination, where there are ranges.
        seed: of the draws.

    Raises:
        ValueError: a key cannot be searched, a list is empty, or a range has no width.
    """
    axes = dict(_axes("", space))
    for key, axis in axes.items():
        require(key.partition(".")[0] in SEARCHED, "sweep.space", key,
                "keys of the groups " + ", ".join(SEARCHED[:-1]) + ", or seed")
        if isinstance(axis, list):
            require(bool(axis), f"sweep.space.{key}", axis, "at least one value")
    ranges = {key: axis for key, axis in axes.items() if isinstance(axis, dict)}
    lists = {key: axis if isinstance(axis, list) else [axis] for key, axis in axes.items() if key not in ranges}
    generator = numpy_generator(seed, "sweep", 0)
    return [dict(zip(lists, values, strict=True)) | {key: _draw(key, axis, generator) for key, axis in ranges.items()}
            for values in itertools.product(*lists.values()) for _ in range(samples if ranges else 1)]


def listed_sparsities(space: Mapping[str, Any]) -> bool:
    """Whether points share a few sparsities, and so have rivals of their own aim."""
    return isinstance(dict(_axes("", space)).get(SPARSITY), list)


def configure(base: Config, point: Point) -> Config:
    """The checked configuration of a point.

    Raises:
        ValueError, OmegaConfBaseException: a key does not exist, or a value is not allowed.
    """
    config = OmegaConf.structured(base)
    OmegaConf.set_struct(config, True)
    for key, value in point.items():
        if key.startswith(TARGETS):  # any pattern is a key there, dots and all
            with open_dict(config):
                config.evolution.targets[key.removeprefix(TARGETS)] = value
        else:
            OmegaConf.update(config, key, value, force_add=False)
    return OmegaConf.to_object(config)


def label(point: Point) -> str:
    """A point in few words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else
                     f"{key.rpartition('.')[2]} {value}" for key, value in point.items())


def _axes(prefix: str, space: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in space.items():
        if isinstance(value, dict) and not {"low", "high"} & value.keys():
            yield from _axes(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _draw(key: str, axis: dict, generator: np.random.Generator) -> int | float:
    low, high, log = axis.get("low"), axis.get("high"), axis.get("log", False)
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    require(numbers and axis.keys() <= {"low", "high", "log"} and low < high and (low > 0 or not log),
            f"sweep.space.{key}", axis, "{low: NUMBER, high: NUMBER above it}, with log: true where low is above 0")
    if isinstance(low, int) and isinstance(high, int):
        if not log:
            return int(generator.integers(low, high + 1))
        return int(min(high, np.exp(generator.uniform(np.log(low), np.log(high + 1)))))
    drawn = np.exp(generator.uniform(np.log(low), np.log(high))) if log else generator.uniform(low, high)
    return float(min(high, max(low, float(f"{drawn:.{DIGITS}g}"))))
