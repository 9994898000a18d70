"""What NNCodec makes of tensors; it wants numpy < 2, so that it runs in an environment of its own, without de_ray.

    python -m venv nncodec && nncodec/bin/pip install nncodec==2.1.3
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --integers FILE.npz
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --state student.npz --out nncodec.npz

`--integers` codes level indices as they are, as bench_codec.py does, and prints the same kind of JSON object.
`--state` quantizes and codes float32 arrays at many quantization parameters, with dependent quantization and without,
and writes the decoded states and the bytes of each for bench_quantizers.py. Parameter optimization and row skipping
are on.
"""

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
from nncodec import nnc

WEIGHT_QPS = range(-26, -7, 1)
OTHER_QPS = (-40, -32, -26, -20)
"""Of biases."""


def coded(arrays: dict[str, np.ndarray], **options: object) -> tuple[bytes, dict[str, np.ndarray], float, float]:
    """The bitstream, what it decodes to, and processor seconds of both ways."""
    # It writes a file as well.
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        data = nnc.compress(arrays, bitstream_path=f"{folder}/bitstream.nnc", return_bitstream=True, row_skipping=True,
                            param_opt=True, **options)
        encoded = time.process_time()
    decoded = nnc.decompress(data)
    return data, decoded, encoded - started, time.process_time() - encoded


def integers(path: Path) -> dict[str, float]:
    """Size and speed for level indices; decoding is checked."""
    with np.load(path) as file:
        arrays = {name: np.ascontiguousarray(file[name], np.int32) for name in file.files}
    data, decoded, encode, decode = coded(arrays)
    for name, array in arrays.items():
        if not np.array_equal(np.asarray(decoded[name]), array):
            raise RuntimeError(f"{name} was decoded to other symbols")
    return {"bytes": len(data), "encode_s": round(encode, 3), "decode_s": round(decode, 3),
            "weights": sum(array.size for array in arrays.values())}


def states(path: Path, out: Path) -> dict[str, int]:
    """Quantize and code at many rates."""
    with np.load(path) as file:
        arrays = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
    found, points = {}, []
    for qp, other, dependent in product(WEIGHT_QPS, OTHER_QPS, (False, True)):
        data, decoded, _, _ = coded(arrays, qp=qp, nonweight_qp=other, use_dq=dependent)
        for name in arrays:
            found[f"{len(points)}/{name}"] = np.asarray(decoded[name], np.float32).reshape(arrays[name].shape)
        points.append(len(data))
    np.savez_compressed(out, bytes=np.array(points), **found)
    return {"points": len(points), "least": min(points), "most": max(points)}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--integers", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--out", type=Path, default=Path("nncodec.npz"))
    arguments = parser.parse_args()
    if bool(arguments.integers) == bool(arguments.state):
        parser.error("expected either --integers FILE.npz or --state FILE.npz")
    print(json.dumps(integers(arguments.integers) if arguments.integers else states(arguments.state, arguments.out)))


if __name__ == "__main__":
    main()
