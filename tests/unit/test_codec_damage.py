"""A damaged file raises the one error or decodes to what was written; never anything else."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_samples import lenet300, sparse
from safetensors.numpy import load, save

from de_ray import codec
from de_ray.codec import container, header
from de_ray.codec.tensor import QuantizedTensor
from tests.benchmarks.fuzz_codec import fuzz

VERSIONED = container.MAGIC + bytes([container.VERSION])


def small() -> bytes:
    """A file with one of everything."""
    tensors = [
        QuantizedTensor("0.weight", sparse((6, 9), 0.3, 0), step=np.float32(0.1),
                        row_exponents=np.array([0, 0, -8, 3, 0, 1], np.int32)),
        QuantizedTensor("0.bias", np.array([5, -70, 300, 0, 2, 1], np.int32), step=np.float32(0.01)),
        QuantizedTensor("1.weight", sparse((4, 3, 2, 2), 0.3, 1, most=2),
                        levels=np.array([-0.5, -0.25, 0.25, 0.5], np.float32)),
    ]
    return codec.encode(tensors, {"1.count": torch.tensor(12345)}, "net", {"2.weight": "0.weight"})


def decodes_right_or_raises(data: bytes, right: dict[str, torch.Tensor]) -> bool:
    """Whether it raises; fails on any other error and on wrong weights."""
    try:
        state = codec.decode(data)
    except codec.DamagedFileError as error:
        assert str(error)
        return True
    assert list(state) == list(right)
    assert all(state[name].equal(right[name]) for name in right)
    return False


def rebuilt(description: bytes, after: bytes = b"", stream: bytes = bytes(40)) -> bytes:
    """A file with a description of one's own."""
    packed = zlib.compress(header.varint(len(description)) + description + after, 9, wbits=-15)
    payload = VERSIONED + header.varint(len(packed)) + packed + bytes(container.HASH_BYTES) + stream
    return save({"": np.frombuffer(payload, np.uint8)})


def test_every_truncation_is_found() -> None:
    data = small()
    for length in range(len(data)):
        with pytest.raises(codec.DamagedFileError):
            codec.decode(data[:length])


def test_every_flipped_bit_is_found_or_harmless() -> None:
    data, right = small(), codec.decode(small())
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        decodes_right_or_raises(bytes(damaged), right)


def test_random_mutations_are_found_or_harmless() -> None:
    data, right = small(), codec.decode(small())
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(damaged)))
            kind = rng.integers(4)
            if kind == 0:
                damaged[at] = rng.integers(256)
            elif kind == 1:
                del damaged[at:at + int(rng.integers(1, 9))]
            elif kind == 2:
                damaged[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                other = int(rng.integers(len(damaged)))
                damaged[at:at + 8] = damaged[other:other + 8]
            if not damaged:
                break
        found += decodes_right_or_raises(bytes(damaged), right)
    assert found > 1500


def test_mutations_within_the_container_are_found_or_harmless() -> None:
    payload, right = load(small())[""], codec.decode(small())
    rng = np.random.default_rng(1)
    for _ in range(2000):
        damaged = payload.copy()
        damaged[rng.integers(len(damaged), size=rng.integers(1, 4))] = rng.integers(256)
        # The last bits of deflate and of the range coder may have no meaning.
        decodes_right_or_raises(save({"": damaged}), right)


def test_descriptions_that_were_mutated_before_deflation_are_found() -> None:
    payload = load(small())[""].tobytes()
    length, at = payload[4], 5
    assert length < 128
    plain = zlib.decompress(payload[at:at + length], wbits=-15)
    right = codec.decode(small())
    rng = np.random.default_rng(2)
    for _ in range(3000):
        damaged = bytearray(plain)
        damaged[rng.integers(len(plain))] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
        packed = zlib.compress(bytes(damaged), 9, wbits=-15)
        mutant = VERSIONED + header.varint(len(packed)) + packed + payload[at + length:]
        decodes_right_or_raises(save({"": np.frombuffer(mutant, np.uint8)}), right)


@pytest.mark.parametrize("shape", [(2**40,), (2**40, 2**40), (2**20, 2**20, 2**20), (0, 2**40), (2**40, 0),
                                   (2**40, 0, 2**40), (1, 2**31), (2**31, 1)])
@pytest.mark.parametrize("kind", ["step", "levels", "raw", "exponents"])
def test_absurd_shapes_are_refused_before_anything_is_allocated(shape: tuple[int, ...], kind: str) -> None:
    entry = {"step": header.Entry("w", shape, 0, 0, step=np.float32(1)),
             "levels": header.Entry("w", shape, 0, 0, levels=np.ones(1, np.float32)),
             "raw": header.Entry("w", shape, raw="float32"),
             "exponents": header.Entry("w", shape, 0, 0, step=np.float32(1), exponents=(0, 0))}[kind]
    with pytest.raises(codec.DamagedFileError):
        codec.decode(rebuilt(header.write_entries("net", [entry])))


@pytest.mark.parametrize("levels", [[np.nan], [np.inf], [0.0], [2.0, 1.0], [1.0, 1.0], [1.0] * 257])
def test_impossible_levels_are_refused(levels: list[float]) -> None:
    entry = header.Entry("w", (2, 2), 1, 0, levels=np.array(levels, np.float32))
    with pytest.raises(codec.DamagedFileError):
        codec.decode(rebuilt(header.write_entries("net", [entry])))


def test_an_impossible_step_is_refused() -> None:
    for step in (np.nan, np.inf, 0, -1):
        entry = header.Entry("w", (2, 2), 1, 0, step=np.float32(step))
        with pytest.raises(codec.DamagedFileError, match="step"):
            codec.decode(rebuilt(header.write_entries("net", [entry])))


def test_names_that_grow_from_one_to_the_next_are_refused() -> None:
    """Each shares all of the last one and adds to it: memory would grow with the square of the file."""
    grown, parts = b"", [header.varint(0), header.varint(3)]
    for _ in range(3):
        parts += [header.varint(len(grown)), header.varint(600), bytes(600 * b"a"), bytes([1 << 3 | header.IS_RAW]),
                  header.varint(0), header.varint(1), b"U"]
        grown += 600 * b"a"
    with pytest.raises(codec.DamagedFileError, match="a name of 1200 bytes, expected at most 1024"):
        header.read_entries(b"".join(parts))


def test_more_weights_than_memory_holds_are_the_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(container.coder, "take", take)
    with pytest.raises(codec.DamagedFileError, match="memory"):
        codec.decode(small())


def test_two_tensors_of_one_name_are_refused() -> None:
    entry = header.Entry("w", (2, 2), 0, 0, step=np.float32(1))
    with pytest.raises(codec.DamagedFileError, match="name"):
        codec.decode(rebuilt(header.write_entries("net", [entry, entry])))


def test_trailing_garbage_is_found() -> None:
    data = small()
    payload = load(data)[""].tobytes()
    for extra in (b"\0", b"\1", b"garbage" * 9, bytes(100)):
        with pytest.raises(codec.DamagedFileError):
            codec.decode(data + extra)
    for extra in (b"\0", b"garbage" * 9, bytes(100)):
        with pytest.raises(codec.DamagedFileError):
            codec.decode(save({"": np.frombuffer(payload + extra, np.uint8)}))


@pytest.mark.parametrize("data", [
    b"", b"\0", b"hello, world" * 20, b"PK\x03\x04" + bytes(100), bytes(1000), b"\xff" * 1000,
    struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10) + b"{}",
    save({"weight": np.zeros((3, 3), np.float32)}), save({"": np.zeros(50, np.uint8)}),
    save({"": np.zeros(0, np.uint8)}), save({"": np.zeros((5, 5), np.uint8)}), save({"": np.zeros(50, np.int8)}),
    save({}), save({"": np.zeros(9, np.uint8), "a": np.zeros(9, np.uint8)})])
def test_a_foreign_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    for read in (codec.decode, codec.inspect, codec.load):
        with pytest.raises(codec.DamagedFileError):
            read(tmp_path / "file")


def test_a_safetensors_file_of_a_type_that_numpy_lacks_is_refused() -> None:
    head = json.dumps({"": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(codec.DamagedFileError):
        codec.decode(struct.pack("<Q", len(head)) + head + bytes(4))


def test_a_file_of_a_later_version_is_refused() -> None:
    payload = load(small())[""].copy()
    payload[3] += 1
    with pytest.raises(codec.DamagedFileError, match="version"):
        codec.decode(save({"": payload}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (codec.decode, codec.inspect, codec.load):
        with pytest.raises(FileNotFoundError, match="nothing.dray"):
            read(tmp_path / "nothing.dray")


def test_a_flipped_bit_of_a_network_is_found() -> None:
    data = bytearray(codec.encode(lenet300(), {}, "lenet300"))
    data[len(data) // 2] ^= 16
    with pytest.raises(codec.DamagedFileError):
        codec.decode(bytes(data))


def test_mutants_decode_right_or_raise_within_their_bounds() -> None:
    found = fuzz(2000, seed=1)
    assert found["raised"] + found["right"] == 2000 and found["raised"] > 1800


def test_two_tensors_of_one_name_are_refused_as_they_are_read():
    twice = header.write_entries("", [header.Entry("a", (1,), raw="int64")] * 2)
    with pytest.raises(codec.DamagedFileError, match="two tensors have one name"):
        header.read_entries(twice)


def test_a_number_without_an_end_is_refused():
    with pytest.raises(codec.DamagedFileError, match="more than 63 bits"):
        header.Reader(b"\x80" * 12).varint(2**40)
