"""How many inputs may go through a network at once, with what their way back needs, and GPUs without room for them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from de_ray.checks import first_line


def inputs_that_fit(run: Callable[[int], object], memory_mb: int) -> int:
    """Inputs whose activations fit into so many MB, at least one.

    Args:
        run: computes something differentiable of a number of inputs, 1 or 2, and returns it; where there is but one
            input, 2 may stand for it, and any number fits.
        memory_mb: for all activations that autograd keeps; what both numbers keep, such as parameters, does not count.
    """
    return max(1, memory_mb * 2**20 // max(1, bytes_an_input(run)))


def bytes_an_input(run: Callable[[int], object]) -> int:
    """Bytes of activations that autograd keeps for each input; see `inputs_that_fit`."""
    one, two = (_kept_bytes(run, count) for count in (1, 2))
    return max(0, two - one)


def even_size(total: int, most: int) -> int:
    """The size of about equal parts, of `most` at most each."""
    return math.ceil(total / math.ceil(total / most))


@contextmanager
def full_gpus_explained(way_out: str) -> Iterator[None]:
    """Turn PyTorch's error about a GPU without room into one that says what takes less.

    Args:
        way_out: a sentence.

    Raises:
        MemoryError: instead of it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{first_line(error)} {way_out}") from error


def _kept_bytes(run: Callable[[int], object], count: int) -> int:
    """Bytes that autograd keeps, each piece of memory once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run(count)  # kept alive while it is counted: freed memory would be given out, and counted, again
    total = sum(kept.values())
    del result
    return total
