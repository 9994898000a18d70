"""Binary decisions with 16-bit probabilities, in the stream format of constriction's range coder.

Encoding is constriction's, a whole tensor at a time. Decoding cannot be: the model adapts between two decisions, and a
Python call for each would take minutes. So the decoding step of that coder (32-bit words, 64-bit state, 24-bit
precision: `RangeDecoder` of https://github.com/bamler-lab/constriction) stands here in compiled form; tests hold it to
constriction's own decoder.
"""

import constriction
import numpy as np
from numba import njit

PRECISION = 24
_FREE = (1 << PRECISION) - 2
"""What constriction shares out by probability: each of the two symbols has one unit of the scale beforehand."""
_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)


class Encoder:
    """Collects decisions; constriction codes them."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def add(self, bits: np.ndarray, probabilities: np.ndarray) -> None:
        """Append decisions.

        Args:
            bits: [n], 0 or 1.
            probabilities: int [n], of a 1, in units of 2^-16, in (0, 2^16).
        """
        if len(bits):
            self._coder.encode(bits.astype(np.int32), _BERNOULLI, probabilities / np.float64(1 << 16))

    def finish(self) -> bytes:
        """The stream, little-endian, without the zero bytes of its last word, which the decoder puts back."""
        stream = self._coder.get_compressed().astype("<u4").tobytes()
        return stream[:-4] + stream[-4:].rstrip(b"\0")


def start(stream: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Words and state of a decoder at the beginning of a stream.

    Returns:
        words: uint64 [n], the stream's 32-bit words.
        state: uint64 [4]: lower, range, point, and the index of the next word.
    """
    words = np.frombuffer(stream + bytes(-len(stream) % 4 + 8), "<u4").astype(np.uint64)
    point = (int(words[0]) << 32) | int(words[1])
    return words, np.array([0, 2**64 - 1, point, 2], np.uint64)


@njit(cache=True, inline="always")
def decode_bit(words, state, probability):
    """Decode one decision and advance the state; -1 where the stream is damaged.

    Args:
        words, state: see `start`.
        probability: int, of a 1, in units of 2^-16.
    """
    # constriction puts the symbol 1 at the quantiles from floor((1 - p) * _FREE) + 1 on.
    left = np.uint64((((1 << 16) - probability) * _FREE >> 16) + 1)
    scale = state[1] >> np.uint64(PRECISION)
    quantile = (state[2] - state[0]) // scale
    if quantile >= np.uint64(1 << PRECISION):
        return -1
    if quantile >= left:
        bit = 1
        state[0] += scale * left
        state[1] = scale * (np.uint64(1 << PRECISION) - left)
    else:
        bit = 0
        state[1] = scale * left
    if state[1] < np.uint64(1 << 32):
        state[0] <<= np.uint64(32)
        state[1] <<= np.uint64(32)
        state[2] <<= np.uint64(32)
        if state[3] < np.uint64(len(words)):
            state[2] |= words[state[3]]
        state[3] += np.uint64(1)
    return bit
