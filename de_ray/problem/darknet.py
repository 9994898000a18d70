"""YOLOv3-family networks of Darknet as plain torch modules (Redmon & Farhadi, "YOLOv3", arXiv:1804.02767).

Batch norm is folded into the convolutions that precede it as the weights are read (`darknet_weights.py`): what is
compressed are convolutions with biases. State-dict keys carry Darknet's number of the layer: `conv12.weight`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from de_ray.checks import require
from de_ray.problem.darknet_cfg import Section

LEAK = 0.1
"""Darknet's slope of leaky below 0."""


@dataclass(frozen=True)
class Head:
    """What decoding needs to know of a raw output."""

    anchors: tuple[tuple[float, float], ...]
    """A sizes (width, height) in pixels of the input."""
    classes: int
    """C: the output has A x (5 + C) channels."""
    stride: int
    """Pixels of the input a cell."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of the previous layer's output, and its activation."""

    name: str
    """Of the module that holds its weight and bias."""
    leaky: bool
    batch_normalize: bool
    """Whether a weights file holds batch norm statistics for it."""

    def __call__(self, network: nn.Module, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        """[N, C, H, W] -> [N, filters, H', W']."""
        x = getattr(network, self.name)(x)
        return functional.leaky_relu(x, LEAK) if self.leaky else x


@dataclass(frozen=True)
class MaxPool:
    """A maximum over windows; Darknet pads `padding` rows and columns, the odd one at the bottom and on the right."""

    size: int
    stride: int
    padding: int

    def __call__(self, network: nn.Module, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        """[N, C, H, W] -> [N, C, (H + padding - size) // stride + 1, ...]."""
        before, odd = divmod(self.padding, 2)
        if self.size == self.stride == 2 and self.padding == 1:  # the common case needs no padded copy
            return functional.max_pool2d(x, 2, ceil_mode=True)
        if odd:
            # Edge pixels repeated: they lie in every window that reaches over the edge, so that maxima stay.
            x = functional.pad(x, (before, before + 1, before, before + 1), mode="replicate")
            before = 0
        return functional.max_pool2d(x, self.size, self.stride, before)


@dataclass(frozen=True)
class Upsample:
    """Every pixel `stride` times along both axes."""

    stride: int

    def __call__(self, network: nn.Module, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        """[N, C, H, W] -> [N, C, stride H, stride W]."""
        return functional.interpolate(x, scale_factor=float(self.stride), mode="nearest")


@dataclass(frozen=True)
class Route:
    """Earlier outputs side by side, or of each its `group`-th of `groups` parts of the channels."""

    sources: tuple[int, ...]
    groups: int
    group: int

    def __call__(self, network: nn.Module, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        """[N, C_i, H, W] each -> [N, sum C_i / groups, H, W]."""
        parts = [outputs[source] for source in self.sources]
        if self.groups > 1:
            parts = [part.chunk(self.groups, 1)[self.group] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True)
class Shortcut:
    """The previous layer's output plus an earlier one."""

    sources: tuple[int]
    leaky: bool

    def __call__(self, network: nn.Module, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
        """[N, C, H, W], as both have it."""
        x = x + outputs[self.sources[0]]
        return functional.leaky_relu(x, LEAK) if self.leaky else x


Step = Convolution | MaxPool | Upsample | Route | Shortcut | Head


class Darknet(nn.Module):
    """A network of a `.cfg`; weights as torch draws them until they are read.

    Args:
        sections: as `darknet_cfg.parse` returns them.

    Raises:
        ValueError: for layers that do not fit together.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        shapes: list[tuple[int, float]] = []  # channels and stride of each layer's output
        for index, section in enumerate(sections):
            channels, stride = shapes[-1] if shapes else (3, 1)
            step, shape = getattr(self, f"_{section.kind}")(section, index, channels, stride, shapes)
            self.steps.append(step)
            shapes.append(shape)
        self.heads = tuple(step for step in self.steps if isinstance(step, Head))
        require(bool(self.heads), "cfg", [section.kind for section in sections], "at least one [yolo] section")
        self._needed = {source for step in self.steps for source in getattr(step, "sources", ())}
        self.strides = [stride for _, stride in shapes]
        """Pixels of the input a cell of each layer's output."""

    def extra_repr(self) -> str:
        """What modules do not say: two networks of one text and the same weights compute the same."""
        return "\n".join(map(repr, self.steps))

    @property
    def convolutions(self) -> list[Convolution]:
        """In the order of a weights file."""
        return [step for step in self.steps if isinstance(step, Convolution)]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw heads, coarsest first as in YOLOv3.

        Args:
            images: [N, 3, H, W], RGB, float in [0, 1] or uint8; H and W multiples of the largest stride.

        Returns:
            A head a [yolo] section: [N, A x (5 + C), H / stride, W / stride], logits x, y, objectness and classes, and
            logarithms of width and height relative to the anchor; in the order x, y, w, h, objectness, classes.
        """
        # Images kept in bytes take a quarter of the memory. Convolutions and pooling keep the layout of what they are
        # given, and with channels innermost they take half the time or less, on CPUs as on GPUs with tensor cores.
        x = (images if images.is_floating_point() else images.float() / 255).contiguous(
            memory_format=torch.channels_last)
        outputs: dict[int, Tensor] = {}
        heads = []
        for index, step in enumerate(self.steps):
            if isinstance(step, Head):
                heads.append(x)
            else:
                x = step(self, x, outputs)
            if index in self._needed:
                outputs[index] = x
        return heads

    def _convolutional(self, section, index, channels, stride, shapes):
        filters, size, step = (section.integer(key, 1) for key in ("filters", "size", "stride"))
        groups = section.integer("groups", 1)
        require(channels % groups == filters % groups == 0, section.at("groups"), groups,
                f"a divisor of {channels} channels and {filters} filters")
        padding = size // 2 if section.integer("pad") else section.integer("padding")
        _require_whole_cells(section, size, step, 2 * padding)
        name = f"conv{index}"
        self.add_module(name, nn.Conv2d(channels, filters, size, step, padding, groups=groups))
        convolution = Convolution(name, section.text("activation") == "leaky", section.integer("batch_normalize") != 0)
        return convolution, (filters, stride * step)

    def _maxpool(self, section, index, channels, stride, shapes):
        step = section.integer("stride", 1)
        size = section.integer("size", 1) if "size" in section.options else step
        padding = section.integer("padding") if "padding" in section.options else size - 1
        _require_whole_cells(section, size, step, padding)
        return MaxPool(size, step, padding), (channels, stride * step)

    def _upsample(self, section, index, channels, stride, shapes):
        factor = section.integer("stride", 1)
        return Upsample(factor), (channels, stride / factor)

    def _route(self, section, index, channels, stride, shapes):
        sources = _sources(section, "layers", index)
        groups, group = section.integer("groups", 1), section.integer("group_id")
        require(group < groups, section.at("group_id"), group, f"less than groups={groups}")
        for source in sources:
            require(shapes[source][0] % groups == 0, section.at("groups"), groups,
                    f"a divisor of layer {source}'s {shapes[source][0]} channels")
        require(len({shapes[source][1] for source in sources}) == 1, section.at("layers"), section.text("layers"),
                "layers of one resolution")
        return Route(sources, groups, group), (sum(shapes[s][0] // groups for s in sources), shapes[sources[0]][1])

    def _shortcut(self, section, index, channels, stride, shapes):
        sources = _sources(section, "from", index)
        require(len(sources) == 1 and shapes[sources[0]] == (channels, stride), section.at("from"),
                section.text("from"), f"one layer with the previous one's {channels} channels and resolution")
        return Shortcut(sources, section.text("activation") == "leaky"), (channels, stride)

    def _yolo(self, section, index, channels, stride, shapes):
        flat, mask = section.numbers("anchors"), section.integers("mask")
        require(min(flat) > 0, section.at("anchors"), section.text("anchors"), "sizes above 0")
        pairs = list(zip(flat[::2], flat[1::2], strict=False))
        require(len(flat) % 2 == 0 and all(0 <= m < len(pairs) for m in mask), section.at("mask"), section.text("mask"),
                f"numbers below {len(pairs)}, of pairs in anchors={section.text('anchors')}")
        classes = section.integer("classes", 1)
        require(channels == len(mask) * (5 + classes), section.at("classes"), classes,
                f"the previous layer's {channels} channels to be {len(mask)} anchors x (5 + classes)")
        require(stride == int(stride), section.where, stride, "a whole number of pixels a cell")
        return Head(tuple(pairs[m] for m in mask), classes, int(stride)), (channels, stride)


def _require_whole_cells(section: Section, size: int, step: int, padding: int) -> None:
    """Raise `ValueError` unless an output is its input divided by the stride, as the place of a cell in an image is."""
    require(size - step <= padding < size, section.at("size"), size, f"such a size that padding of {padding} in all "
            f"makes the output the input divided by stride={step} (pad=1 does)")


def _sources(section: Section, key: str, index: int) -> tuple[int, ...]:
    """Layer numbers, those below 0 counted back from this layer."""
    sources = tuple(index + value if value < 0 else value for value in section.integers(key))
    for source in sources:
        require(0 <= source < index, section.at(key), section.text(key), f"layers before this one, which is {index}")
    return sources
