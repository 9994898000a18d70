"""Sizes, files and what reading them needs."""

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_samples import lenet5, lenet300, sparse
from torch import nn

from de_ray import codec
from de_ray.codec.tensor import QuantizedTensor
from de_ray.device import threads
from de_ray.files import write_atomically


def entropy_bytes(symbols: np.ndarray) -> float:
    """Zero-order entropy."""
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / counts.sum()
    return float(-(counts * np.log2(shares)).sum() / 8)


@pytest.mark.parametrize("network", [lenet300, lenet5])
def test_container_and_header_of_a_lenet_take_under_300_bytes(network) -> None:
    summary = codec.inspect(codec.encode(network(), {}, "lenet"))
    assert summary.container_bytes <= 300


def test_a_file_does_not_depend_on_the_threads_that_write_it() -> None:
    with threads(1):
        alone = codec.encode(lenet300(), {}, "lenet")
    with threads(3):
        assert codec.encode(lenet300(), {}, "lenet") == alone


def test_structured_sparsity_is_coded_below_its_zero_order_entropy() -> None:
    tensors = lenet300()
    zero_order = sum(entropy_bytes(t.symbols) for t in tensors if t.levels is not None)
    coded = sum(codec.coded_bytes(t) - 2 * len(t.levels) for t in tensors if t.levels is not None)
    assert coded < 0.87 * zero_order


def test_unstructured_sparsity_costs_little_more_than_its_zero_order_entropy() -> None:
    rng = np.random.default_rng(0)
    symbols = np.where(rng.random((200, 300)) < 0.05, rng.integers(1, 5, (200, 300)), 0).astype(np.int32)
    tensor = QuantizedTensor("w", symbols, step=np.float32(1))
    assert codec.coded_bytes(tensor) < 1.05 * entropy_bytes(symbols) + 4


def test_dense_biases_cost_about_their_entropy() -> None:
    symbols = np.random.default_rng(0).normal(0, 40, 410).round().astype(np.int32)
    gaussian = 410 * np.log2(40 * np.sqrt(2 * np.pi * np.e)) / 8
    assert codec.coded_bytes(QuantizedTensor("b", symbols, step=np.float32(1))) < 1.1 * gaussian


def test_the_summary_adds_up() -> None:
    tensors = lenet300()
    data = codec.encode(tensors, {"steps": torch.tensor(3)}, "lenet300")
    summary = codec.inspect(data)
    assert summary.architecture == "lenet300" and summary.file_bytes == len(data)
    assert abs(summary.container_bytes + sum(t.payload_bytes for t in summary.tensors) - len(data)) < 12
    for line, tensor in zip(summary.tensors, tensors, strict=False):
        assert (line.name, line.shape, line.weights) == (tensor.name, tensor.symbols.shape, tensor.symbols.size)
        assert line.density == np.count_nonzero(tensor.symbols) / tensor.symbols.size
        assert abs(codec.coded_bytes(tensor) - line.payload_bytes) < 1 + (4 if tensor.levels is None else 16)


def test_a_file_decodes_as_its_bytes_do(tmp_path: Path) -> None:
    data = codec.encode(lenet300(), {}, "lenet300")
    write_atomically(tmp_path / "net.dray", data)
    assert (tmp_path / "net.dray").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    decoded = codec.load(str(tmp_path / "net.dray"))
    assert all(decoded[t.name].numpy().tobytes() == t.dequantize().tobytes() for t in lenet300())


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"a")
    (tmp_path / "b").write_bytes(b"b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_a_model_is_filled_and_put_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    tensors = [QuantizedTensor(name, np.ones(tuple(v.shape), np.int32), step=np.float32(0.5))
               for name, v in state.items() if v.is_floating_point()]
    data = codec.encode(tensors, {n: v for n, v in state.items() if not v.is_floating_point()})
    write_atomically(tmp_path / "net", data)
    loaded = codec.load(tmp_path / "net", model)
    assert loaded is model and not model.training
    assert (model[0].weight == 0.5).all() and model[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("dtype, step, told", [
    (torch.bfloat16, 0.5 + 2**-10, True), (torch.float16, 2**-30, True), (torch.float16, 0.5 + 2**-10, False),
    (torch.float64, 0.1, False), (torch.float32, 0.1, False)])
def test_a_model_that_rounds_the_files_values_is_told_of(
        dtype: torch.dtype, step: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = [QuantizedTensor(name, np.ones(shape, np.int32), step=np.float32(step))
               for name, shape in (("weight", (3, 4)), ("bias", (3,)))]
    write_atomically(tmp_path / "net", codec.encode(tensors))
    codec.load(tmp_path / "net", nn.Linear(4, 3, dtype=dtype))
    assert ("the model's weight, ... hold" in caplog.text and "model.float()" in caplog.text) == told


@pytest.mark.parametrize(("model", "message"), [
    (nn.Linear(4, 3, bias=False), "fit"), (nn.Linear(5, 3), "fit"), (nn.Sequential(nn.Linear(4, 3)), "fit"),
    (nn.Linear(4, 3, device="meta"), "the model's weight is on the device meta"), (nn.Linear, "model is a type"),
    (nn.Linear(4, 3).state_dict(), "model is a OrderedDict")])
def test_a_file_that_does_not_fit_the_model_is_one_error_before_it_is_decoded(
        model: nn.Module, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode([QuantizedTensor("weight", np.ones((3, 4), np.int32), step=np.float32(1)),
                         QuantizedTensor("bias", np.ones(3, np.int32), step=np.float32(1))])
    write_atomically(tmp_path / "net", data)
    monkeypatch.setattr("de_ray.codec.symbols.take", None)  # would be called
    with pytest.raises(ValueError, match=message):
        codec.load(tmp_path / "net", model)


READ = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "hydra", "mlflow", "ultralytics", "omegaconf", "optuna", "matplotlib"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import de_ray
print(de_ray.load(sys.argv[1])["w"].shape)
"""
READ_ONLY = """
from numba.core import caching
def refuse(self):
    raise OSError("read-only file system")
# Private in some of numba's versions.
[locator] = [value for name, value in vars(caching).items() if name.lstrip("_") == "InTreeCacheLocator"]
locator.ensure_cache_path = refuse
"""


def read_elsewhere(before: str, after: str, data: bytes, folder: Path) -> str:
    """What a process prints that reads a file and keeps compiled kernels of its own in a folder, if anywhere."""
    write_atomically(folder / "net", data)
    done = subprocess.run([sys.executable, "-c", before + READ + after, str(folder / "net")], capture_output=True,
                          text=True, env={**os.environ, "XDG_CACHE_HOME": str(folder)}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_needs_no_ray_hydra_mlflow_or_ultralytics(tmp_path: Path) -> None:
    data = codec.encode([QuantizedTensor("w", sparse((5, 5), 0.3, 0), step=np.float32(1))])
    assert read_elsewhere("", "", data, tmp_path) == "torch.Size([5, 5])"


def test_reading_needs_no_writable_package_folder_and_keeps_kernels_with_the_users_files(tmp_path: Path) -> None:
    # A kernel that compiles in an instant stands for the others: all need a place as they are defined.
    after = "from de_ray.codec.model import _bit_length\nprint(_bit_length(5))\n"
    data = codec.encode([], {"w": torch.zeros(5, 5)})
    assert read_elsewhere(READ_ONLY, after, data, tmp_path) == "torch.Size([5, 5])\n3"
    assert list(tmp_path.rglob("model._bit_length*.nbi")), "compiled, and kept"


def test_a_file_that_does_not_fit_changes_nothing_of_the_module(tmp_path):
    path = tmp_path / "other.der"
    trained = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()
    path.write_bytes(codec.encode([], trained))
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"2 of their 4 tensors differ in name or shape \(2.weight, 2.bias\)"):
        codec.load(path, model=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "cut.der"
    path.write_bytes(codec.encode([], {"weight": torch.ones(3)})[:-4])
    for read in (codec.decode, codec.inspect, codec.load):
        with pytest.raises(codec.DamagedFileError, match=r"cut\.der: not a compressed network"):
            read(path)
