"""The file: a safetensors container of one byte tensor. docs/FORMAT.md explains it on a page.

    magic "DER", version | length of the description | description, deflated | hash | range-coded symbols
"""

import hashlib
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
from de_ray.codec.check import check, check_name
from de_ray.codec.fit import fill, require_fit
from de_ray.codec.header import VERSION, DamagedFileError, Entry, Reader, read_entries, varint, write_entries
from de_ray.codec.rangecoder import Encoder, start
from de_ray.codec.raw import raw_bytes, raw_entry, take_raw
from de_ray.codec.tensor import QuantizedTensor
from de_ray.device import mapped

MAGIC = b"DER"
READABLE = (1, VERSION)
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


def encode(tensors: Sequence[QuantizedTensor], raw: Mapping[str, Tensor] | None = None,
           architecture: str = "", shared: Mapping[str, str] | None = None) -> bytes:
    """Code tensors into the bytes of a file.

    Args:
        tensors: distinct names.
        raw: entries that are stored as they are, such as counters.
        architecture: a note for whoever loads the file.
        shared: further names of tensors, such as tied weights have: name -> that in `tensors` or `raw`.

    Raises:
        ValueError: a tensor does not keep its contract: levels, steps, symbols or scales out of range.
    """
    raw, shared = raw or {}, shared or {}
    names = [tensor.name for tensor in tensors] + list(raw) + list(shared)
    if len(set(names)) != len(names):
        raise ValueError(f"tensor names {names}: expected distinct ones")
    stream, entries = Encoder(), []
    check_name(architecture)
    for tensor in tensors:
        check(tensor)
    for entry, found, _ in mapped(coder.describe, tensors):
        coder.add(stream, found)
        entries.append(entry)
    for name, value in raw.items():
        check_name(name)
        entries.append(raw_entry(name, value))
    own = {entry.name: entry for entry in entries}
    for name, other in shared.items():
        check_name(name)
        if other not in own:
            raise ValueError(f"{name} is said to be {other!r}: expected one of {', '.join(own) or 'no tensors'}")
        entries.append(Entry(name, own[other].shape, same_as=other))
    description = write_entries(architecture, entries)
    plain = varint(len(description)) + description + b"".join(map(raw_bytes, raw.values()))
    packed = zlib.compress(plain, 9, wbits=-15)
    state = {tensor.name: _values(tensor) for tensor in tensors} | dict(raw)
    digest = _hash(architecture, state, shared)
    data = MAGIC + bytes([VERSION]) + varint(len(packed)) + packed + digest + stream.finish()
    return save_safetensors({"": np.frombuffer(data, np.uint8)})


def decode(source: str | Path | bytes) -> dict[str, Tensor]:
    """The state dict of a file or of its bytes, bit for bit what was encoded.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not one of ours, or not what was written.
    """
    return decode_named(source)[1]


def decode_named(source: str | Path | bytes) -> tuple[str, dict[str, Tensor]]:
    """A file's architecture and state dict; see `decode`."""
    decoded = _decode(source)
    return decoded.architecture, decoded.state


def symbols_of(source: str | Path | bytes) -> dict[str, np.ndarray]:
    """The whole-number symbols of a file's coded tensors, by name; raises as `decode` does."""
    return {entry.name: tensor.symbols for entry, tensor in _decode(source).tensors if tensor is not None}


def inspect(source: str | Path | bytes) -> FileSummary:
    """Tensors of a file: shapes, densities, levels, bytes; raises as `decode` does."""
    return examine(source)[1]


def examine(source: str | Path | bytes) -> tuple[dict[str, Tensor], FileSummary]:
    """What `decode` and `inspect` tell, at the price of one; raises as `decode` does."""
    decoded = _decode(source)
    lines = []
    for entry, tensor in decoded.tensors:
        if entry.same_as is not None:  # its weights are counted where they are stored
            lines.append(TensorSummary(f"{entry.name} = {entry.same_as}", entry.shape, 0, 1.0, 0, 0.0))
            continue
        if tensor is None:
            lines.append(TensorSummary(entry.name, entry.shape, entry.size, 1.0, 0, 0.0))
            continue
        spent = sum(coder.cost(*part) for part in coder.parts(tensor, entry, decoded.version)) / 8
        lines.append(TensorSummary(entry.name, entry.shape, entry.size,
                                   float(np.count_nonzero(tensor.symbols)) / max(1, entry.size),
                                   len(np.unique(tensor.symbols[tensor.symbols != 0])), spent))
    return decoded.state, FileSummary(decoded.architecture, decoded.file_bytes,
                                      decoded.file_bytes - decoded.stream_bytes, tuple(lines))


def load(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Read a compressed network.

    Args:
        path: of the file.
        model: an instance of the architecture that was compressed; its weights are replaced.

    Returns:
        The state dict; or `model`, in eval mode, where one is given.

    Raises:
        FileNotFoundError, DamagedFileError: as `decode`.
        ValueError: the state dict does not fit the model, which is told before any of it is decoded.
    """
    state = _decode(path, model).state
    return state if model is None else fill(model, state)


def _read(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path.read_bytes()


@dataclass(frozen=True)
class _Decoded:
    architecture: str
    version: int
    tensors: list[tuple[Entry, QuantizedTensor | None]]
    state: dict[str, Tensor]
    file_bytes: int
    stream_bytes: int


def _decode(source: str | Path | bytes, model: nn.Module | None = None) -> _Decoded:
    try:
        return _decode_within_memory(_read(source), model)
    except MemoryError as error:
        raise DamagedFileError(_of(source, "it claims more weights than this machine's memory holds")) from error
    except DamagedFileError as error:
        raise DamagedFileError(_of(source, str(error))) from error


def _of(source: str | Path | bytes, message: str) -> str:
    """A message that says which file it is about, where there is one."""
    return message if isinstance(source, bytes) else f"{source}: {message}"


def _decode_within_memory(data: bytes, model: nn.Module | None) -> _Decoded:
    reader = Reader(_payload(data))
    if reader.take(len(MAGIC)) != MAGIC or (version := reader.take(1)[0]) not in READABLE:
        raise DamagedFileError("not a compressed network of a version that this de_ray reads")
    plain = Reader(_inflate(reader.take(reader.varint(len(data)))))
    architecture, entries = read_entries(plain.take(plain.varint(len(data) * DEFLATE_RATIO)))
    digest = reader.take(HASH_BYTES)
    stream = reader.rest()
    elements = sum(entry.size + (entry.shape[0] if entry.exponents else 0) for entry in entries
                   if entry.raw is None and entry.same_as is None)
    if elements > ELEMENTS_A_BYTE * (len(stream) + SPARE_BYTES):
        raise DamagedFileError(f"it claims {elements} weights, more than {len(stream)} bytes can hold")
    if model is not None:  # a file of much larger weights, or of another network, is not worth its memory and time
        require_fit(model, {entry.name: entry for entry in entries})
    words, position = start(stream)
    tensors, state = [], {}
    for entry in entries:
        if entry.same_as is not None:
            tensors.append((entry, None))
            state[entry.name] = state[entry.same_as]
            continue
        if entry.raw is not None:
            tensors.append((entry, None))
            state[entry.name] = take_raw(entry, plain)
            continue
        tensor = coder.take(entry, words, position, version)
        tensors.append((entry, tensor))
        state[entry.name] = _values(tensor)
    # Every byte has a purpose: what nothing reads was not written by `encode`.
    if len(stream) > 4 * int(position[3]) or (len(stream) % 4 and not stream[-1]) or plain.rest():
        raise DamagedFileError("bytes follow its end")
    shared = {entry.name: entry.same_as for entry in entries if entry.same_as is not None}
    if digest != _hash(architecture, {name: value for name, value in state.items() if name not in shared}, shared):
        raise DamagedFileError("what it decodes to is not what was written: its hash differs")
    return _Decoded(architecture, version, tensors, state, len(data), len(stream))


def _values(tensor: QuantizedTensor) -> Tensor:
    # Damaged scales may overflow; the hash finds that.
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(tensor.dequantize()).reshape(tensor.symbols.shape))


def _inflate(packed: bytes) -> bytes:
    inflater = zlib.decompressobj(wbits=-15)
    try:
        plain = inflater.decompress(packed, DEFLATE_RATIO * len(packed) + 1)
    except zlib.error as error:
        raise DamagedFileError(f"its description cannot be inflated: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise DamagedFileError("its description does not end where it should")
    return plain


def _payload(data: bytes) -> bytes:
    try:
        tensors = load_safetensors(data)
    # Foreign files may hold types that numpy lacks: a KeyError.
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"not a compressed network: {error}") from error
    if list(tensors) != [""] or tensors[""].dtype != np.uint8 or tensors[""].ndim != 1:
        raise DamagedFileError("a safetensors file, but not a compressed network")
    return tensors[""].tobytes()


def _hash(architecture: str, state: Mapping[str, Tensor], shared: Mapping[str, str]) -> bytes:
    """Of everything that a file decodes to: tensors of their own by their elements, others by whose they are."""
    digest = hashlib.sha256(architecture.encode())
    for name, value in state.items():
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(raw_bytes(value))
    for name, other in shared.items():
        digest.update(f"\0{name}\0={other}\0".encode())
    return digest.digest()[:HASH_BYTES]
