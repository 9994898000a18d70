"""From a layer's weight to its levels at a width: scales, placement, and whether row scales pay."""

from collections.abc import Callable

import numpy as np

from de_ray.codec.tensor import QuantizedTensor
from de_ray.config import QuantizationConfig
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.placement import place, rate_slope
from de_ray.quantization.scales import layer_exponents, row_exponents, row_scales

Price = Callable[[QuantizedTensor], int]
"""Coded bytes of a tensor."""


def choose(layer: int, weight: np.ndarray, bits: int, config: QuantizationConfig, curvature: np.ndarray | None = None,
           exponents: np.ndarray | None = None) -> LevelChoice:
    """Place a layer's levels at a width.

    Args:
        layer: index into the problem's layers.
        weight: float32 [R, ...], zero where pruned.
        bits: width, in 1..8.
        config: placement and rate_weight are used.
        curvature: of the weight's shape, >= 0: squared errors are weighted by it; None: all alike.
        exponents: int32 [R], row scales; None: none.
    """
    survivors = weight != 0
    values, weights = weight[survivors], None if curvature is None else curvature[survivors]
    if exponents is not None:
        scales = np.broadcast_to(row_scales(exponents).reshape(-1, *[1] * (weight.ndim - 1)), weight.shape)[survivors]
        values = values / scales
        # (w - s q)^2 = s^2 (w/s - q)^2: errors are those of the weights, not of the scaled values.
        relative = scales.astype(np.float64) / scales.max(initial=np.float32(0))
        weights = relative**2 * (1.0 if weights is None else weights)
    levels, boundaries = place(values, bits, config.placement, config.rate_weight, weights,
                               weight.size - int(survivors.sum()))
    return LevelChoice(layer, bits, levels, boundaries, exponents)


class Placements:
    """The levels of one layer by width and row scales; each is placed and priced once, however often it is asked for.

    Args:
        layer: index into the problem's layers.
        weight: float32 [R, ...], zero where pruned.
        config: row_scales, placement and rate_weight are used.
        price: coded bytes of a tensor.
        curvature: of the weight's shape, >= 0: squared errors are weighted by it; None: all alike.
    """

    def __init__(self, layer: int, weight: np.ndarray, config: QuantizationConfig, price: Price,
                 curvature: np.ndarray | None = None) -> None:
        self._layer, self._weight, self._config, self._curvature = layer, weight, config, curvature
        self._price = price
        self._known: dict[tuple[int, bytes | None], tuple[LevelChoice, int]] = {}

    def at(self, bits: int, exponents: np.ndarray | None) -> tuple[LevelChoice, int]:
        """Levels at a width in 1..8, of rows scaled by exponents int32 [R] or not (None), and their coded bytes."""
        key = bits, None if exponents is None else exponents.tobytes()
        if key not in self._known:
            choice = choose(self._layer, self._weight, bits, self._config, self._curvature, exponents)
            self._known[key] = choice, self._price(choice.to_tensor("", self._weight))
        return self._known[key]

    def exponents(self, bits: int) -> np.ndarray | None:
        """Row scales as the configuration asks for them.

        With `auto` both forms are quantized and coded at the width, and the one of less error + slope x bits is taken,
        at the slope of the layer without row scales. A layer beyond float16's range gets one common scale in any case.

        Args:
            bits: width at which the two are compared, in 1..8.

        Returns:
            int32 [R], or None for no row scales.
        """
        weight, config = self._weight, self._config
        common = layer_exponents(weight)
        if config.row_scales == "never" or len(weight) < 2 or not weight.any():
            return common
        by_row = row_exponents(weight, self._curvature)
        if config.row_scales == "always":
            return by_row
        survivors = weight != 0
        importance = np.ones(weight.shape) if self._curvature is None else self._curvature.astype(np.float64)
        # A slope of 0 would let any gain in error pay for any number of bytes.
        slope = rate_slope(weight[survivors], bits, config.rate_weight or 1.0, importance[survivors])
        if not slope:  # each survivor has its own level: scales could gain nothing
            return common

        def cost(exponents: np.ndarray | None) -> float:
            choice, size = self.at(bits, exponents)
            error = float(np.sum(importance * (weight.astype(np.float64) - choice.dequantized(weight)) ** 2))
            return error + slope * 8 * size

        return by_row if cost(by_row) < cost(common) else common
