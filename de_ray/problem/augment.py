"""Label-free augmentation of inputs: images, and arrays of any other kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from de_ray.checks import require_choice
from de_ray.config import AUGMENTATIONS
from de_ray.device import moved
from de_ray.problem.base import Augment
from de_ray.problem.packing import Packing, unpacked

Way = Callable[[Tensor, torch.Generator, float], Tensor]
"""(inputs [N, ...], generator, share of them) -> inputs of the same shape."""
REACH = 1
"""Pixels, at most, that `shift` moves an image along each axis."""
DISPLACED = 0.25
"""Of an image's height and width, at most, between where `cutmix` takes a rectangle from and where it pastes it."""


def shift(inputs: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Move each image, with probability `share`, by its own whole pixels, uniform in -REACH..REACH along each axis.

    Moved images keep survivors from fitting the teacher's outputs by heart; images that stay where the teacher learned
    them carry its surest answers.

    What comes in at the edges is background, which is the batch's smallest value: black, however inputs were scaled.

    Args:
        inputs: [N, C, H, W].
        generator: of the offsets; on any device.
        share: in (0, 1].

    Returns:
        [N, C, H, W], a new tensor.
    """
    n, channels, height, width = inputs.shape
    padded = inputs.min().repeat(n, channels, height + 2 * REACH, width + 2 * REACH)
    padded[:, :, REACH:-REACH, REACH:-REACH] = inputs
    offsets = torch.randint(2 * REACH + 1, (2, n, 1), generator=generator, device=generator.device)
    still = torch.rand((n, 1), generator=generator, device=generator.device) >= share
    offsets = moved(torch.where(still, REACH, offsets), inputs.device)
    rows = offsets[0] + torch.arange(height, device=inputs.device)  # [N, H]
    columns = offsets[1] + torch.arange(width, device=inputs.device)  # [N, W]
    sample = torch.arange(n, device=inputs.device)[:, None, None]
    # Advanced indices around a slice come first in the result: [N, H, W, C].
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cutmix(inputs: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Shift images, and paste into each, with probability `share`, a rectangle of another one.

    The teacher says what it makes of such images, so that no label has to be mixed. Few inputs become very many: it is
    their number that keeps survivors from fitting the teacher's outputs by heart.
    Source: CutMix, Yun et al., arXiv:1905.04899, with a centre, a height and a width drawn uniformly, and what is
    pasted taken from up to `DISPLACED` of the height and the width beside its place there.

    Args:
        inputs: [N, C, H, W].
        generator: of the draws; on any device.
        share: in (0, 1].

    Returns:
        [N, C, H, W], a new tensor.
    """
    return paste(shift(inputs, generator, share), generator, share)


def paste(images: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Paste a rectangle of another image into each, with probability `share`; see `cutmix`, which shifts them before.

    Args:
        images: [N, C, H, W].
        generator: of the draws; on any device.
        share: of the images that get a rectangle, in [0, 1].

    Returns:
        [N, C, H, W], a new tensor.
    """
    n, _, *sizes = images.shape
    partner = moved(torch.randint(n, (n,), generator=generator, device=generator.device), images.device)
    pasted = moved(torch.rand((n, 1), generator=generator, device=generator.device) < share, images.device)
    places, inside = [], []
    for size in sizes:
        along = torch.arange(size, device=images.device)
        drawn = torch.rand((3, n, 1), generator=generator, device=generator.device)
        centre, extent, beside = moved(drawn, images.device)
        inside.append(_span(along, centre, extent))
        offset = (DISPLACED * size * (2 * beside - 1)).round().long()
        places.append((along + offset).clamp(0, size - 1))  # [N, size]
    # Advanced indices around a slice come first in the result: [N, H, W, C].
    other = images[partner[:, None, None], :, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)
    mask = (inside[0] & pasted)[:, :, None] & inside[1][:, None, :]
    return torch.where(mask[:, None], other, images).contiguous()


def splice(inputs: Tensor, generator: torch.Generator, share: float = 1.0, axis: int | None = None) -> Tensor:
    """Replace, with probability `share`, a span of each input by what another one has in its place.

    What `cutmix` is to images to sequences, tokens and tables: spans lie along the longest axis, time of most series
    and the columns of tables. Every place keeps to the values that it has in some input, so that token indices, columns
    of any meaning and what stands at a sequence's start stay what they are.
    Centres and lengths are drawn uniformly.

    Args:
        inputs: [N, ...] with at least one axis more, of any type.
        generator: of the draws, which do not depend on anything but N; on any device.
        share: in (0, 1].
        axis: along which spans lie, from 0 without N's; None: the longest one.

    Returns:
        [N, ...], a new tensor.
    """
    n, *sizes = inputs.shape
    axis = sizes.index(max(sizes)) if axis is None else axis
    partner = moved(torch.randint(n, (n,), generator=generator, device=generator.device), inputs.device)
    replaced = moved(torch.rand((n, 1), generator=generator, device=generator.device) < share, inputs.device)
    centre, extent = moved(torch.rand((2, n, 1), generator=generator, device=generator.device), inputs.device)
    inside = _span(torch.arange(sizes[axis], device=inputs.device), centre, extent) & replaced
    inside = inside.reshape(n, *(size if place == axis else 1 for place, size in enumerate(sizes)))
    return torch.where(inside, inputs[partner], inputs)


def _span(along: Tensor, centre: Tensor, extent: Tensor) -> Tensor:
    """bool [N, size]: which places `along` an axis, 0..size - 1, lie in spans of centres and extents [N, 1] in 0..1."""
    return (along - len(along) * centre).abs() < len(along) / 2 * extent


def together(inputs: Tensor, generator: torch.Generator, share: float = 1.0, *, packing: Packing,
             ways: tuple[Way | None, ...]) -> Tensor:
    """Change several arguments, each in its way.

    What is spliced gets spans of the same part of the same others, along the axis that most arguments share: tokens and
    their features stay with their masks.

    Args:
        inputs: [N, words], packed.
        generator: of the draws; on any device.
        share: of the samples, in (0, 1].
        packing: of the inputs.
        ways: of each argument; None: it stays what it is.

    Returns:
        [N, words], a new tensor.
    """
    values = packing.values(inputs)
    axes = _shared_axes([value.shape[1:] if way is splice else () for value, way in zip(values, ways, strict=True)])
    seeds: dict[Way, int] = {}
    for place, way in enumerate(ways):
        if way is None:
            continue
        if way not in seeds:
            seeds[way] = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        drawn = torch.Generator(generator.device).manual_seed(seeds[way])
        along = {"axis": axes[place]} if way is splice else {}
        values[place] = way(values[place], drawn, share, **along)
    return packing.joined(values)


def _shared_axes(shapes: Sequence[Sequence[int]]) -> list[int | None]:
    """Of each shape, the axis whose length the most of them have, the longest of such; None: it has none."""
    shared = Counter(length for shape in shapes for length in set(shape))
    return [max(range(len(shape)), key=[(shared[length], length) for length in shape].__getitem__, default=None)
            for shape in shapes]


def augmentation(name: str, inputs: Tensor, share: float = 0.5, packing: Packing | None = None) -> Augment | None:
    """The augmentation of a name, of a share of inputs, checked against the inputs [M, ...] to come.

    Args:
        name: none, shift, cutmix, which is `splice` for inputs that are no images, or auto, which is cutmix wherever
            inputs have more axes than one.
        inputs: [M, ...].
        share: in (0, 1].
        packing: of inputs of several arguments, of which those are changed that can be; see `together`.

    Raises:
        ValueError: for another name, for a shift of inputs that are not images, or for inputs that are single numbers.
    """
    require_choice("problem.augment", name, AUGMENTATIONS)
    ways = tuple(_way(name, value) for value in unpacked(inputs[:1], packing))
    if not any(ways):
        if name in ("none", "auto"):
            return None
        wanted = "images [N, C, H, W]" if name == "shift" else "inputs [N, ...]"
        got = f"{list(inputs.shape)} of {inputs.dtype}" if packing is None else packing
        raise ValueError(f"problem.augment={name!r}: expected {wanted}, got {got}")
    return _of_ways(ways, share, packing)


def spliced(inputs: Tensor, share: float = 0.5, packing: Packing | None = None) -> Augment:
    """`augmentation` by `splice` alone, of whatever inputs: not all that has four axes are images."""
    ways = tuple(splice if value.ndim > 1 else None for value in unpacked(inputs[:1], packing))
    return _of_ways(ways, share, packing)


def _way(name: str, inputs: Tensor) -> Way | None:
    """How the augmentation of a name changes such inputs; None: not at all."""
    images = inputs.ndim == 4 and inputs.is_floating_point()
    if name == "none" or inputs.ndim < 2 or name == "shift" and not images:
        return None
    return shift if name == "shift" else cutmix if images else splice


def _of_ways(ways: tuple[Way | None, ...], share: float, packing: Packing | None) -> Augment:
    return partial(ways[0], share=share) if packing is None else partial(together, share=share, packing=packing,
                                                                         ways=ways)
