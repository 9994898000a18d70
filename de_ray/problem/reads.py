"""Which parameters a network multiplies with its values, scaled or not, and in which it looks rows up: seen in one
pass."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)
aten = torch.ops.aten

_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addbmm, aten.mv, aten.addmv, aten.linear, aten.matmul,
             aten.convolution, aten._trilinear, aten._grouped_mm}
_LOOKUPS = {aten.embedding, aten._embedding_bag, aten._embedding_bag_forward_only, aten.index, aten.index_select,
            aten.gather, aten.take}
_COPIES = {aten.clone, aten._to_copy, aten._unsafe_view, aten._reshape_copy, aten.expand_copy}
"""Operations whose result is a parameter laid out otherwise; views share its memory anyway."""
_SCALINGS = {aten.mul, aten.div}
"""Operations whose result, where it has a parameter's own shape, is that parameter scaled: zero where it is zero."""


class Reads(TorchDispatchMode):
    """While it is entered, notes what reads some tensors.

    Args:
        tensors: strided tensors, whose memory is told apart.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._shapes = {place: tensor.shape for tensor in tensors if (place := _place(tensor))}
        self._places = {place: place for place in self._shapes}
        self._copies: list[Tensor] = []  # held, so that nothing else gets their memory
        self._read: set[int] = set()
        self._multiplied: set[int] = set()
        self._looked_up: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - PyTorch's signature
        found = func(*args, **(kwargs or {}))
        read = {self._places[place] for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)
                and (place := _place(value)) in self._places}
        self._read |= read
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            self._multiplied |= read
        elif packet in _LOOKUPS:
            self._looked_up |= read
        elif packet in _SCALINGS:
            read = {place for place in read if self._shapes[place] == found.shape}
        if packet in _COPIES | _SCALINGS and len(read) == 1:
            self._places[_place(found)] = read.pop()
            self._copies.append(found)
        return found

    def misses(self, tensor: Tensor) -> bool:
        """Whether no operation read one of the tensors; never of others."""
        return (place := _place(tensor)) in self._shapes and place not in self._read

    def multiplies(self, tensor: Tensor) -> bool:
        """Whether a product read one of the tensors, or a view or a copy of it."""
        return _place(tensor) in self._multiplied

    def looks_up(self, tensor: Tensor) -> bool:
        """Whether rows of one of the tensors were looked up."""
        return _place(tensor) in self._looked_up


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for those that have none of their own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_nested else 0


def parameter_reads(model: nn.Module, sample: Tensor) -> Reads:
    """What reads a network's parameters in a pass; nothing, where a network cannot be watched.

    Args:
        model: in eval mode, on the CPU.
        sample: [N, ...] inputs that it accepts.
    """
    return tensor_reads(model, (parameter for parameter in model.parameters() if parameter.numel()), sample)


@torch.no_grad()
def tensor_reads(model: nn.Module, tensors: Iterable[Tensor], sample: Tensor) -> Reads:
    """The same of some tensors."""
    try:
        with Reads(tensors) as reads:
            model(sample)
    except Exception as error:  # noqa: BLE001 - operations of the user's own may not know of being watched
        log.info("matrices in modules of other kinds stay dense: %s", error)
        return Reads(())
    return reads
