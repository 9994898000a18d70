"""How many bits a file spends on a student's weights, and how many less once some of them are zeroed.

Fitness and targets weigh bytes by it. A survivor costs more where its neighbours are zero, since it has to be found,
than among others, so that the same number of zeros can make files of different sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from de_ray.evolution.candidate import Candidate


@dataclass(frozen=True, eq=False)
class RateModel:
    """Bits of a layer of n weights of which s survive: gain n H(s / n) + level s, with H the binary entropy."""

    sizes: np.ndarray
    """int64 [L], weights."""
    survivors: np.ndarray
    """int64 [L], of the student that the model was measured on."""
    gains: np.ndarray
    """float64 [L], bits that the coder's contexts need to tell where survivors are, per bit of entropy."""
    levels: np.ndarray
    """float64 [L], bits of a survivor's level."""
    prices: tuple[np.ndarray, ...]
    """float32 [layer.size] a layer: bits that a survivor costs more than a zero there, by the coder's
    contexts. Empty where nothing asks for them."""

    def bits(self, survivors: np.ndarray) -> float:
        """Bits of all layers.

        Args:
            survivors: float or int [L], in [0, sizes].
        """
        return float(np.sum(self.gains * self.sizes * binary_entropy(survivors / self.sizes) + self.levels * survivors))

    def after(self, candidate: Candidate) -> float:
        """Bits once a candidate is committed to the student that the model was measured on."""
        change = sum(float(self.prices[one.layer][one.revive].sum()) - float(self.prices[one.layer][one.zero].sum())
                     for one in candidate)
        return max(self.bits(self.survivors) + change, 1.0)  # prices hold for small changes

    def share_for(self, bits: float, free: np.ndarray) -> float:
        """Share of the free layers' survivors that may stay for the layers to take at most so many bits, in [0, 1].

        Args:
            bits: >= 0.
            free: bool [L], layers whose survivors may change.
        """
        low, high = 0.0, 1.0
        if self.bits(self.survivors) <= bits:
            return high
        for _ in range(50):  # halves the interval below float64's resolution
            middle = (low + high) / 2
            if self.bits(np.where(free, middle * self.survivors, self.survivors)) <= bits:
                low = middle
            else:
                high = middle
        return low


def binary_entropy(share: np.ndarray | Sequence[float]) -> np.ndarray:
    """H(p) = -p log2 p - (1 - p) log2(1 - p) in bits, 0 at both ends."""
    p = np.clip(np.asarray(share, np.float64), np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    return np.maximum(-p * np.log2(p) - (1 - p) * np.log2(1 - p), 0.0)
