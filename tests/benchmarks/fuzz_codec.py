"""Decode mutated and truncated files: each gives the right state or the one error, within a memory and time bound.

    python tests/benchmarks/fuzz_codec.py --files 100000 --seed 0

The time bound of a file is `BASE_SECONDS` and `SECONDS_A_WEIGHT` for each coded weight that it may claim, which the
reader limits to `ELEMENTS_A_BYTE` a byte of stream; the memory bound is `BASE_BYTES` and `BYTES_A_WEIGHT` for each of
them. Memory is the growth of the process' peak. The last line is one JSON object; any other outcome ends the run with
the file's number.
"""

import argparse
import dataclasses
import json
import resource
import time
import zlib

import numpy as np
import torch
from safetensors.numpy import load, save

from de_ray import codec
from de_ray.codec import container, header
from de_ray.codec.tensor import QuantizedTensor

BASE_SECONDS, SECONDS_A_WEIGHT = 0.25, 2e-6
BASE_BYTES, BYTES_A_WEIGHT = 64 << 20, 128


def some_file(rng: np.random.Generator) -> bytes:
    """A file of one to four small tensors of any kind, and now and then a raw one, or a second name for one."""
    tensors = []
    for index in range(rng.integers(1, 5)):
        shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.05 else 1, 8, rng.integers(1, 6)))
        alive = rng.random(shape) < rng.choice([0.0, 0.05, 0.3, 1.0])
        exponents = rng.integers(-60, 60, shape[0]).astype(np.int32) if rng.random() < 0.3 else None
        if rng.random() < 0.5:
            most = int(rng.choice([1, 5, 300, 2**24]))
            symbols = np.where(alive, rng.integers(-most, most + 1, shape), 0).astype(np.int32)
            tensors.append(QuantizedTensor(f"layer{index}.weight", symbols, step=np.float32(0.01),
                                           row_exponents=exponents))
            continue
        levels = np.unique(rng.normal(0, 1, int(rng.choice([1, 6, 16, 256]))).astype(np.float16)).astype(np.float32)
        levels = levels[levels != 0]
        negatives = int((levels < 0).sum())
        symbols = np.where(alive, rng.integers(-negatives, len(levels) - negatives + 1, shape), 0).astype(np.int32)
        tensors.append(QuantizedTensor(f"layer{index}.weight", symbols, levels=levels, row_exponents=exponents))
    raw = {"steps": torch.tensor(int(rng.integers(1000)))} if rng.random() < 0.3 else {}
    shared = {"tied.weight": tensors[0].name} if rng.random() < 0.3 else {}
    return codec.encode(tensors, raw, "net", shared)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few changes: of bytes, by insertion, deletion, copying, truncation."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not changed:
            break
        at, kind = int(rng.integers(len(changed))), rng.integers(6)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        elif kind == 2:
            del changed[at:at + int(rng.integers(1, 9))]
        elif kind == 3:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:
            other = int(rng.integers(len(changed)))
            changed[at:at + 8] = changed[other:other + 8]
        else:
            del changed[at:]
    return bytes(changed)


def enlarged(plain: bytes, stream_bytes: int, rng: np.random.Generator) -> bytes:
    """A description one of whose tensors claims many times its weights, up to a little beyond what a reader allows."""
    reader = header.Reader(plain)
    architecture, entries = header.read_entries(reader.take(reader.varint(len(plain))))
    chosen = int(rng.integers(len(entries)))
    if entries[chosen].shape:
        shape, axis = list(entries[chosen].shape), int(rng.integers(len(entries[chosen].shape)))
        most = 1.1 * container.ELEMENTS_A_BYTE * stream_bytes / max(1, entries[chosen].size)
        shape[axis] = max(1, int(shape[axis] * most ** rng.random()))
        entries[chosen] = dataclasses.replace(entries[chosen], shape=tuple(shape))
    description = header.write_entries(architecture, entries)
    return header.varint(len(description)) + description + reader.rest()


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """A file changed anywhere, in its payload alone, or in its description before that was deflated."""
    place = int(rng.choice(4, p=[0.332, 0.332, 0.332, 0.004]))
    if place == 0:
        return mutated(data, rng)
    payload = load(data)[""].tobytes()
    if place >= 2:
        reader = header.Reader(payload)
        start = reader.take(len(container.MAGIC) + 1)
        plain = zlib.decompress(reader.take(reader.varint(len(payload))), wbits=-15)
        changed = mutated(plain, rng) if place == 2 else enlarged(plain, len(payload) - reader.position, rng)
        packed = zlib.compress(changed, 9, wbits=-15)
        payload = start + header.varint(len(packed)) + packed + reader.rest()
    else:
        payload = mutated(payload, rng)
    return save({"": np.frombuffer(payload, np.uint8)})


def same(state: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    return list(state) == list(right) and all(
        value.dtype == right[name].dtype and value.shape == right[name].shape
        and value.numpy().tobytes() == right[name].numpy().tobytes()
        for name, value in state.items())


def peak_bytes() -> int:
    """Greatest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(files: int, seed: int, mutants_a_file: int = 50) -> dict[str, float]:
    """Decode so many mutants.

    Args:
        files: mutants, >= 1.
        seed: of everything.
        mutants_a_file: of one original.

    Returns:
        How many raised and how many decoded right, the slowest file's processor seconds, and the growth of peak memory.

    Raises:
        RuntimeError: a mutant decoded to another state, or took too long or too much memory. Any error that is not
            `DamagedFileError` is passed on.
    """
    rng = np.random.default_rng(seed)
    codec.decode(some_file(rng))  # compiles
    raised = slowest = 0
    before = peak_bytes()
    for number in range(files):
        if number % mutants_a_file == 0:
            data = some_file(rng)
            right = codec.decode(data)
        damaged = mutant(data, rng)
        weights = container.ELEMENTS_A_BYTE * (len(damaged) + container.SPARE_BYTES)
        peak, started = peak_bytes(), time.process_time()
        try:
            if not same(codec.decode(damaged), right):
                raise RuntimeError(f"mutant {number} of seed {seed} decoded to another state")
        except codec.DamagedFileError:
            raised += 1
        seconds = time.process_time() - started
        slowest = max(slowest, seconds)
        if seconds > BASE_SECONDS + SECONDS_A_WEIGHT * weights:
            raise RuntimeError(f"mutant {number} of seed {seed} took {seconds:.2f} s, {len(damaged)} bytes")
        grown = peak_bytes() - before
        # A peak that an earlier file left says nothing of this one.
        if peak_bytes() > peak and grown > BASE_BYTES + BYTES_A_WEIGHT * weights:
            raise RuntimeError(f"mutant {number} of seed {seed} took {grown} bytes")
    return {"files": files, "raised": raised, "right": files - raised, "slowest_s": round(slowest, 3),
            "memory_growth_bytes": peak_bytes() - before}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    found = fuzz(arguments.files, arguments.seed)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
