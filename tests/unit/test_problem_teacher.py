import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from de_ray.config import ProblemConfig, TeacherConfig
from de_ray.problem.build import build_problem
from de_ray.problem.classifiers import accuracy, mlp
from de_ray.problem.teacher import cached_path, load_checkpoint, obtain, train

FIELDS = {"epochs": 4, "batch": 16, "learning_rate": 3e-2}
CONFIG = TeacherConfig(**FIELDS)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(200, 6, generator=GENERATOR)
LABELS = (INPUTS[:, 0] > 0).long()


def net() -> nn.Module:
    return mlp(6, 16, 2)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_learns_and_says_so_once_an_epoch(caplog):
    caplog.set_level(logging.INFO)
    model = train(net(), INPUTS, LABELS, CONFIG)
    assert not model.training
    assert accuracy(model, INPUTS, LABELS) > 90
    assert sum("epoch" in record.message for record in caplog.records) == CONFIG.epochs


def test_the_same_configuration_gives_the_same_teacher_whatever_was_drawn_before():
    first = train(net(), INPUTS, LABELS, CONFIG)
    torch.rand(7)
    assert equal(first, train(net(), INPUTS, LABELS, CONFIG))
    assert not equal(first, train(net(), INPUTS, LABELS, TeacherConfig(**FIELDS, seed=1)))


def test_training_leaves_thread_count_and_global_generator_alone():
    threads = torch.get_num_threads()
    model = net()
    state = torch.get_rng_state()
    train(model, INPUTS, LABELS, CONFIG)
    assert torch.get_num_threads() == threads
    assert torch.get_rng_state().equal(state)


def test_a_teacher_is_trained_once_and_then_cached(cache, caplog):
    caplog.set_level(logging.INFO)
    first = obtain(net(), "toy", INPUTS, LABELS, CONFIG)
    caplog.clear()
    second = obtain(net(), "toy", INPUTS, LABELS, CONFIG)
    assert equal(first, second)
    assert not second.training
    assert "epoch" not in caplog.text
    assert [path.suffix for path in (cache / "teachers").iterdir()] == [".safetensors"]


def test_a_damaged_cached_teacher_is_trained_anew_with_a_warning(cache, caplog):
    first = obtain(net(), "toy", INPUTS, LABELS, CONFIG)
    path = cached_path("toy", INPUTS, LABELS, CONFIG)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert equal(first, obtain(net(), "toy", INPUTS, LABELS, CONFIG))
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_everything_that_decides_the_weights_is_in_the_cache_key(cache):
    other = {"epochs": 5, "batch": 33, "learning_rate": 2e-2, "weight_decay": 0.1, "seed": 1}
    paths = [cached_path("toy", INPUTS, LABELS, CONFIG), cached_path("other", INPUTS, LABELS, CONFIG),
             cached_path("toy", -INPUTS, LABELS, CONFIG), cached_path("toy", INPUTS, 1 - LABELS, CONFIG)]
    for name, value in other.items():
        paths.append(cached_path("toy", INPUTS, LABELS, TeacherConfig(**{**FIELDS, name: value})))
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(cache) for path in paths)


def test_an_interrupted_write_leaves_nothing_in_the_cache(cache, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain(net(), "toy", INPUTS, LABELS, CONFIG)
    assert list((cache / "teachers").iterdir()) == []


def unusable_cache(folder, monkeypatch):
    """A cache below a file, where not even root can make one."""
    (folder / "file").touch()
    monkeypatch.setenv("DE_RAY_CACHE", str(folder / "file" / "cache"))


def test_a_cache_that_cannot_be_written_is_told_before_a_teacher_is_trained(tmp_path, monkeypatch):
    unusable_cache(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"^DE_RAY_CACHE=.*file/cache.*: Not a directory; .* DE_RAY_CACHE=FOLDER"):
        obtain(net(), "toy", INPUTS, LABELS, CONFIG, lambda *_: pytest.fail("trained, and lost"))


def test_a_cache_that_is_not_chosen_is_told_by_its_place_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / ".cache").touch()
    monkeypatch.delenv("DE_RAY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"DE_RAY_CACHE='{tmp_path}/\.cache/de_ray'"):
        obtain(net(), "toy", INPUTS, LABELS, CONFIG)


def test_a_given_checkpoint_needs_no_cache(tmp_path, monkeypatch):
    unusable_cache(tmp_path, monkeypatch)
    save_file(net().state_dict(), tmp_path / "a.safetensors")
    obtain(net(), "toy", INPUTS, LABELS, TeacherConfig(checkpoint=str(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_given_checkpoint_is_used_instead_of_training(suffix, tmp_path, cache):
    given = train(net(), INPUTS, LABELS, CONFIG)
    path = tmp_path / f"weights{suffix}"
    save_file(given.state_dict(), path) if suffix == ".safetensors" else torch.save(given.state_dict(), path)
    model = obtain(net(), "toy", INPUTS, LABELS, TeacherConfig(checkpoint=str(path)))
    assert equal(given, model)
    assert not cache.exists()


def faulty(fault: str) -> object:
    state = net().state_dict()
    if fault == "missing":
        del state["fc1.bias"]
    elif fault == "unexpected":
        state["fc9.weight"] = torch.ones(1)
    elif fault == "shape":
        state["fc1.weight"] = torch.ones(16, 7)
    elif fault == "nan":
        state["fc1.weight"][0, 0] = torch.nan
    elif fault == "nested":
        return {"state_dict": state}
    elif fault == "module":
        return net()
    return state


@pytest.mark.parametrize(("fault", "message"), [
    ("missing", r"missing \['fc1.bias'\]"),
    ("unexpected", r"unexpected \['fc9.weight'\]"),
    ("shape", r"fc1.weight has shape \[16, 7\], expected \[16, 6\]"),
    ("nan", "fc1.weight holds NaN"),
    ("nested", "expected a state dict of tensors"),
    ("module", "weights_only=True"),
])
def test_a_checkpoint_that_does_not_fit_is_a_value_error(fault, message, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(faulty(fault), path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(net(), path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", bytes(range(256)) * 8, b"PK\x03\x04" + bytes(50),
    b"hello\n", b"epoch,loss\n1,0.5\n", b'{"a": 1}', b"\x80\x02}q\x00u.", b"(tR."])
def test_a_foreign_file_is_a_value_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="neither a safetensors file"):
        load_checkpoint(net(), tmp_path / name)


class Versioned(nn.Linear):
    """Refuses state dicts that do not say by which version of it they were made, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_modules_that_ask_for_the_version_of_a_checkpoint_are_told(suffix, tmp_path):
    given, path = Versioned(6, 2), tmp_path / f"weights{suffix}"
    save_file(given.state_dict(), path) if suffix == ".safetensors" else torch.save(given.state_dict(), path)
    assert equal(load_checkpoint(Versioned(6, 2), path), given)


def test_a_missing_checkpoint_is_named_before_anything_is_trained(tmp_path, cache, caplog):
    caplog.set_level(logging.INFO)
    config = ProblemConfig(teacher=TeacherConfig(checkpoint=str(tmp_path / "absent.pt")))
    with pytest.raises(FileNotFoundError, match="problem.teacher.checkpoint=.*absent.pt"):
        build_problem(config, seed=0)
    assert "epoch" not in caplog.text
