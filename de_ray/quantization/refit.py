"""Label-free refit of a quantized student: latent survivors with straight-through rounding, then levels alone.

In the first part survivors move as full-precision latents while the network runs on their rounded values, with the
gradient passed straight through (Bengio et al., arXiv:1308.3432), so that a survivor may change its level. In the
second part assignments stand, and only the level tables and the biases move, each level by the sum of its members'
gradients. Levels end as float16 numbers, as the file holds them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from de_ray.codec.tensor import QuantizedTensor
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.scales import row_scales
from de_ray.refit.objective import Objective
from de_ray.refit.optimizer import Adam
from de_ray.student import Student

LATENT_SHARE = 0.9
"""Of the steps, those in which survivors may still change their level."""


@dataclass
class _Layer:
    """A quantized layer during the refit; its k survivors alone, as most weights are zero and stay so."""

    name: str
    shape: torch.Size
    table: Tensor
    """[L + 1] values, ascending, zero among them."""
    zero: int
    """Position of zero in the table."""
    boundaries: Tensor
    """[L] thresholds between the table's values."""
    places: Tensor
    """int64 [k] flat indices of the survivors."""
    latent: Tensor
    """[k] full-precision values."""
    scales: Tensor
    """[k] of the survivors' rows, or [1]."""
    slots: Tensor | None = None
    """int64 [k] positions in the table, once they stand."""

    def assign(self) -> Tensor:
        """Positions in the table by the thresholds, which stay where placement put them."""
        return torch.bucketize(self.latent.detach() / self.scales, self.boundaries)

    def weight(self) -> Tensor:
        """What the network runs on; differentiable in the table and, before assignments stand, in the latent."""
        table = torch.cat([self.table[:self.zero], self.table.new_zeros(1), self.table[self.zero + 1:]])
        values = table[self.assign() if self.slots is None else self.slots] * self.scales
        if self.slots is None:
            values = values + (self.latent - self.latent.detach())
        return values.new_zeros(self.shape.numel()).index_put((self.places,), values).view(self.shape)


class _Step(nn.Module):
    """A loss and its gradients, both while a network has the weights that it is called with: checkpoints within it run
    parts of it again on the way back."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module, self._objective = module, objective

    def forward(self, generator: torch.Generator) -> Tensor:
        with self._objective.products():
            return self._objective.backward(self.module, generator)


def refit_levels(objective: Objective, student: Student, choices: Sequence[LevelChoice], steps: int,
                 learning_rate: float, relative: bool, generator: torch.Generator,
                 fixed: Collection[str] = ()) -> list[QuantizedTensor]:
    """Quantize a student's layers and refit them together to the teacher.

    Args:
        objective: what is minimised.
        student: its weights become the quantized ones and its biases are refitted, in place.
        choices: one a layer.
        steps: >= 0; with 0 the choices are carried out as they are.
        learning_rate: peak, decays to zero along a cosine.
        relative: see `Adam`.
        generator: draws batches and augmentation.
        fixed: parameters beside the layers that stay what they are.

    Returns:
        The layers in coded form; the student's weights are their values, bit for bit.

    Raises:
        FloatingPointError: the divergence or a level became NaN or infinite.
    """
    device = student.weights[0].device
    layers = []
    for choice, weight, mask in zip(choices, student.weights, student.masks, strict=True):
        places = mask.flatten().nonzero().flatten()
        scales = torch.ones(1)
        if choice.row_exponents is not None:
            scales = torch.from_numpy(row_scales(choice.row_exponents))[places.cpu() // weight[0].numel()]
        layers.append(_Layer(student.layers[choice.layer].parameter, weight.shape,
                             torch.from_numpy(choice.table).to(device), choice.negatives,
                             torch.from_numpy(choice.boundaries).to(device), places,
                             weight.detach().flatten()[places], scales.to(device)))
    if steps:
        others = [p for name, p in student.others.items() if p.is_floating_point() and name not in fixed]
        _train(objective, student, layers, others, steps, learning_rate, relative, generator)
    tensors = [_coded(layer, choice) for layer, choice in zip(layers, choices, strict=True)]
    for weight, tensor in zip(student.weights, tensors, strict=True):
        weight.data.copy_(torch.from_numpy(tensor.dequantize()))
    return tensors


def _train(objective: Objective, student: Student, layers: list[_Layer], others: list[nn.Parameter], steps: int,
           peak: float, relative: bool, generator: torch.Generator) -> None:
    moving = [*(layer.table for layer in layers), *(layer.latent for layer in layers), *others]
    for tensor in moving:
        tensor.requires_grad_(True)
    optimizer = Adam(moving, relative)
    step_of = _Step(student.module, objective)
    names = {layer.name: places_of(step_of, student.module.get_parameter(layer.name)) for layer in layers}
    standing_from = round(LATENT_SHARE * steps)
    try:
        for step in range(steps):
            if step == standing_from:
                for layer in layers:
                    layer.slots = layer.assign()
            optimizer.zero_grad()
            made = [layer.weight() for layer in layers]
            # Leaves of their own: each part of a batch has a backward pass, and what weights are made of has one.
            leaves = [weight.detach().requires_grad_() for weight in made]
            weights = {name: leaf for layer, leaf in zip(layers, leaves, strict=True) for name in names[layer.name]}
            loss = functional_call(step_of, weights, (generator,), tie_weights=False)
            called = [(weight, leaf.grad) for weight, leaf in zip(made, leaves, strict=True) if leaf.grad is not None]
            if called:
                torch.autograd.backward(*zip(*called, strict=True))
            optimizer.step(peak * (1 + math.cos(math.pi * step / steps)) / 2)
        tables = [layer.table.half() for layer in layers]  # as the file holds them
        if not all(value.isfinite().all() for value in (loss, *tables, *moving)):
            raise FloatingPointError(f"the refit of levels diverged: divergence {float(loss)} after {steps} "
                                     "steps; lower quantization.learning_rate")
    finally:
        for tensor in moving:
            tensor.requires_grad_(False)
            tensor.grad = None


def places_of(module: nn.Module, parameter: Tensor) -> list[str]:
    """Names of a parameter, one for each module that holds it.

    `functional_call` would find them by itself, but puts back the wrong tensor into a module that has several names.
    """
    return [f"{path}.{name}" if path else name for path, one in module.named_modules()
            for name, held in one._parameters.items() if held is parameter]


def _coded(layer: _Layer, choice: LevelChoice) -> QuantizedTensor:
    """A layer in coded form: levels as float16 numbers in ascending order, those without members left out."""
    slots = np.full(layer.shape.numel(), layer.zero)
    slots[layer.places.cpu().numpy()] = (layer.assign() if layer.slots is None else layer.slots).cpu().numpy()
    table = layer.table.cpu().numpy().astype(np.float16).astype(np.float32)
    table[layer.zero] = 0.0
    used = np.unique(np.append(table[np.unique(slots)], np.float32(0.0)))  # ascending, distinct, zero among them
    zero = int(np.flatnonzero(used == 0)[0])
    symbols = (np.searchsorted(used, table)[slots] - zero).reshape(layer.shape)
    return QuantizedTensor(layer.name, symbols.astype(np.int32), levels=used[used != 0],
                           row_exponents=choice.row_exponents)
