"""Lossless coding of quantized state dicts; imports torch, numpy, safetensors, constriction and numba alone."""

from de_ray.codec.container import (
    FileSummary,
    TensorSummary,
    decode,
    decode_named,
    encode,
    examine,
    fill,
    inspect,
    load,
)
from de_ray.codec.header import DamagedFileError
from de_ray.codec.symbols import coded_bytes, significance
from de_ray.codec.tensor import QuantizedTensor

__all__ = ["DamagedFileError", "FileSummary", "QuantizedTensor", "TensorSummary", "coded_bytes", "decode",
           "decode_named", "encode", "examine", "fill", "inspect", "load", "significance"]
