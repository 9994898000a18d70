"""Darknet `.weights` files: a header, then float32 values, layer after layer.

Source: Darknet's parser.c (load_convolutional_weights). A convolution with batch norm holds its biases (beta), scales
(gamma), rolling means and rolling variances, [R] each, then weights [R, C / groups, size, size]; one without holds
biases and weights.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from de_ray.problem.darknet import Darknet, Shortcut

EPSILON = 1e-5
"""Added to the variance's root, as in Darknet's GPU kernel, with which the published weights were trained; its CPU code
adds 1e-6, which moves YOLOv3-tiny's outputs by 6e-4 and no average precision."""
BRANCH = 0.3
"""Gain of random residual branches: 23 of them in YOLOv3 would grow activations beyond use otherwise."""


@torch.no_grad()
def load_weights(network: Darknet, path: Path) -> Darknet:
    """Read weights into a network, batch norm folded; returns it in eval mode.

    Args:
        network: changed in place.
        path: of the file. Header versions below 0.2 count the images seen in 32 bits, later ones in 64.

    Raises:
        ValueError: the file holds another number of values than the network takes, or values that are not finite.
    """
    data = path.read_bytes()
    start = _header_size(data, path)
    expected = values_of(network)
    found, rest = divmod(len(data) - start, 4)
    if found != expected or rest:
        extra = f" and {rest} bytes" if rest else ""
        raise ValueError(f"{path}: the network takes {expected:,} float32 values after the header, and the file holds "
                         f"{found:,}{extra}: it is {'truncated' if found < expected else 'of another network'}, or "
                         f"problem.cfg is not its configuration")
    values = torch.from_numpy(np.frombuffer(data, "<f4", found, start).astype(np.float32))
    if not values.isfinite().all():
        raise ValueError(f"{path}: holds NaN or infinite values, the first as value "
                         f"{int(values.isfinite().logical_not().nonzero()[0])} after the header")
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        taken += math.prod(shape)
        return values[taken - math.prod(shape):taken].reshape(shape)

    for convolution in network.convolutions:
        module = getattr(network, convolution.name)
        rows = module.out_channels
        bias = take(rows)
        if convolution.batch_normalize:
            gamma, mean, variance = take(rows), take(rows), take(rows)
            # Variances are averages of squares; a negative one could only come from damage.
            gain = gamma.double() / (variance.double().clamp_min(0).sqrt() + EPSILON)  # [R]
            weight = (take(*module.weight.shape).double() * gain[:, None, None, None]).float()
            bias = (bias.double() - mean.double() * gain).float()
        else:
            weight = take(*module.weight.shape)
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return network.eval()


def values_of(network: Darknet) -> int:
    """Number of float32 values of the network's weights file, batch norm statistics included."""
    total = 0
    for convolution in network.convolutions:
        module = getattr(network, convolution.name)
        total += module.weight.numel() + module.out_channels * (4 if convolution.batch_normalize else 1)
    return total


@torch.no_grad()
def draw_weights(network: Darknet, seed: int) -> Darknet:
    """Random weights that keep activations near 1 through any depth; returns the network in eval mode.

    He et al. (arXiv:1502.01852) for leaky layers; the last convolution of a residual branch is scaled down.

    Args:
        network: changed in place.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    for step, after in zip(network.steps, [*network.steps[1:], None], strict=True):
        if step not in network.convolutions:
            continue
        module: nn.Conv2d = getattr(network, step.name)
        gain = math.sqrt(2 / 1.01) if step.leaky else 1.0
        gain *= BRANCH if isinstance(after, Shortcut) else 1.0
        nn.init.normal_(module.weight, 0, gain / math.sqrt(module.weight[0].numel()), generator=generator)
        nn.init.zeros_(module.bias)
    return network.eval()


def _header_size(data: bytes, path: Path) -> int:
    """Bytes before the first value: three 32-bit version numbers and the images seen."""
    if len(data) >= 12:
        major, minor, _ = struct.unpack("<3i", data[:12])
        size = 20 if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else 16
        if len(data) >= size:
            return size
    raise ValueError(f"{path}: {len(data)} bytes, too few for the header of a Darknet weights file")
