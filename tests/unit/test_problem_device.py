import threading

import pytest
import torch

from de_ray.device import mapped, resolve_device, threads


def test_threads_are_restored_after_the_block_and_after_an_error():
    former = torch.get_num_threads()
    with threads(former + 1):
        assert torch.get_num_threads() == former + 1
    with pytest.raises(KeyError), threads(former + 2):
        raise KeyError
    assert torch.get_num_threads() == former
    with pytest.raises(ValueError, match="threads=0"), threads(0):
        pass


def test_as_many_items_are_worked_on_at_a_time_as_there_are_threads_and_come_back_in_order():
    barrier = threading.Barrier(3)  # which nobody passes alone

    def waits(item):
        barrier.wait(60)
        return item

    with threads(3):
        assert list(mapped(waits, range(9))) == list(range(9))
    with threads(1):
        assert set(mapped(lambda _: threading.current_thread(), range(3))) == {threading.main_thread()}


def test_an_item_that_fails_is_told_and_ends_the_work():
    def fails(item):
        raise KeyError(item)

    with threads(2), pytest.raises(KeyError, match="0"):
        list(mapped(fails, range(100)))


def test_no_more_results_wait_than_twice_the_threads():
    made = []
    with threads(2):
        for taken, _ in enumerate(mapped(lambda item: made.append(item), range(40))):
            assert len(made) <= taken + 1 + 2 * 2
    assert sorted(made) == list(range(40))


def test_an_interruption_does_not_wait_for_what_is_under_way():
    begun, go_on = threading.Event(), threading.Event()

    def waits(item):
        if item:
            begun.set()
            go_on.wait(60)
        return item

    with threads(2):
        found = mapped(waits, range(10))
        assert next(found) == 0
        begun.wait(60)
        found.close()
    assert not go_on.is_set()
    go_on.set()


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
