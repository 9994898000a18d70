"""What every refit minimises: how far a network is from the teacher on random inputs, without labels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from de_ray.config import RefitConfig
from de_ray.device import moved, precision, products, warn_of_precision
from de_ray.memory import even_size, inputs_that_fit
from de_ray.problem.base import Output, Problem
from de_ray.problem.sampling import draw_batch

CACHE_BYTES = 256 * 2**20
"""Teacher outputs up to this size are computed once and kept; larger ones are computed for each batch."""


class Objective:
    """Mean `Problem.objective` on a random batch of a problem's inputs, augmented as the problem has it.

    Args:
        problem: inputs, teacher, objective, augmentation.
        config: `batch`, `precision` and `memory_mb` are used.
        device: where networks run.
        share: rank and number of workers that take the mean of a batch together, each on its part of it.
    """

    def __init__(self, problem: Problem, config: RefitConfig, device: torch.device,
                 share: tuple[int, int] = (0, 1)) -> None:
        self._rank, self._workers = share
        self._problem, self._config, self._device = problem, config, device
        warn_of_precision("refit.precision", config.precision, device)
        self._teacher: nn.Module = problem.teacher.to(device)
        self._most: int | None = None  # inputs whose activations fit into the memory

    def backward(self, forward: Callable[[Tensor], Output], generator: torch.Generator) -> Tensor:
        """Draw a batch and add the gradient of the mean of how far `forward` is from the teacher on it to `.grad`s.

        Args:
            forward: inputs [N, ...] on the device -> the network's outputs.
            generator: draws the batch and its augmentation; on the CPU.

        Returns:
            The mean, [].
        """
        total = torch.zeros((), device=self._device)
        for part in self.parts(forward, generator):
            part.backward()
            total = total + part.detach()
        return total

    def parts(self, forward: Callable[[Tensor], Output], generator: torch.Generator) -> Iterator[Tensor]:
        """The mean that `backward` is of, in parts that add up to it: [] each, differentiable.

        There is one of them unless the batch's activations take more than `memory_mb`. The next one's are computed when
        it is asked for, by when the backward pass of the one before has freed its own.
        """
        problem = self._problem
        indices = draw_batch(len(problem.inputs), problem.chances, self._config.batch, generator)
        inputs = moved(problem.inputs[indices], self._device)  # augmentation is the device's work too
        if problem.augment is not None:
            inputs = problem.augment(inputs, generator)
        # All workers measure the same inputs: with other numbers of parts they would wait for each other for ever.
        most = self._fitting(forward, indices, inputs)
        # Every worker draws and augments the whole batch: what a part holds does not depend on how many there are.
        indices, inputs = indices[self._rank::self._workers], inputs[self._rank::self._workers]
        size = even_size(len(inputs), most)
        for some, part in zip(indices.split(size), inputs.split(size), strict=True):
            yield self._distances(forward, some, part).sum() / len(inputs)

    def _distances(self, forward: Callable[[Tensor], Output], indices: Tensor, inputs: Tensor) -> Tensor:
        """[N]: of each input, the teacher's output on which is known by its index, or taken."""
        problem = self._problem
        with precision(self._config.precision, self._device):
            if self._kept is not None:
                leaves, structure = self._kept
                indices = indices.to(self._device)
                expected = tree_unflatten([leaf[indices] for leaf in leaves], structure)
            else:
                expected = self._expected(inputs)
            found = forward(inputs)
        return (problem.objective or problem.divergence)(expected, found)

    def _fitting(self, forward: Callable[[Tensor], Output], indices: Tensor, inputs: Tensor) -> int:
        """Inputs a part, at most; measured once, on the first two of a batch."""
        if self._most is None:
            # Passes that no backward pass follows are none that workers wait for each other in.
            alone = forward.module if isinstance(forward, DistributedDataParallel) else forward
            self._most = inputs_that_fit(lambda n: self._distances(alone, indices[:n], inputs[:n]),
                                         self._config.memory_mb)
        return self._most

    def products(self) -> AbstractContextManager[None]:
        """Around whole steps: backward passes are to multiply as forward passes do."""
        return products(self._config.precision, self._device)

    @torch.no_grad()
    def _expected(self, inputs: Tensor) -> Output:
        return self._teacher(inputs)

    @cached_property
    def _kept(self) -> tuple[list[Tensor], TreeSpec] | None:
        """The teacher's outputs on all inputs, where inputs do not change and outputs are small."""
        inputs = self._problem.inputs
        if self._problem.augment is not None:
            return None
        first, structure = tree_flatten(self._expected(inputs[:1].to(self._device)))
        if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in first):
            return None  # numbers, None and such, which no divergence looks at
        if sum(leaf.numel() * leaf.element_size() for leaf in first) * len(inputs) > CACHE_BYTES:
            return None
        batches = inputs.split(self._config.batch)
        parts = [tree_flatten(self._expected(batch.to(self._device)))[0] for batch in batches]
        if any(leaf.shape != (len(batch), *one.shape[1:]) for batch, part in zip(batches, parts, strict=True)
               for leaf, one in zip(part, first, strict=True)):
            return None  # as long as the longest of a batch, say, or the same for all samples
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)], structure
