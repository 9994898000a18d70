"""Where tensors live and how many CPU threads work on them."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from de_ray.checks import require

log = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")

MOST_AT_A_TIME = 4
"""Items under way in `mapped`; with twice as many results at most, their memory adds up."""
AMPERE = (8, 0)
"""The compute capability from which on GPUs multiply tf32 and bfloat16."""


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


def available_threads() -> int:
    """Threads that torch operations may have: a core each, of those that affinity and a container's quota leave to this
    process and, where it is set, OMP_NUM_THREADS."""
    from loky import cpu_count  # not before it is asked: files are decoded without it

    return min(torch.get_num_threads(), cpu_count())


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What a function makes of items, in their order, by as many threads as torch operations have just now, a few at
    most; for work that NumPy or numba do without Python's lock."""
    count = min(MOST_AT_A_TIME, torch.get_num_threads())
    if count == 1:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(count), deque()
    try:
        for item in items:
            if len(waiting) == 2 * count:  # results that nobody has taken yet take memory too
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interruption is not to wait for what is under way


@contextmanager
def products(name: str, device: torch.device) -> Iterator[None]:
    """Have a block's float32 convolutions and products, backward passes included, in a precision; then restore it.

    Left alone, PyTorch multiplies float32 convolutions in tf32 on GPUs that can.

    Args:
        name: see `precision`; tf32 where it is that, float32 proper for others.
        device: where the block computes.
    """
    if device.type != "cuda":
        yield
        return
    restore = _switched(name == "tf32")
    try:
        yield
    finally:
        restore()


def _switched(tf32: bool) -> Callable[[], None]:
    """Switch tf32 on or off for products and convolutions on GPUs; returns what restores the former state."""
    cudnn = torch.backends.cudnn
    try:
        former = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        # Where the application has used PyTorch's newer switches, those cannot be read any more.
        switches = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
        precisions = [switch.fp32_precision for switch in switches]

        def newer(values: Iterable[str]) -> None:
            for switch, value in zip(switches, values, strict=True):
                switch.fp32_precision = value

        newer(["tf32" if tf32 else "ieee"] * len(switches))
        return partial(newer, precisions)

    def older(of_products: str, convolutions: bool) -> None:
        torch.set_float32_matmul_precision(of_products)
        cudnn.allow_tf32 = convolutions

    older("high" if tf32 else "highest", tf32)
    return partial(older, *former)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Run a block's convolutions and products in another precision, then restore the former one.

    Args:
        name: float32, tf32 (float32 in and out with products of 10-bit mantissas; no effect on a CPU) or bfloat16 (no
            effect on a CPU without instructions for it: PyTorch would take 16 times as long as in float32 for
            convolutions, and has no LSTM).
        device: where the block computes.
    """
    with products(name, device):
        if name == "bfloat16" and computes_bfloat16(device):
            with torch.autocast(device.type, torch.bfloat16):
                yield
        else:
            yield


def warn_of_precision(key: str, name: str, device: torch.device) -> None:
    """Say so where `precision` will have no effect, or the opposite one.

    Args:
        key: of the configuration.
        name: its value.
        device: where it is meant for.
    """
    if name == "tf32" and device.type == "cpu":
        log.warning("%s=tf32 is ignored on a CPU, which computes in float32; bfloat16 is not", key)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
        if name == "tf32":
            log.warning("%s=tf32 is ignored on this GPU, which is older than Ampere and computes in float32", key)
        if name == "bfloat16":
            log.warning("%s=bfloat16: this GPU, older than Ampere, has no units for it, and may be slower than in "
                        "float32; set it to float32", key)
    if name == "bfloat16" and not computes_bfloat16(device):
        log.warning("%s=bfloat16: this processor has no instructions for it, and computes in float32", key)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a processor multiplies bfloat16 itself; taken for granted of GPUs, and where PyTorch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return device.type != "cpu" or capabilities is None or any(
        value for name, value in capabilities().items() if "bf16" in name)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU from page-locked memory, without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
