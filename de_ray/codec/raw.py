"""Tensors that are stored as they are: counters and whatever cannot be quantized."""

import math

import torch
from torch import Tensor

from de_ray.codec.header import MAX_DIMENSIONS, DamagedFileError, Entry, Reader

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in
          (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
           torch.float32, torch.float64)}


def raw_entry(name: str, value: Tensor) -> Entry:
    """A tensor's description.

    Raises:
        ValueError: the format has no such type, or fewer dimensions.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor: other state, as of get_extra_state, "
                         "cannot be in a file")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name} has data type {dtype}: expected one of {', '.join(DTYPES)}")
    if value.ndim > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {value.ndim} dimensions: expected at most {MAX_DIMENSIONS}")
    return Entry(name, tuple(value.shape), raw=dtype)


def raw_bytes(value: Tensor) -> bytes:
    """A tensor's elements in memory order, little-endian."""
    if not value.numel():
        return b""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def take_raw(entry: Entry, reader: Reader) -> Tensor:
    """The inverse of `raw_bytes`.

    Raises:
        DamagedFileError: there is no such type, or the bytes run out.
    """
    if entry.raw not in DTYPES:
        raise DamagedFileError(f"{entry.name} has data type {entry.raw!r}")
    dtype = DTYPES[entry.raw]
    data = bytearray(reader.take(math.prod(entry.shape) * dtype.itemsize))
    if not data:
        return torch.zeros(entry.shape, dtype=dtype, device="cpu")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)
