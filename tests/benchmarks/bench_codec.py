"""Size and speed of the coder on integer tensors; decoding is checked. The last line is one JSON object.

    python tests/benchmarks/bench_codec.py --input FILE.npz
    python tests/benchmarks/bench_codec.py --random 62000000 --density 0.1

FILE.npz holds integer arrays of any shape by name, 0 being zero and the others level indices, with their first axis
the outputs and the second the inputs (see codec_tensors.py). `bytes` are those of a whole file, `zero_order_bytes`
each tensor's entropy of single symbols, seconds processor time of one thread after compilation.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from de_ray import codec
from de_ray.codec.container import symbols_of
from de_ray.codec.header import MAX_LEVELS
from de_ray.codec.tensor import QuantizedTensor


def as_tensor(name: str, symbols: np.ndarray) -> QuantizedTensor:
    """Level indices as a tensor with so many levels, or with a step where a file cannot hold as many levels.

    Raises:
        ValueError: the array does not hold whole numbers of the coder's range.
    """
    if symbols.dtype.kind not in "iu":
        raise ValueError(f"{name}: type {symbols.dtype}, expected whole numbers")
    least, most = int(symbols.min(initial=0)), int(symbols.max(initial=0))
    if max(-least, most) > 2**24:
        raise ValueError(f"{name}: values {least}..{most}, expected at most 2^24 in magnitude")
    symbols = symbols.astype(np.int32)
    if most - least > MAX_LEVELS:
        return QuantizedTensor(name, symbols, step=np.float32(1))
    levels = np.array([level for level in range(least, most + 1) if level], np.float32)
    return QuantizedTensor(name, symbols, levels=levels)


def entropy_bytes(symbols: np.ndarray) -> float:
    """Zero-order entropy."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / max(1, counts.sum()))).sum() / 8)


def random_tensors(weights: int, density: float) -> dict[str, np.ndarray]:
    """Convolutions of 1,024 x 512 x 3 x 3 and a rest, with rows and columns of different densities."""
    rng, tensors = np.random.default_rng(0), {}
    while weights >= 9:
        rows = min(1024, -(-weights // (512 * 9)))
        inputs = min(512, weights // (9 * rows))
        chance = density * rng.lognormal(-0.125, 0.5, (rows, 1, 1)) * rng.lognormal(-0.125, 0.5, (1, inputs, 9))
        alive = rng.random((rows, inputs, 9), np.float32) < chance
        symbols = np.where(alive, np.minimum(rng.geometric(0.4, alive.shape), 7), 0).astype(np.int8)
        symbols *= 1 - 2 * rng.integers(0, 2, alive.shape, np.int8)
        tensors[f"conv{len(tensors)}"] = symbols.reshape(rows, inputs, 3, 3)
        weights -= symbols.size
    return tensors


def measure(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Encode, decode, compare."""
    tensors = [as_tensor(name, array) for name, array in arrays.items()]
    started = time.process_time()
    data = codec.encode(tensors)
    encoded = time.process_time()
    codec.decode(data)
    decoded = time.process_time()
    found = symbols_of(data)
    for tensor in tensors:
        if not np.array_equal(found[tensor.name], tensor.symbols):
            raise RuntimeError(f"{tensor.name} was decoded to other symbols")
    return {"bytes": len(data), "zero_order_bytes": round(sum(entropy_bytes(array) for array in arrays.values())),
            "encode_s": round(encoded - started, 3), "decode_s": round(decoded - encoded, 3),
            "weights": sum(array.size for array in arrays.values())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="an .npz of integer arrays")
    parser.add_argument("--random", type=int, default=0, metavar="WEIGHTS", help="random tensors instead")
    parser.add_argument("--density", type=float, default=0.1, help="of random tensors")
    arguments = parser.parse_args()
    if bool(arguments.input) == bool(arguments.random):
        parser.error("expected either --input FILE.npz or --random WEIGHTS")
    if arguments.input:
        with np.load(arguments.input) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        arrays = random_tensors(arguments.random, arguments.density)
    measure(random_tensors(5000, 0.3))  # compiles
    print(json.dumps(measure(arrays)))


if __name__ == "__main__":
    main()
