"""Symbols of one tensor to and from the coder: buffers, priors, and what a tensor costs."""

import math

import numpy as np

from de_ray.codec import model, model1
from de_ray.codec.header import MAX_EXPONENT, VERSION, DamagedFileError, Entry, entry_of
from de_ray.codec.rangecoder import Encoder
from de_ray.codec.tables import LEAST, ONE
from de_ray.codec.tensor import QuantizedTensor

_NO_WORDS, _NO_STATE = np.zeros(1, np.uint64), np.zeros(4, np.uint64)
_NO_BITS, _NO_PROBABILITIES = np.zeros(1, np.int8), np.zeros(1, np.int32)


def _prior(nonzero: int, size: int) -> int:
    return min(max(nonzero * ONE // max(1, size), LEAST), ONE - LEAST)


def decisions(symbols: np.ndarray, entry: Entry, version: int = VERSION) -> tuple[np.ndarray, np.ndarray]:
    """Bits and 16-bit probabilities of every decision that codes these symbols.

    Args:
        symbols: int32, in scan order.
        entry: describes them.
        version: of the format; 1 is for reading alone.
    """
    if not symbols.size:
        return _NO_BITS[:0], _NO_PROBABILITIES[:0]
    magnitudes = np.abs(symbols[symbols != 0])
    # A sign, and a magnitude in unary or as a bit length in unary with its mantissa.
    if version > 1 and entry.magnitude <= model.MAX_UNARY:
        room = symbols.size + int((magnitudes + 1).sum())
    else:
        room = symbols.size + int((2 * np.ceil(np.log2(magnitudes + 1.0)).astype(np.int64) + 1).sum())
    bits, probabilities = np.zeros(room, np.int8), np.zeros(room, np.int32)
    count = _code(np.ascontiguousarray(symbols.reshape(-1)), entry, len(magnitudes), version, False, _NO_WORDS,
                  _NO_STATE, bits, probabilities)
    return bits[:count], probabilities[:count]


def _code(symbols: np.ndarray, entry: Entry, nonzero: int, version: int, *stream: object) -> int:
    """The model of a version."""
    prior = _prior(nonzero, symbols.size)
    if version == 1:
        return model1.code(symbols, *entry.scan, entry.period, prior, *stream)
    unary = entry.magnitude <= model.MAX_UNARY
    return model.code(symbols, *entry.scan, entry.width, entry.period, unary, prior, *stream)


def cost(bits: np.ndarray, probabilities: np.ndarray) -> float:
    """Bits that a range coder spends on decisions."""
    return float(-np.log2(np.where(bits == 1, probabilities, ONE - probabilities) / ONE).sum())


def parts(tensor: QuantizedTensor, entry: Entry, version: int = VERSION) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decisions of a tensor: of its symbols, and of its row exponents where it has any."""
    found = [decisions(tensor.symbols, entry, version)]
    if entry.exponents is not None:
        relative = (tensor.row_exponents - entry.exponents[0]).astype(np.int32)
        found.append(decisions(relative, _row_entry(entry), version))
    return found


def _row_entry(entry: Entry) -> Entry:
    """The description of a tensor's row exponents, as a vector of their own."""
    return Entry(entry.name, entry.shape[:1], entry.exponents[1], step=np.float32(1))


def describe(tensor: QuantizedTensor) -> tuple[Entry, list[tuple[np.ndarray, np.ndarray]], float]:
    """A tensor's description, decisions and their bits, with the period of columns that codes it smaller: none, or an
    image's.
    """
    best = None
    columns = tensor.symbols.shape[1] if tensor.symbols.ndim == 2 else 0
    width = math.isqrt(columns)
    for period in (0, width) if width > 2 and width * width == columns else (0,):
        entry = entry_of(tensor, period)
        found = parts(tensor, entry)
        bits = sum(cost(*part) for part in found)
        if best is None or (bits, period) < best[0]:
            best = (bits, period), entry, found
    (bits, _), entry, found = best
    return entry, found, bits


def coded_bytes(tensor: QuantizedTensor) -> int:
    """Bytes of a tensor's payload and level table, as the real coder would spend them."""
    _, _, bits = describe(tensor)
    table = 4 if tensor.levels is None else 2 * len(tensor.levels)
    return math.ceil(bits / 8) + table


def significance(symbols: np.ndarray) -> np.ndarray:
    """The probability of being non-zero that the coder's contexts give each symbol before they see it.

    Args:
        symbols: int32 [R, ...].

    Returns:
        float32 of the symbols' shape, in (0, 1).
    """
    places = (symbols != 0).astype(np.int32)
    _, ((_, probabilities),), _ = describe(QuantizedTensor("", places, levels=np.ones(1, np.float32)))
    # Non-zero symbols, being all alike, take the same number of decisions after that of their significance.
    nonzero = places.reshape(-1).astype(np.int64)
    further = (len(probabilities) - nonzero.size) // max(1, int(nonzero.sum()))
    first = np.arange(nonzero.size) + further * (np.cumsum(nonzero) - nonzero)
    return (probabilities[first] / ONE).astype(np.float32).reshape(symbols.shape)


def add(encoder: Encoder, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Append a tensor's decisions to a stream."""
    for bits, probabilities in found:
        encoder.add(bits, probabilities)


def take(entry: Entry, words: np.ndarray, state: np.ndarray, version: int = VERSION) -> QuantizedTensor:
    """Decode a tensor from a stream of a version of the format; the state moves on.

    Raises:
        DamagedFileError: the stream is damaged.
    """
    symbols = _take(entry, words, state, version).reshape(entry.shape)
    exponents = None
    if entry.exponents is not None:
        exponents = _take(_row_entry(entry), words, state, version) + np.int32(entry.exponents[0])
        if np.abs(exponents).max(initial=0) > MAX_EXPONENT:
            raise DamagedFileError(f"a row scale of {entry.name} is out of range")
    if entry.levels is not None:
        negatives = int(np.count_nonzero(entry.levels < 0))
        if symbols.min(initial=0) < -negatives or symbols.max(initial=0) > len(entry.levels) - negatives:
            raise DamagedFileError(f"a symbol of {entry.name} names no level")
    return QuantizedTensor(entry.name, symbols, entry.levels, entry.step, exponents)


def _take(entry: Entry, words: np.ndarray, state: np.ndarray, version: int) -> np.ndarray:
    symbols = np.zeros(entry.size, np.int32)
    # An empty tensor's other dimensions may be large; the model would make room for them.
    if entry.size and _code(symbols, entry, entry.survivors, version, True, words, state, _NO_BITS,
                            _NO_PROBABILITIES) < 0:
        raise DamagedFileError(f"the coded symbols of {entry.name} are damaged")
    return symbols
