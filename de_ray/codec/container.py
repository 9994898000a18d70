"""The file: a safetensors container of one byte tensor. docs/FORMAT.md explains it on a page.

    magic "DER", version | length of the description | description, deflated | hash | range-coded symbols
"""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from torch import Tensor, nn

from de_ray.codec import symbols as coder
from de_ray.codec.header import (
    MAX_EXPONENT,
    DamagedFileError,
    Entry,
    Reader,
    level_problem,
    read_entries,
    varint,
    write_entries,
)
from de_ray.codec.rangecoder import Encoder, start
from de_ray.codec.tensor import QuantizedTensor

MAGIC = b"DER\x01"
HASH_BYTES = 12
ELEMENTS_A_BYTE = 22_713
"""The least cost of a decision is log2(1 / (1 - 16 / 65536)) bits, and each element takes one at least."""
SPARE_BYTES = 16
"""Of a stream: the coder's state, and zero bytes that are not stored."""
DEFLATE_RATIO = 1032
"""The greatest that deflate reaches."""


@dataclass(frozen=True)
class TensorSummary:
    """A line of `inspect`."""

    name: str
    shape: tuple[int, ...]
    weights: int
    density: float
    levels: int
    """Distinct values besides zero."""
    payload_bytes: float
    """Its share of the coded symbols; tables are in the container's bytes."""


@dataclass(frozen=True)
class FileSummary:
    """What `inspect` tells of a file."""

    architecture: str
    file_bytes: int
    container_bytes: int
    """Everything but coded symbols: safetensors header, description with level tables, hash."""
    tensors: tuple[TensorSummary, ...]


def encode(tensors: Sequence[QuantizedTensor], raw: Mapping[str, Tensor] | None = None, architecture: str = "") -> bytes:
    """Code tensors into the bytes of a file.

    Args:
        tensors: distinct names.
        raw: entries that are stored as they are, such as counters.
        architecture: a note for whoever loads the file.

    Raises:
        ValueError: a tensor does not keep its contract: levels, steps, symbols or scales out of range.
    """
    raw = raw or {}
    names = [tensor.name for tensor in tensors] + list(raw)
    if len(set(names)) != len(names):
        raise ValueError(f"tensor names {names}: expected distinct ones")
    stream, entries = Encoder(), []
    for tensor in tensors:
        _check(tensor)
        entry, found = coder.describe(tensor)
        coder.add(stream, found)
        entries.append(entry)
    arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in raw.items()}
    entries += [Entry(name, array.shape, raw=array.dtype.str) for name, array in arrays.items()]
    description = write_entries(architecture, entries)
    packed = zlib.compress(varint(len(description)) + description + b"".join(a.tobytes() for a in arrays.values()), 9,
                           wbits=-15)
    state = {tensor.name: tensor.dequantize() for tensor in tensors} | arrays
    data = MAGIC + varint(len(packed)) + packed + _hash(architecture, state) + stream.finish()
    return save_safetensors({"": np.frombuffer(data, np.uint8)})


def decode(source: str | Path | bytes) -> dict[str, Tensor]:
    """The state dict of a file or of its bytes, bit for bit what was encoded.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not one of ours, or not what was written.
    """
    return _decode(_read(source))[2]


def inspect(source: str | Path | bytes) -> FileSummary:
    """Tensors of a file: shapes, densities, levels, bytes; raises as `decode` does."""
    data = _read(source)
    architecture, tensors, _, stream_bytes = _decode(data)
    lines = []
    for entry, tensor in tensors:
        if tensor is None:
            lines.append(TensorSummary(entry.name, entry.shape, entry.size, 1.0, 0, 0.0))
            continue
        spent = sum(coder.cost(*part) for part in coder.parts(tensor, entry)) / 8
        lines.append(TensorSummary(entry.name, entry.shape, entry.size,
                                   float(np.count_nonzero(tensor.symbols)) / max(1, entry.size),
                                   len(np.unique(tensor.symbols[tensor.symbols != 0])), spent))
    return FileSummary(architecture, len(data), len(data) - stream_bytes, tuple(lines))


def load(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Read a compressed network.

    Args:
        path: of the file.
        model: an instance of the architecture that was compressed; its weights are replaced.

    Returns:
        The state dict; or `model`, in eval mode, where one is given.

    Raises:
        FileNotFoundError, DamagedFileError: as `decode`.
        ValueError: the state dict does not fit the model.
    """
    state = decode(path)
    return state if model is None else fill(model, state)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict strictly; returns the model in eval mode.

    Raises:
        ValueError: names or shapes do not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the file does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def write(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; what was there before stays until then."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path.read_bytes()


def _decode(data: bytes) -> tuple[str, list[tuple[Entry, QuantizedTensor | None]], dict[str, Tensor], int]:
    """Architecture, tensors with their descriptions, state dict and length of the stream."""
    reader = Reader(_payload(data))
    if reader.take(len(MAGIC)) != MAGIC:
        raise DamagedFileError("not a compressed network of a version that this de_ray reads")
    packed = reader.take(reader.varint(len(data)))
    inflater = zlib.decompressobj(wbits=-15)
    try:
        plain = Reader(inflater.decompress(packed, DEFLATE_RATIO * len(packed) + 1))
    except zlib.error as error:
        raise DamagedFileError(f"its description cannot be inflated: {error}") from error
    architecture, entries = read_entries(plain.take(plain.varint(len(data) * DEFLATE_RATIO)))
    digest = reader.take(HASH_BYTES)
    stream = reader.rest()
    elements = sum(entry.size + (entry.shape[0] if entry.exponents else 0) for entry in entries if entry.raw is None)
    if elements > ELEMENTS_A_BYTE * (len(stream) + SPARE_BYTES):
        raise DamagedFileError(f"it claims {elements} weights, more than {len(stream)} bytes can hold")
    words, position = start(stream)
    tensors, state = [], {}
    for entry in entries:
        if entry.raw is not None:
            tensors.append((entry, None))
            state[entry.name] = _raw(entry, plain)
            continue
        tensor = coder.take(entry, words, position)
        tensors.append((entry, tensor))
        state[entry.name] = tensor.dequantize()
    if digest != _hash(architecture, state):
        raise DamagedFileError("what it decodes to is not what was written: its hash differs")
    return architecture, tensors, {name: torch.from_numpy(array) for name, array in state.items()}, len(stream)


def _payload(data: bytes) -> bytes:
    try:
        tensors = load_safetensors(data)
    # Foreign files may hold types that numpy lacks: a KeyError.
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"not a compressed network: {error}") from error
    if list(tensors) != [""] or tensors[""].dtype != np.uint8 or tensors[""].ndim != 1:
        raise DamagedFileError("a safetensors file, but not a compressed network")
    return tensors[""].tobytes()


def _raw(entry: Entry, plain: Reader) -> np.ndarray:
    try:
        dtype = np.dtype(entry.raw)
    except TypeError as error:
        raise DamagedFileError(f"{entry.name} has data type {entry.raw!r}") from error
    if dtype.kind not in "biuf" or not dtype.itemsize:
        raise DamagedFileError(f"{entry.name} has data type {entry.raw!r}, expected whole numbers, floats or booleans")
    return np.frombuffer(plain.take(entry.size * dtype.itemsize), dtype).reshape(entry.shape).copy()


def _hash(architecture: str, state: Mapping[str, np.ndarray]) -> bytes:
    """Of everything that a file decodes to."""
    digest = hashlib.sha256(architecture.encode())
    for name, array in state.items():
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.digest()[:HASH_BYTES]


def _check(tensor: QuantizedTensor) -> None:
    """Refuse what the format cannot hold."""
    name, symbols, levels = tensor.name, tensor.symbols, tensor.levels
    if symbols.dtype != np.int32:
        raise ValueError(f"{name}: symbols of type {symbols.dtype}, expected int32")
    if (levels is None) == (tensor.step is None):
        raise ValueError(f"{name}: expected either levels or a step")
    if levels is None:
        if not (np.isfinite(tensor.step) and tensor.step > 0):
            raise ValueError(f"{name}: step {tensor.step}, expected a finite number above 0")
        most = least = 2**24
    else:
        if problem := level_problem(levels):
            raise ValueError(f"{name}: levels {levels}: {problem}")
        if (levels.astype(np.float16).astype(np.float32) != levels).any():
            raise ValueError(f"{name}: levels {levels}, expected numbers that float16 holds exactly")
        least = int(np.count_nonzero(levels < 0))
        most = len(levels) - least
    if symbols.min(initial=0) < -least or symbols.max(initial=0) > most:
        raise ValueError(f"{name}: symbols {symbols.min()}..{symbols.max()}, expected {-least}..{most}")
    exponents = tensor.row_exponents
    if exponents is not None and (symbols.ndim == 0 or exponents.shape != symbols.shape[:1]
                                  or np.abs(exponents).max(initial=0) > MAX_EXPONENT):
        raise ValueError(f"{name}: row exponents, expected one in -{MAX_EXPONENT}..{MAX_EXPONENT} for each row")
    if not np.isfinite(tensor.dequantize()).all():
        raise ValueError(f"{name}: a value is beyond float32's range")
