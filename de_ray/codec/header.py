"""The file's description of its tensors, in a few bytes each: variable-length integers and front-coded names.

Read by `Reader`, which raises `DamagedFileError` for whatever does not fit; nothing is allocated by what a header
claims before `container` has held it against the file's size.
"""

import math
import struct
from dataclasses import dataclass

import numpy as np

from de_ray.codec.tensor import QuantizedTensor

MAX_LEVELS = 256
MAX_DIMENSIONS = 8
MAX_NAME = 1024
"""Bytes of a name."""
MAX_EXPONENT = 8 * 100
"""Greatest magnitude of a row exponent: scales of 2^+-100."""
HAS_STEP, HAS_EXPONENTS, IS_RAW = 1, 2, 4
IS_SHARED = HAS_STEP | HAS_EXPONENTS | IS_RAW


MAX_KERNEL = 1024
"""Kernel positions with contexts of their own."""
MAX_EXTENT = 2**48
"""Product of a shape's dimensions, empty ones aside: numpy and torch count elements in 63 bits."""


VERSION = 2
"""Of files that are written. Version 1 differs in the probability model alone, and is read."""


class DamagedFileError(ValueError):
    """The file is not one of ours, or not the one that was written."""


@dataclass(frozen=True)
class Entry:
    """A tensor's description: all of it but its symbols."""

    name: str
    shape: tuple[int, ...]
    survivors: int = 0
    """Non-zero symbols."""
    period: int = 0
    """See `model.code`."""
    levels: np.ndarray | None = None
    step: np.float32 | None = None
    exponents: tuple[int, int] | None = None
    """Of row exponents, which are coded after the symbols: their commonest value, and how many differ from it."""
    raw: str | None = None
    """Data type of a tensor that is stored as it is; None for coded ones."""
    same_as: str | None = None
    """Name of an earlier tensor that this one is, by another name; None for tensors of their own."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def scan(self) -> tuple[int, int, int]:
        """Rows, inputs and kernel positions: how the model sees the shape."""
        if len(self.shape) < 2:
            return 1, self.size, 1
        kernel = math.prod(self.shape[2:])
        if kernel > MAX_KERNEL:
            return self.shape[0], self.shape[1] * kernel, 1
        return self.shape[0], self.shape[1], kernel

    @property
    def width(self) -> int:
        """Kernel positions of a line of the kernel, >= 1."""
        return self.shape[-1] if self.scan[2] > 1 else 1

    @property
    def magnitude(self) -> int:
        """Of the greatest symbol that has a level; 2^24 where there is a step."""
        if self.levels is None:
            return 2**24
        negatives = int(np.count_nonzero(self.levels < 0))
        return max(negatives, len(self.levels) - negatives)


def varint(value: int) -> bytes:
    """A whole number >= 0, seven bits a byte, least first."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Reader:
    """Takes fields off a byte string."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._data) - self.position:
            raise DamagedFileError(f"its description ends after {len(self._data)} bytes, within a field of {count}")
        self.position += count
        return self._data[self.position - count:self.position]

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(len(self._data) - self.position)

    def varint(self, most: int) -> int:
        """The next whole number, at most `most`."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            raise DamagedFileError("a field of more than 63 bits")
        if value > most:
            raise DamagedFileError(f"a field says {value}, expected at most {most}")
        return value


def write_entries(architecture: str, entries: list[Entry]) -> bytes:
    """Describe tensors; `read_entries` is its inverse."""
    name = architecture.encode()
    out = bytearray(varint(len(name)) + name + varint(len(entries)))
    before = b""
    for entry in entries:
        name = entry.name.encode()
        shared = 0
        while shared < min(len(before), len(name)) and before[shared] == name[shared]:
            shared += 1
        out += varint(shared) + varint(len(name) - shared) + name[shared:]
        before = name
        if entry.same_as is not None:
            out += bytes([IS_SHARED]) + varint(next(i for i, one in enumerate(entries) if one.name == entry.same_as))
            continue
        flags = HAS_STEP * (entry.step is not None) + HAS_EXPONENTS * (entry.exponents is not None)
        flags += IS_RAW * (entry.raw is not None)
        out.append(flags | len(entry.shape) << 3)
        for extent in entry.shape:
            out += varint(extent)
        if entry.raw is not None:
            out += varint(len(entry.raw)) + entry.raw.encode()
            continue
        out += varint(entry.survivors) + varint(entry.period)
        if entry.exponents is not None:
            out += varint(entry.exponents[0] + MAX_EXPONENT) + varint(entry.exponents[1])
        if entry.step is not None:
            out += struct.pack("<f", entry.step)
        else:
            out += varint(int(np.count_nonzero(entry.levels < 0))) + varint(int(np.count_nonzero(entry.levels > 0)))
            out += entry.levels.astype("<f2").tobytes()
    return bytes(out)


def read_entries(data: bytes) -> tuple[str, list[Entry]]:
    """Architecture and tensors of a description, each field within its range.

    Raises:
        DamagedFileError: a field is out of its range, or the description ends early or late.
    """
    reader = Reader(data)
    architecture = _text(reader.take(reader.varint(MAX_NAME)))
    entries, names, before = [], set(), b""
    for _ in range(reader.varint(len(data))):
        shared = reader.varint(len(before))
        before = before[:shared] + reader.take(reader.varint(MAX_NAME))
        if len(before) > MAX_NAME:
            raise DamagedFileError(f"a name of {len(before)} bytes, expected at most {MAX_NAME}")
        if before in names:
            raise DamagedFileError("two tensors have one name")
        names.add(before)
        entries.append(_read_entry(reader, _text(before), entries))
    if reader.position != len(data):
        raise DamagedFileError(f"{len(data) - reader.position} bytes follow its description's end")
    return architecture, entries


def _read_entry(reader: Reader, name: str, earlier: list[Entry]) -> Entry:
    flags = reader.take(1)[0]
    if flags == IS_SHARED:
        index = reader.varint(MAX_EXTENT)
        if index >= len(earlier) or earlier[index].same_as is not None:
            raise DamagedFileError(f"{name} is tensor {index} by another name, expected an earlier one of its own")
        return Entry(name, earlier[index].shape, same_as=earlier[index].name)
    dimensions, flags = flags >> 3, flags & 7
    if dimensions > MAX_DIMENSIONS:
        raise DamagedFileError(f"{name} has {dimensions} dimensions, expected at most {MAX_DIMENSIONS}")
    shape = tuple(reader.varint(MAX_EXTENT) for _ in range(dimensions))
    if math.prod(extent or 1 for extent in shape) > MAX_EXTENT:
        raise DamagedFileError(f"{name} has shape {shape}, expected at most {MAX_EXTENT} elements")
    if flags & IS_RAW:
        return Entry(name, shape, raw=_text(reader.take(reader.varint(16))))
    survivors = reader.varint(math.prod(shape))
    period = reader.varint(2**31)
    exponents = None
    if flags & HAS_EXPONENTS:
        if not shape:
            raise DamagedFileError(f"{name} has row scales but no rows")
        exponents = reader.varint(2 * MAX_EXPONENT) - MAX_EXPONENT, reader.varint(shape[0])
    if flags & HAS_STEP:
        step = np.frombuffer(reader.take(4), "<f4")[0]
        if not (np.isfinite(step) and step > 0):
            raise DamagedFileError(f"the step of {name} is {step}, expected a finite number above 0")
        return Entry(name, shape, survivors, period, step=step, exponents=exponents)
    negatives, positives = reader.varint(MAX_LEVELS), reader.varint(MAX_LEVELS)
    levels = np.frombuffer(reader.take(2 * (negatives + positives)), "<f2").astype(np.float32)
    if problem := level_problem(levels) or (np.count_nonzero(levels < 0) != negatives and "their signs are wrong"):
        raise DamagedFileError(f"the levels of {name}: {problem}")
    return Entry(name, shape, survivors, period, levels=levels, exponents=exponents)


def level_problem(levels: np.ndarray) -> str | None:
    """What is wrong with a level table, or None."""
    if len(levels) > MAX_LEVELS:
        return f"there are {len(levels)}, expected at most {MAX_LEVELS}"
    if not np.isfinite(levels).all():
        return "one is NaN or infinite"
    if (levels == 0).any() or (np.diff(levels) <= 0).any():
        return "expected distinct, ascending numbers other than 0"
    return None


def entry_of(tensor: QuantizedTensor, period: int) -> Entry:
    """The description of a tensor that is to be coded."""
    exponents = None
    if tensor.row_exponents is not None:
        values, counts = np.unique(tensor.row_exponents, return_counts=True)
        exponents = (int(values[counts.argmax()]), int(counts.sum() - counts.max())) if len(values) else (0, 0)
    return Entry(tensor.name, tuple(tensor.symbols.shape), int(np.count_nonzero(tensor.symbols)), period, tensor.levels,
                 tensor.step, exponents)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError("a name is not text") from error
