"""The student: a live copy of the teacher, with a mask a layer and the values that zeroed parameters had."""

import copy
from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from de_ray.codec.fit import misfits, versioned
from de_ray.evolution.candidate import Candidate
from de_ray.problem.base import Layer
from de_ray.problem.layers import product_of


def make_differentiable(module: nn.Module) -> None:
    """Put recurrent layers into training mode without dropout, in place: their outputs stay as they are.

    cuDNN goes back through them in that mode alone. Not subclasses, which may do other things in it.
    """
    for one in module.modules():
        if type(one) in (nn.RNN, nn.LSTM, nn.GRU):
            one.training, one.dropout = True, 0.0


class Student:
    """A module whose weights are zero wherever their layer's mask is False.

    Args:
        module: the teacher; it is copied.
        layers: what may be zeroed.
        device: where the copy lives.
    """

    def __init__(self, module: nn.Module, layers: Sequence[Layer], device: torch.device | str = "cpu") -> None:
        # Flat indices name positions of contiguous weights, whatever layout the teacher's have.
        self.module = copy.deepcopy(module).to(device, memory_format=torch.contiguous_format)
        for parameter in self.module.parameters():  # the above is for convolutions in two and three dimensions alone
            parameter.data = parameter.data.contiguous()
        self.module.eval().requires_grad_(False)
        if torch.device(device).type == "cuda":
            make_differentiable(self.module)
        self.layers = tuple(layers)
        self.weights = [self.module.get_parameter(layer.parameter) for layer in self.layers]
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]
        # Regrowth brings a parameter back with the value that it had when it was zeroed.
        self.dormant = [torch.zeros_like(weight) for weight in self.weights]
        self.products = [product_of(self.module, layer) for layer in self.layers]
        """Modules that multiply a layer's rows with their inputs; None for other layers."""
        self.biases = [None if module is None else module.bias for module in self.products]
        """Of those modules."""
        names = {layer.parameter for layer in self.layers}
        self.others = {name: p for name, p in self.module.named_parameters() if name not in names}
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Note buffers as they are, for `rewind`."""
        self._buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def rewind(self, names: Container[str] | None = None) -> None:
        """Set buffers, all or those of such names, back to what was noted: some networks count their passes in them,
        and the compressor's own passes are none of the network's."""
        for name, buffer in self.module.named_buffers():
            kept = self._buffers.get(name)
            if (names is None or name in names) and kept is not None and kept.shape == buffer.shape:
                buffer.copy_(kept)  # those that no file has may have grown

    @property
    def counts(self) -> list[int]:
        """Number of weights that are not zeroed, by layer."""
        return [int(mask.sum()) for mask in self.masks]

    @property
    def survivors(self) -> int:
        """Number of weights that are not zeroed."""
        return sum(self.counts)

    @property
    def sparsity(self) -> float:
        """Share of zeroed weights among those that may be zeroed."""
        return 1 - self.survivors / sum(layer.size for layer in self.layers)

    def shared(self) -> dict[str, str]:
        """State-dict keys of tied tensors, the first of each aside: key -> the first, a layer's where there is one."""
        first: dict[tuple, str] = {}
        ours = {layer.parameter for layer in self.layers}
        state = self.module.state_dict()
        found = {}
        for name in sorted(state, key=lambda name: name not in ours):
            value = state[name]
            if value.numel():
                place = value.data_ptr(), value.dtype, value.shape, value.stride()
                if first.setdefault(place, name) != name:
                    found[name] = first[place]
        return found

    def check(self, state: dict[str, Tensor]) -> None:
        """Raise `ValueError` for a state dict of another network, or one that holds NaN."""
        if odd := misfits(self.module, state):
            raise ValueError(f"not a student of this network: {', '.join(odd[:4])} differ in name or shape")
        if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
            raise ValueError("a student with NaN or infinite values")

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Take over an earlier student of the same network; what is zero in it has been zeroed.

        Args:
            state: a state dict of the module, its units numbered as the teacher's; its weights may be quantized.

        Raises:
            ValueError: see `check`.
        """
        self.check(state)
        for weight, mask, dormant, layer in zip(self.weights, self.masks, self.dormant, self.layers, strict=True):
            mask.copy_(state[layer.parameter] != 0)
            dormant.copy_(torch.where(mask, 0.0, weight))
        self.module.load_state_dict(versioned(self.module, state))
        self.keep_buffers()

    def commit(self, candidate: Candidate) -> None:
        """Carry out a candidate's zeroing sets for good."""
        for change in candidate:
            weight, mask = self.weights[change.layer].data.view(-1), self.masks[change.layer].view(-1)
            dormant = self.dormant[change.layer].view(-1)
            zero = torch.from_numpy(change.zero).to(weight.device)
            revive = torch.from_numpy(change.revive).to(weight.device)
            dormant[zero] = weight[zero]
            weight[zero], mask[zero] = 0.0, False
            weight[revive], mask[revive] = dormant[revive], True

    def values(self) -> dict[str, Tensor]:
        """What refit changes, as deltas travel: survivors [k] a layer, every other parameter whole; on the CPU."""
        survivors = {layer.parameter: weight.data[mask] for layer, weight, mask in
                     zip(self.layers, self.weights, self.masks, strict=True)}
        return {name: value.detach().cpu().clone() for name, value in {**survivors, **self.others}.items()}

    def set_values(self, values: dict[str, Tensor]) -> None:
        """Take over what `values` of a student with the same masks returned."""
        for layer, weight, mask in zip(self.layers, self.weights, self.masks, strict=True):
            weight.data.zero_()  # a mask times NaN is NaN
            weight.data[mask] = values[layer.parameter].to(weight.device)
        for name, parameter in self.others.items():
            parameter.data.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs to continue from here: parameters, masks, dormant values; on the CPU."""
        state = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for layer, mask, dormant in zip(self.layers, self.masks, self.dormant, strict=True):
            state[f"mask.{layer.name}"], state[f"dormant.{layer.name}"] = mask, dormant
        return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        prefix = "module."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.module.load_state_dict(versioned(self.module, own))
        for layer, mask, dormant in zip(self.layers, self.masks, self.dormant, strict=True):
            mask.copy_(state[f"mask.{layer.name}"])
            dormant.copy_(state[f"dormant.{layer.name}"])
