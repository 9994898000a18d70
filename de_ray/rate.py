"""What a student's file will take, before it is quantized: fitness weighs it, and targets in bytes are met by it."""

import dataclasses

import numpy as np

from de_ray import codec
from de_ray.config import Config, QuantizationConfig
from de_ray.evolution.rate import RateModel, binary_entropy
from de_ray.evolution.schedule import Targets
from de_ray.problem.base import Problem
from de_ray.quantization.dense import large_tensors
from de_ray.quantization.sensitivity import choices_at
from de_ray.report import BYTES_A_PARAMETER
from de_ray.student import Student
from de_ray.units import NO_UNITS, Units, renumbered, restored

NOMINAL_BITS = 3
"""Width at which layers are priced where a sweep will choose the widths."""
LEVEL_BYTES = 2
"""Of a float16 level."""
CONTAINER_BYTES, LAYER_BYTES, OTHER_BYTES = 100, 34, 0.75
"""Of a file; of a layer beside its symbols; of a parameter that is never zeroed, 0.3 to 1 as far as seen."""
CODER_SHARE = 0.75
"""What the coder's contexts make of a dense layer's estimate, at the least."""
LARGE_BYTES, LEAST_LARGE_BYTES, LARGE_SHARE = 0.45, 0.15, 0.5
"""What large dense tensors are reserved: bytes of a number, at most and at least (the coarsest step leaves 1.2 bits),
and the share of what layers and they have together, at most."""


def size_limit(problem: Problem, config: Config) -> int | None:
    """Bytes that the file may have; None where that is left open.

    Raises:
        ValueError: not even a file without a single weight would fit, or no layer's sparsity is left to be found.
    """
    limit = config.target_bytes
    if config.target_ratio is not None:
        limit = int(BYTES_A_PARAMETER * sum(p.numel() for p in problem.teacher.parameters()) / config.target_ratio)
    if limit is None:
        return None
    key = "target_bytes" if config.target_ratio is None else "target_ratio"
    if not Targets(config.evolution, problem.layers).follows_sparsity.any():
        raise ValueError(f"{key}={getattr(config, key)!r}: expected null, since evolution.targets gives every layer a "
                         "sparsity of its own")
    least = overhead(problem) + round(LEAST_LARGE_BYTES * sum(large_tensors(problem).values()))
    if limit <= least:
        raise ValueError(f"{key}={getattr(config, key)!r} allows {limit:,} bytes: expected more than about {least:,}, "
                         "which header and parameters that are never zeroed take")
    return limit


def room_for_layers(problem: Problem, limit: int, unread: int = 0) -> int:
    """Bytes of a file of `limit` bytes that are its layers' symbols'; `unread` as `overhead` has it."""
    left, large = limit - overhead(problem, unread), sum(large_tensors(problem).values())
    return left - round(max(LEAST_LARGE_BYTES * large, min(LARGE_BYTES * large, LARGE_SHARE * left)))


def overhead(problem: Problem, unread: int = 0) -> int:
    """About the bytes of a file without its layers' symbols and its large dense tensors.

    Args:
        problem: what is compressed.
        unread: parameters that are never zeroed, but for now, since they make units that nobody reads.
    """
    layers = {layer.parameter for layer in problem.layers}
    counted = layers | large_tensors(problem).keys()
    others = sum(p.numel() for name, p in problem.teacher.named_parameters() if name not in counted)
    return CONTAINER_BYTES + LAYER_BYTES * len(layers) + round(OTHER_BYTES * max(0, others - unread))


def nominal(config: QuantizationConfig) -> QuantizationConfig:
    """The configuration with one width for all layers."""
    return config if config.bits else dataclasses.replace(
        config, bits=min(max(NOMINAL_BITS, config.min_bits), config.max_bits))


def measure_rate(student: Student, config: QuantizationConfig, units: Units = NO_UNITS,
                 priced: bool = True) -> RateModel:
    """Quantize and code each layer as it is, its units in order, and split its bits into those for places and levels.

    Args:
        student: as it is.
        config: of quantization.
        units: of the network.
        priced: whether `RateModel.prices` are needed, which take another pass of the coder.
    """
    order = units.order(student.module.state_dict())
    orders = [order.get(layer.parameter, []) for layer in student.layers]
    weights = [renumbered(weight.detach().cpu().numpy(), axes)
               for weight, axes in zip(student.weights, orders, strict=True)]
    choices, sizes = choices_at(weights, nominal(config))
    symbols = [row[0].symbols(weight) for row, weight in zip(choices, weights, strict=True)]
    survivors = np.array(student.counts, np.int64)
    weighed = np.array([layer.size for layer in student.layers], np.int64)
    levels = np.array([_level_bits(of) for of in symbols])
    places = weighed * binary_entropy(survivors / weighed)
    tables = np.array([8 * LEVEL_BYTES * len(row[0].levels) for row in choices])  # LAYER_BYTES has them
    # A dense layer says nothing of what places cost: as much as they would without contexts.
    spent = np.maximum(8 * sizes[:, 0] - tables - levels, 0)
    gains = np.divide(spent, places, out=np.ones(len(weights)), where=places > 1)
    prices = tuple(restored(_prices(of, bits), axes).reshape(-1)
                   for of, bits, axes in zip(symbols, levels, orders, strict=True)) if priced else ()
    return RateModel(weighed, survivors, gains, levels / np.maximum(survivors, 1), prices)


def aimed_sparsity(rate: RateModel, limit: float, free: np.ndarray, ends: np.ndarray | None = None) -> float:
    """Sparsity of the free layers at which all layers take at most `limit` bytes in the end, in [0, 1).

    Args:
        rate: of the present student.
        limit: bytes of all layers, > 0.
        free: bool [L], layers that follow it.
        ends: int [L], survivors that the others will have at most; None: as many as now.
    """
    if ends is not None:
        rate = dataclasses.replace(rate, survivors=np.where(free, rate.survivors, np.minimum(rate.survivors, ends)))
    kept = rate.share_for(8 * limit, free) * rate.survivors[free].sum()
    return 1 - max(float(kept), 1.0) / float(rate.sizes[free].sum())


def require_room(rate: RateModel, limit: float, targets: Targets) -> None:
    """Raise `ValueError` where layers with a target of their own leave nothing of `limit` bytes to the others."""
    alone = rate.bits(np.where(targets.follows_sparsity, 0, np.minimum(rate.survivors, targets.survivors))) / 8
    if alone * CODER_SHARE > limit:
        raise ValueError(f"evolution.targets: layers with a sparsity of their own take about {alone:,.0f} bytes, where "
                         f"target_bytes or target_ratio leaves {limit:,.0f} for all layers; expected sparser targets, "
                         "or a larger file")


def _prices(symbols: np.ndarray, level_bits: float) -> np.ndarray:
    """See `RateModel.prices`; placement has made zeros of some survivors, which are priced as if it had not."""
    p = codec.significance(symbols)
    return np.log2(1 - p) - np.log2(p) + np.float32(level_bits / max(1, np.count_nonzero(symbols)))


def _level_bits(symbols: np.ndarray) -> float:
    """Bits of a layer's levels without contexts, which gain little on them."""
    counts = np.unique(symbols[symbols != 0], return_counts=True)[1]
    return float(-np.sum(counts * np.log2(counts / counts.sum()))) if len(counts) else 0.0
