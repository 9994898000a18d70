import functools
import gzip
import hashlib
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets as torchvision_datasets

from de_ray.problem import datasets
from de_ray.problem.datasets import FILES, load_digits, load_mnist

IMAGES = {True: 30, False: 20}  # by training split


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(folder: Path, gzipped: bool, seed: int = 0) -> Path:
    """A small set in the idx format, in the four files of MNIST."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in FILES:
        count = IMAGES["train" in name]
        array = rng.integers(0, 256, (count, 28, 28)) if "images" in name else rng.integers(0, 10, count)
        content = idx(array.astype(np.uint8))
        (folder / (name + ".gz" * gzipped)).write_bytes(gzip.compress(content) if gzipped else content)
    return folder


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch, cache):
    """No data set to be found, and no network."""
    monkeypatch.delenv("DE_RAY_DATA", raising=False)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION", tmp_path / "debian")
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(torchvision_datasets, name), "mirrors", ["http://127.0.0.1:9/"])


def test_digits_are_split_the_same_way_each_time():
    first, second = load_digits(), load_digits()
    assert first.train.shape == (1437, 1, 8, 8)
    assert first.test.shape == (360, 1, 8, 8)
    assert first.train.min() == 0
    assert first.train.max() == 1
    assert first.test.equal(second.test)
    assert first.test_labels.bincount().min() >= 34  # of 360: every class is held out in proportion


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_set_is_read_from_the_data_folder_without_writing_to_it(name, gzipped, tmp_path, monkeypatch, cache):
    raw = write(tmp_path / "data" / name / "raw", gzipped)
    raw.chmod(0o555)
    monkeypatch.setenv("DE_RAY_DATA", str(tmp_path / "data"))
    data = load_mnist(name)
    assert data.train.shape == (30, 1, 28, 28)
    assert data.test.shape == (20, 1, 28, 28)
    assert data.train.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    mean, deviation = datasets.NORMALISATION[name]
    pixels = data.train * deviation + mean
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)
    assert len(list(raw.iterdir())) == 4
    assert not cache.exists()


def test_other_data_in_the_folder_is_other_data_the_next_time(tmp_path, monkeypatch):
    loaded = []
    for seed in (0, 1):
        write(tmp_path / f"data{seed}" / "MNIST" / "raw", gzipped=True, seed=seed)
        monkeypatch.setenv("DE_RAY_DATA", str(tmp_path / f"data{seed}"))
        loaded.append(load_mnist("MNIST"))
    assert not loaded[0].test.equal(loaded[1].test)


def test_fashion_is_read_from_the_debian_package(tmp_path):
    write(datasets.DEBIAN_FASHION, gzipped=True)
    assert len(load_mnist("FashionMNIST").train) == 30
    with pytest.raises(FileNotFoundError):  # and is not taken for MNIST
        load_mnist("MNIST")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_set_that_is_nowhere_is_one_error_naming_the_three_ways(name, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DE_RAY_DATA", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError) as error:
        load_mnist(name)
    message = str(error.value)
    for way in ("DE_RAY_DATA", str(tmp_path / "empty"), str(datasets.DEBIAN_FASHION), "download", str(cache)):
        assert way in message
    assert list((cache / "datasets").iterdir()) == []


def test_a_download_is_kept_in_the_cache_folder(tmp_path, monkeypatch, cache):
    served = write(tmp_path / "served", gzipped=True)
    checksums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(served.iterdir())]
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision_datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(torchvision_datasets.MNIST, "resources", checksums)
        first = load_mnist("MNIST")
        server.shutdown()
    assert [path.name for path in (cache / "datasets").iterdir()] == ["MNIST"]
    assert load_mnist("MNIST").test.equal(first.test)  # the server is gone


@pytest.mark.parametrize("damage", ["truncated-gzip", "flipped-gzip", "not-gzip", "truncated-idx", "labels-as-images",
                                    "large-labels"])
def test_damaged_files_are_a_value_error_that_names_their_place(damage, tmp_path, monkeypatch):
    raw = write(tmp_path / "data" / "MNIST" / "raw", gzipped=True)
    monkeypatch.setenv("DE_RAY_DATA", str(tmp_path / "data"))
    images, labels = raw / (FILES[0] + ".gz"), raw / (FILES[1] + ".gz")
    content = bytearray(images.read_bytes())
    content[len(content) // 2] ^= 255
    replacement = {
        "truncated-gzip": images.read_bytes()[:-100],
        "flipped-gzip": bytes(content),
        "not-gzip": b"<html>Not found</html>",
        "truncated-idx": gzip.compress(gzip.decompress(images.read_bytes())[:-100]),
        "labels-as-images": labels.read_bytes(),
    }
    if damage == "large-labels":
        labels.write_bytes(gzip.compress(idx(np.full(30, 10, np.uint8))))
    else:
        images.write_bytes(replacement[damage])
    with pytest.raises(ValueError, match=str(raw)):
        load_mnist("MNIST")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_the_real_sets_are_complete_and_normalised(name, data_root, monkeypatch):
    monkeypatch.setenv("DE_RAY_DATA", str(data_root))
    data = load_mnist(name)
    assert (len(data.train), len(data.test)) == (60000, 10000)
    assert data.train.mean() == pytest.approx(0, abs=1e-3)
    assert data.train.std() == pytest.approx(1, abs=1e-3)
