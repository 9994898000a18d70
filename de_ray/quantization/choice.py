"""A layer's levels at a width, and the thresholds that assign weights to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from de_ray.codec.tensor import QuantizedTensor


@dataclass(frozen=True, eq=False)
class LevelChoice:
    """What quantizes one layer; a few hundred bytes on the wire, never a weight tensor.

    Imports neither torch nor the codec until it is asked for them, since the processes of trials only pass choices on.
    """

    layer: int
    """Index into the problem's layers."""
    bits: int
    """Width, in 1..8: at most 2^bits levels besides zero."""
    levels: np.ndarray
    """float32 [L], ascending, non-zero, each a float16 number."""
    boundaries: np.ndarray
    """float32 [L], ascending: value i of the L + 1 sorted values (zero and the levels) holds for
    boundaries[i - 1] < x <= boundaries[i], x a weight divided by its row's scale."""
    row_exponents: np.ndarray | None = None
    """int32 [R]; row r is scaled by 2^(row_exponents[r] / 8). None: no row scales."""

    @property
    def negatives(self) -> int:
        """Number of negative levels."""
        return int(np.count_nonzero(self.levels < 0))

    @property
    def table(self) -> np.ndarray:
        """float32 [L + 1], zero and the levels, ascending."""
        return np.insert(self.levels, self.negatives, np.float32(0.0))

    def symbols(self, weight: np.ndarray) -> np.ndarray:
        """int32 of the weight's shape: see `QuantizedTensor.symbols`; 0 where the weight is 0.

        Args:
            weight: float32 [R, ...].
        """
        weight = np.asarray(weight, np.float32)
        scaled = weight
        if self.row_exponents is not None:
            scaled = weight / self.scales.reshape(-1, *[1] * (weight.ndim - 1))
        symbols = np.searchsorted(self.boundaries, scaled).astype(np.int32) - np.int32(self.negatives)
        symbols[weight == 0] = 0
        return symbols

    def to_tensor(self, name: str, weight: np.ndarray) -> QuantizedTensor:
        """The weight in coded form, under a state-dict key."""
        from de_ray.codec.tensor import QuantizedTensor

        return QuantizedTensor(name, self.symbols(weight), levels=self.levels, row_exponents=self.row_exponents)

    def dequantized(self, weight: np.ndarray) -> np.ndarray:
        """float32 of the weight's shape: what decoding `to_tensor` gives."""
        return self.to_tensor("", weight).dequantize()

    def apply(self, weight: Tensor) -> Tensor:
        """The same as `dequantized`, bit for bit, on the weight's device; the given weight stays as it is.

        Args:
            weight: float32 [R, ...].
        """
        import torch

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(weight.device)

        weight = weight.detach()
        if self.row_exponents is None:
            values = on_device(self.table)[torch.bucketize(weight, on_device(self.boundaries))]
        else:
            scales = on_device(self.scales).reshape(-1, *[1] * (weight.ndim - 1))
            values = on_device(self.table)[torch.bucketize(weight / scales, on_device(self.boundaries))] * scales
        return torch.where(weight == 0, 0.0, values)

    @property
    def scales(self) -> np.ndarray:
        """float32 [R], of rows; only where there are row exponents."""
        from de_ray.quantization.scales import row_scales

        return row_scales(self.row_exponents)
