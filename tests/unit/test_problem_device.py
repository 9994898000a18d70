import pytest
import torch

from de_ray.device import resolve_device, threads


def test_threads_are_restored_after_the_block_and_after_an_error():
    former = torch.get_num_threads()
    with threads(former + 1):
        assert torch.get_num_threads() == former + 1
    with pytest.raises(KeyError), threads(former + 2):
        raise KeyError
    assert torch.get_num_threads() == former
    with pytest.raises(ValueError, match="threads=0"), threads(0):
        pass


def test_cpu_makes_no_call_to_cuda(monkeypatch):
    def forbidden():
        raise AssertionError("a call to CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", forbidden)
    monkeypatch.setattr(torch.cuda, "device_count", forbidden)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("available", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(available, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == kind


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_a_value_error(name, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"this machine, which has {gpus}"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", ""])
def test_a_name_of_no_device_is_a_value_error(name):
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_is_named_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
