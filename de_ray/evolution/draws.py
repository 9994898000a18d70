"""Random draws inside compiled code: SplitMix64 (Steele, Lea & Flood, doi:10.1145/2660193.2660195).

A stream is a seed and a number, so that each child has draws of its own, whoever breeds it, when, and beside which
others.
"""

import numpy as np
from numba import njit

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Odd, close to 2^64 over the golden ratio."""
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@njit(nogil=True, cache=True)
def _mixed(word: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    word = (word ^ (word >> np.uint64(30))) * FIRST
    word = (word ^ (word >> np.uint64(27))) * SECOND
    return word ^ (word >> np.uint64(31))


@njit(nogil=True, cache=True)
def stream(seed: int, number: int) -> np.ndarray:  # pragma: no cover - compiled
    """The stream of a number >= 0 under a seed: uint64 [1], which draws advance."""
    state = np.empty(1, np.uint64)
    state[0] = _mixed(_mixed(np.uint64(seed)) + GAMMA * np.uint64(number + 1))
    return state


@njit(nogil=True, cache=True)
def uniform(state: np.ndarray) -> float:  # pragma: no cover - compiled
    """A number in (0, 1), ends excluded."""
    state[0] += GAMMA
    return (np.float64(_mixed(state[0]) >> np.uint64(12)) + 0.5) * 2.0**-52


@njit(nogil=True, cache=True)
def normal(state: np.ndarray) -> float:  # pragma: no cover - compiled
    """A standard normal number (Box & Muller)."""
    return np.sqrt(-2.0 * np.log(uniform(state))) * np.cos(2.0 * np.pi * uniform(state))


@njit(nogil=True, cache=True)
def gumbels(state: np.ndarray, count: int) -> np.ndarray:  # pragma: no cover - compiled
    """Standard Gumbel numbers float32 [count]: -log(-log(u)), of 2^23 different u."""
    found = np.empty(count, np.float32)
    for i in range(count):
        word = np.int32(_mixed(state[0] + GAMMA * np.uint64(i + 1)) >> np.uint64(41))
        found[i] = (np.float32(word) + np.float32(0.5)) * np.float32(2.0**-23)
    state[0] += GAMMA * np.uint64(count)
    _minus_log(found)
    _minus_log(found)
    return found


@njit(nogil=True, cache=True, error_model="numpy")  # no check of each division
def _minus_log(values: np.ndarray) -> None:  # pragma: no cover - compiled
    """-log of float32 [n] > 0 in place, to a few units in the last place, several at a time and everywhere the same."""
    bits, exponents = values.view(np.int32), np.empty(len(values), np.int32)
    for i in range(len(values)):
        exponents[i] = (bits[i] - np.int32(0x3F3504F3)) >> np.int32(23)  # mantissas: from the root of 1/2 to that of 2
        bits[i] -= exponents[i] << np.int32(23)
    for i in range(len(values)):
        s = (values[i] - np.float32(1)) / (values[i] + np.float32(1))
        z = s * s
        series = ((z * np.float32(2 / 9) + np.float32(2 / 7)) * z + np.float32(2 / 5)) * z + np.float32(2 / 3)
        values[i] = np.float32(exponents[i]) * np.float32(-0.6931472) - s * (series * z + np.float32(2))
