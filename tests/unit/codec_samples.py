"""Tensors that look like a pruned network's."""

import numpy as np

from de_ray.codec.tensor import QuantizedTensor


def sparse(shape: tuple[int, ...], density: float, seed: int, most: int = 4) -> np.ndarray:
    """int32 symbols in [-most, most]; survivors gather in some rows and columns, as in pruned layers."""
    rng = np.random.default_rng(seed)
    rows = rng.lognormal(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    columns = rng.lognormal(0, 1.5, shape[1:])
    chance = rows * columns
    mask = rng.random(shape) < chance * density / chance.mean()
    magnitude = np.minimum(rng.geometric(0.5, shape), most)
    return np.where(mask, magnitude * rng.choice([-1, 1], shape), 0).astype(np.int32)


def layer(name: str, shape: tuple[int, ...], density: float, seed: int) -> list[QuantizedTensor]:
    """A weight of 8 levels and its bias."""
    levels = np.array([-0.5, -0.375, -0.25, -0.125, 0.125, 0.25, 0.375, 0.5], np.float32)
    bias = np.random.default_rng(seed).normal(0, 30, shape[0]).round().astype(np.int32)
    return [QuantizedTensor(f"{name}.weight", sparse(shape, density, seed), levels=levels),
            QuantizedTensor(f"{name}.bias", bias, step=np.float32(0.003))]


def lenet300() -> list[QuantizedTensor]:
    """LeNet-300-100 at 98 % sparsity."""
    return layer("fc1", (300, 784), 0.015, 0) + layer("fc2", (100, 300), 0.05, 1) + layer("fc3", (10, 100), 0.4, 2)


def lenet5() -> list[QuantizedTensor]:
    """LeNet-5 in the Caffe form at 99 % sparsity."""
    return (layer("conv1", (20, 1, 5, 5), 0.4, 0) + layer("conv2", (50, 20, 5, 5), 0.05, 1)
            + layer("fc1", (500, 800), 0.006, 2) + layer("fc2", (10, 500), 0.1, 3))
