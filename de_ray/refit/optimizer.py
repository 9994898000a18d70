"""Adam, with steps of one size for all tensors or relative to each tensor's own."""

from collections.abc import Sequence
from statistics import median_low

import torch
from torch import Tensor

LEAST = 1e-3
"""Of the usual size, the least that steps are relative to: a tensor of next to nothing would stand still for good."""


class Adam:
    """Adam (Kingma & Ba, arXiv:1412.6980) on a list of tensors.

    Adam's steps are about as large as the learning rate, whatever the tensor. Once batch norm is folded, layers differ
    in the size of their weights by factors of hundreds: no single rate serves them all, relative to their size one
    does (as in Shazeer & Stern, arXiv:1804.04235, section 8).

    Args:
        tensors: what is moved.
        relative: whether learning rates are relative to the root mean square of each tensor's non-zero entries; a
            tensor that has none is taken for one of the others' median size.
    """

    def __init__(self, tensors: Sequence[Tensor], relative: bool) -> None:
        self._relative = relative
        self._adam = torch.optim.Adam([{"params": [tensor]} for tensor in tensors], fused=True)
        self.measure()

    def measure(self) -> None:
        """Take the tensors' present sizes for those that steps are relative to."""
        tensors = [group["params"][0].detach() for group in self._adam.param_groups]
        sizes = [_size(tensor) if self._relative else 1.0 for tensor in tensors]
        usual = median_low(filter(None, sizes)) if any(sizes) else 1.0
        self._units = [max(size, LEAST * usual) if size else usual for size in sizes]

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._adam.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> None:
        """Move the tensors along their gradients."""
        for group, unit in zip(self._adam.param_groups, self._units, strict=True):
            group["lr"] = learning_rate * unit
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, on the CPU, by `adam.INDEX.NAME`."""
        return {f"adam.{index}.{key}": value.detach().cpu().clone()
                for index, entry in self._adam.state_dict()["state"].items() for key, value in entry.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value.clone()
        self._adam.load_state_dict({**self._adam.state_dict(), "state": entries})


def _size(tensor: Tensor) -> float:
    """Root mean square of the entries that are not zero; 0 where there are none."""
    return float((tensor.double().square().sum() / max(1, int(tensor.count_nonzero()))).sqrt())
