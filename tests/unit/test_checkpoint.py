"""Checkpoints: bit-equal, atomic, and damaged ones passed over."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from de_ray import checkpoint, files


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(3, 5, generator=generator), "mask": torch.rand(3, 7, generator=generator) > 0.5,
            "empty": torch.zeros(0, 4, dtype=torch.bool), "scalar": torch.tensor(4, dtype=torch.int64),
            "nan": torch.tensor([float("nan"), -0.0]), "half": torch.ones(2, dtype=torch.bfloat16)}


def as_bytes(tensor):
    """Bits, not numbers: NaN does not equal itself, and -0.0 equals 0.0."""
    return tensor.flatten().view(torch.uint8)


def test_everything_comes_back_bit_for_bit(tmp_path):
    meta = {"done": 3, "history": [{"divergence": 0.1 + 0.2, "sets": None}], "fingerprint": {}}
    checkpoint.save_checkpoint(tmp_path, 3, tensors(), meta)
    found = checkpoint.latest(tmp_path)
    assert found.done == 3 and found.meta == meta and found.tensors.keys() == tensors().keys()
    for key, value in tensors().items():
        assert found.tensors[key].dtype == value.dtype and found.tensors[key].shape == value.shape
        assert torch.equal(as_bytes(found.tensors[key]), as_bytes(value))


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_only_the_newest_two_are_kept(tmp_path):
    for done in (1, 2, 3, 10):
        checkpoint.save_checkpoint(tmp_path, done, {}, {})
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-0003.safetensors",
                                                                                "step-0010.safetensors"]


def flipped(data, place):
    """One bit of a file turned over."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * 40,
    lambda data: flipped(data, len(data) - 1), lambda data: flipped(data, len(data) - 70),
    lambda data: flipped(data, data.index(b"done") + 8), lambda data: flipped(data, data.index(b"mask"))],
    ids=["half", "all but a byte", "empty", "foreign", "last bit", "a bit of a weight", "a bit of the meta",
         "a bit of a name"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    checkpoint.save_checkpoint(tmp_path, 1, tensors(), {"done": 1})
    newest = checkpoint.save_checkpoint(tmp_path, 2, tensors(), {"done": 2})
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoint.latest(tmp_path).done == 1
    assert "step-0002" in caplog.text


def test_where_every_checkpoint_is_damaged_there_is_none(tmp_path, caplog):
    checkpoint.save_checkpoint(tmp_path, 1, tensors(), {}).write_bytes(b"")
    assert checkpoint.latest(tmp_path) is None
    assert "or to the start" in caplog.text


def test_masks_take_a_bit_a_weight(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, 1, {"mask": torch.ones(1000, 80, dtype=torch.bool)}, {})
    assert path.stat().st_size < 10_000 + 400


def test_a_process_killed_before_the_rename_leaves_the_old_and_the_next_write_cleans_up(tmp_path):
    code = ("import os, signal, sys, torch; from pathlib import Path; from de_ray import checkpoint\n"
            "checkpoint.save_checkpoint(Path(sys.argv[1]), 1, {'x': torch.ones(3)}, {'done': 1})\n"
            "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "checkpoint.save_checkpoint(Path(sys.argv[1]), 2, {'x': torch.zeros(3)}, {'done': 2})")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    folder = tmp_path / "checkpoint"
    assert len(list(folder.iterdir())) == 2  # the old one and what the kill left
    assert checkpoint.latest(tmp_path).done == 1
    checkpoint.save_checkpoint(tmp_path, 2, {}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-0001.safetensors", "step-0002.safetensors"]


def test_a_write_that_dies_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, kind in ((tmp_path / "absent/s.der", FileNotFoundError), (tmp_path / "file/s.der", NotADirectoryError)):
        with pytest.raises(kind) as caught:
            files.write_atomically(path, b"new")
        assert caught.value.filename == str(path) and str(caught.value).endswith(f": '{path}'")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/s\.der'$") as caught:
        files.write_atomically(tmp_path / "s.der", b"new")
    assert caught.value.errno == errno.ENOSPC and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_system_without_a_number_stays_as_it_is(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        files.write_atomically(tmp_path / "s.der", b"new")


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "s.der").mkdir()
    with pytest.raises(IsADirectoryError, match=rf"^{tmp_path}/s\.der is a folder; expected the path of a file"):
        files.write_atomically(tmp_path / "s.der", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["s.der"]


def test_a_folder_that_can_be_made_is_writable_and_one_below_a_file_is_not(tmp_path):
    (tmp_path / "file").touch()
    assert files.unwritable(tmp_path) is None and files.unwritable(tmp_path / "a/b") is None
    assert files.unwritable(tmp_path / "file") == files.unwritable(tmp_path / "file/below") == "Not a directory"
    assert files.unwritable(tmp_path / ("x" * 300)) == "File name too long"
    (tmp_path / "link").symlink_to("nowhere")
    assert files.unwritable(tmp_path / "link/below") == "No such file or directory"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_equal_fingerprints_pass_whether_lists_or_tuples():
    checkpoint.require_same({"fingerprint": {"a": [1, 2], "b": {"c": None}}}, {"a": (1, 2), "b": {"c": None}})


def test_different_fingerprints_name_each_key_with_both_values():
    with pytest.raises(ValueError, match=r"b\.c=1 then, 2 now; d='x' then, None now"):
        checkpoint.require_same({"fingerprint": {"a": 0, "b": {"c": 1}, "d": "x"}}, {"a": 0, "b": {"c": 2}})
