"""What is compressed: a teacher, unlabelled inputs, a divergence, metrics and the layers that may be zeroed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Output = Any
"""What a model returns: a tensor, or a tuple, list or dict of them, nested at will."""


class Divergence(Protocol):
    """How far outputs are apart; picklable."""

    def __call__(self, teacher_out: Output, student_out: Output) -> Tensor:
        """[N]: per sample, >= 0, 0 only for equal outputs; differentiable in `student_out`."""
        ...

    def score(self, output: Output, generator: torch.Generator) -> Tensor:
        """A random scalar whose gradient's covariance is the curvature at equal outputs; see `TensorDivergence`."""
        ...


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(inputs [N, ...], generator) -> inputs of the same shape."""


@dataclass(frozen=True)
class Layer:
    """A weight that may be zeroed; see `layers.find_layers` for which may."""

    name: str
    """Path of its module, as in `named_modules`; for weights that are not called `weight`, their own path."""
    shape: tuple[int, ...]
    """[R, ...]: one row an output unit, and of transposed convolutions an input channel."""
    key: str | None = None
    """The weight's state-dict key where it is not the module's `weight`."""

    @property
    def parameter(self) -> str:
        """The weight's state-dict key."""
        if self.key is not None:
            return self.key
        return f"{self.name}.weight" if self.name else "weight"  # a network that is a layer itself has no name

    @property
    def size(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Problem:
    """Everything that the four stages need to know of a network; labels hide behind `metrics`."""

    name: str
    """Of reports and tracking."""
    architecture: str
    """Written into the file: what `de_ray.load(path, model=...)` should be given."""
    teacher: nn.Module
    """In eval mode on the CPU, batch norm folded in place; never modified."""
    layers: tuple[Layer, ...]
    """In the order of `named_modules`."""
    inputs: Tensor
    """[M, ...] unlabelled inputs for saliency and refit; indexable by an index tensor."""
    calibration: Tensor
    """[N, ...] the inputs on which candidates are evaluated; drawn from `inputs` and augmented as refit's are."""
    held_out: Tensor
    """[H, ...] inputs that nothing but the report sees."""
    divergence: Divergence
    metrics: Callable[[nn.Module], dict[str, float]]
    """On held-out data, labelled where there are labels; called for the report alone."""
    augment: Augment | None = None
    """Label-free augmentation of refit inputs."""
    objective: Divergence | None = None
    """What refit minimises; None: `divergence`."""
    chances: Tensor | None = None
    """float32 [M] >= 0: how often each input is drawn for saliency and refit, in proportion; None: all alike."""
    left_out: frozenset[str] = frozenset()
    """State-dict keys of weights that could be zeroed and are not, beside those of PyTorch's own modules."""
    sources: str = ""
    """A digest of the files that inputs are read from, for checkpoints; empty where the configuration says it all."""
    pictures: "Callable[[Mapping[str, nn.Module]], Figure] | None" = None
    """Draws what models make of some held-out inputs, by the title of their columns, beside the teacher."""

    @property
    def weights(self) -> int:
        """Number of weights that may be zeroed."""
        return sum(layer.size for layer in self.layers)
