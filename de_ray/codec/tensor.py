"""A quantized tensor: whole-number symbols and the rule that turns them into float32 values."""

from dataclasses import dataclass

import numpy as np

# 2^(k/8) for k in 0..7, rounded to float32. A table and `ldexp`, since `pow` may round differently elsewhere.
EIGHTH_POWERS = np.array([1.0, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], np.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """One entry of a state dict in coded form.

    A symbol of 0 stands for 0.0. With `levels`, symbol s > 0 stands for the s-th smallest positive level and s < 0
    for the |s|-th largest negative one. With `step`, symbol s stands for s * step. Exactly one of the two is given.
    """

    name: str
    """The state-dict key."""
    symbols: np.ndarray
    """int32, of the tensor's shape."""
    levels: np.ndarray | None = None
    """float32, each exactly representable in float16, ascending, non-zero, at most 256."""
    step: np.float32 | None = None
    """Positive and finite."""
    row_exponents: np.ndarray | None = None
    """int32 [R], R = shape[0]; row r is multiplied by 2^(row_exponents[r] / 8). None: no row scales."""

    def dequantize(self) -> np.ndarray:
        """The float32 values, of the tensor's shape; the same bits on every machine."""
        if self.levels is not None:
            negatives = int(np.count_nonzero(self.levels < 0))
            table = np.concatenate([self.levels[:negatives], np.zeros(1, np.float32), self.levels[negatives:]])
            values = table[self.symbols + negatives]
        else:
            values = self.symbols.astype(np.float32) * np.float32(self.step)
        if self.row_exponents is not None:
            octave, eighth = np.divmod(self.row_exponents, 8)
            scales = np.ldexp(EIGHTH_POWERS[eighth], octave).astype(np.float32)
            values = values * scales.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray(values, np.float32)  # an array where there is a single number too
