"""Where tensors live and how many CPU threads work on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from de_ray.config import require


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` >= 1 CPU threads inside torch operations, then restore the former count.

    The count is part of a result: reductions that are split among more threads round differently.
    """
    require(count >= 1, "threads", count, "at least 1")
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def resolve_device(name: str) -> torch.device:
    """The device that `name` stands for.

    Args:
        name: auto (a GPU where there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: for another name, or for a GPU that this machine does not have.
    """
    if name == "cpu":  # before any call to CUDA: a CPU run leaves GPUs untouched
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, separator, index = name.partition(":")
    require(kind == "cuda" and (not separator or index.isdecimal()), "device", name, "auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count()
    require(int(index or 0) < gpus, "device", name,
            f"a GPU of this machine, which has {gpus}; auto or cpu runs anywhere")
    return torch.device(name)
