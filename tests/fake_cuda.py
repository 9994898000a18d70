"""A simulated GPU: tensors that say they are on cuda:0, compute on the CPU, and refuse what CUDA refuses.

A `CudaTensor` holds a CPU tensor. It raises beside a plain CPU tensor of one dimension or more, for a CPU generator
that is to fill it, for `.numpy()`, for being pickled or pinned. PyTorch's own kernels take their paths for CPUs: what
only CUDA's do (cuDNN's recurrent layers, kernels that are missing, rounding, races, memory) is not seen.
"""

import contextlib
import copy
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten, CPU, CUDA, FUTURE = torch.ops.aten, torch.device("cpu"), torch.device("cuda", 0), torch.__future__
MIXING = {aten.copy_, aten._to_copy}
"""Operations on tensors of both devices."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations whose indices may lie on the CPU."""
OF_ITS_DEVICE = {Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty}


def raw(value):
    """The CPU tensors within."""
    return pytree.tree_map_only(CudaTensor, lambda one: one.held, value)


def wrapped(value):
    """The same on the simulated GPU."""
    return pytree.tree_map_only(Tensor, lambda one: one if isinstance(one, CudaTensor) else CudaTensor(one), value)


def is_cuda(place):
    return place is not None and torch.device(place).type == "cuda"


def no_cpu_generator(generators):
    if any(isinstance(one, torch.Generator) and one.device == CPU for one in generators):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


class CudaTensor(Tensor):
    """A tensor on the simulated GPU."""

    @staticmethod
    def __new__(cls, held):
        with torch.inference_mode(held.is_inference()):  # a view of a tensor that is none is none itself
            return Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(),
                                                 dtype=held.dtype)

    def __init__(self, held):
        self.held = held.detach()

    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (CUDA, True, False))

    def __deepcopy__(self, memo):
        new = CudaTensor(self.held.clone()).requires_grad_(self.requires_grad)
        new._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), new)

    def refused(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy, nor pickle or pin it")

    numpy = __array__ = __reduce_ex__ = pin_memory = refused
    # Methods, since hooks may ask for these in the middle of an operation, where `__torch_function__` is not asked.
    data_ptr, untyped_storage, tolist = (lambda self, name=name: getattr(self.held, name)()
                                         for name in ("data_ptr", "untyped_storage", "tolist"))
    cpu, cuda = (lambda self, *_, place=place: moved(self, (place,), {}) for place in ("cpu", "cuda"))

    def to(self, *args, **kwargs):
        return moved(self, args, kwargs) if moves(args, kwargs) else super().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.data.__set__:
            args[0].held = raw(args[1]).detach()
        if func in OF_ITS_DEVICE and "device" not in kwargs:
            return wrapped(func(raw(args[0]), *args[1:], **kwargs))
        place = kwargs.get("device")
        # Graphs name the CPU where tensors are kept where they are: tracing asks for what a tensor holds.
        if place is not None and not is_cuda(place) and not isinstance(func, torch._ops.OpOverload):
            return func(*raw(args), **raw(kwargs))
        return super().__torch_function__(func, types, args, kwargs if place is None else {**kwargs, "device": CPU})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, packet, schema = kwargs or {}, func.overloadpacket, func._schema
        indexed = packet in INDEXED and isinstance(args[0], CudaTensor)
        leaves = pytree.tree_leaves((args[0], args[2:]) if indexed else (args, kwargs))
        no_cpu_generator(leaves)
        plain = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, CudaTensor)]
        scalars = torch.Tag.pointwise in func.tags or packet in INDEXED  # tensors of no dimension may mix there
        if packet not in MIXING and any(one.ndim or not scalars for one in plain):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                               f"and cpu! ({func}, shapes {[tuple(one.shape) for one in plain]})")
        found = func(*raw(pytree.tree_map_only(torch.device, lambda _: CPU, args)),
                     **raw(pytree.tree_map_only(torch.device, lambda _: CPU, kwargs)))
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # of the wrapper too
                func(*args, **kwargs)
        written = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)
                   if a.alias_info is not None and a.alias_info.is_write]
        if written and schema.returns and schema.returns[0].alias_info is not None:
            return written[0] if len(schema.returns) == 1 else tuple(written)
        return wrapped(found)


def moves(args, kwargs):
    """Whether arguments of `to` name a device."""
    return kwargs.get("device") is not None or isinstance(args[0] if args else None, (torch.device, str, Tensor))


def moved(tensor, args, kwargs):
    """What `to` gives."""
    place, *rest = args if kwargs.get("device") is None else (kwargs["device"], *args)
    kind = kwargs.get("dtype") or next((one for one in rest if isinstance(one, torch.dtype)), tensor.dtype)
    kind, place = (place.dtype, place.device) if isinstance(place, Tensor) else (kind, place)
    tensor = tensor.to(dtype=kind, memory_format=kwargs.get("memory_format") or torch.preserve_format)
    if is_cuda(place) == isinstance(tensor, CudaTensor):
        return tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "gradients between devices are not simulated"
    return CudaTensor(tensor.clone()) if is_cuda(place) else tensor.held.clone()


class Factories(TorchFunctionMode):
    """Moves to cuda of plain tensors, and what is made there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.cuda or func is Tensor.to and moves(args[1:], kwargs):
            return moved(args[0], ("cuda",) if func is Tensor.cuda else args[1:], kwargs)
        if not is_cuda(kwargs.get("device")) or any(issubclass(one, CudaTensor) for one in types):
            return func(*args, **kwargs)
        no_cpu_generator(kwargs.values())
        return wrapped(func(*args, **{**kwargs, "device": CPU}))


class Gradients(TorchDispatchMode):
    """What PyTorch makes of nothing in backward passes on cuda is there too."""

    depth = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = any(isinstance(one, Tensor) for one in pytree.tree_leaves((args, kwargs)))
        return found if given or not Gradients.depth else wrapped(found)


def backward(run):
    """A backward pass during which `Gradients` knows where it is."""
    def counted(tensors, *args, **kwargs):
        there = any(isinstance(one, CudaTensor) for one in pytree.tree_leaves(tensors))
        Gradients.depth += there
        try:
            return run(tensors, *args, **kwargs)
        finally:
            Gradients.depth -= there
    return counted


def applied(self, *args, run=nn.Module._apply, **kwargs):
    """`nn.Module._apply`, after which parameters are the objects that they were, as between real devices."""
    former = FUTURE.get_swap_module_params_on_conversion()
    FUTURE.set_swap_module_params_on_conversion(True)
    try:
        return run(self, *args, **kwargs)
    finally:
        FUTURE.set_swap_module_params_on_conversion(former)


def exported(module, args, run=torch.export.export, **options):
    """The graph of a module's copy on the CPU."""
    module = copy.deepcopy(module)
    for one in module.modules():
        one._buffers.update({name: raw(value) for name, value in one._buffers.items()})
        one._parameters.update({name: nn.Parameter(value.held, value.requires_grad)
                                for name, value in one._parameters.items() if isinstance(value, CudaTensor)})
        if isinstance(one, nn.RNNBase):
            one._init_flat_weights()
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        found = run(module, raw(args), **options)
    found.there = isinstance(args[0], CudaTensor)
    return found


def decomposed(program, *args, run=torch.export.ExportedProgram.run_decompositions):
    """The graph once more, with its devices and constants where the module is."""
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        found = run(program, *args)
    if program.there:
        for node in found.graph.nodes:
            node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: CUDA, (node.args, node.kwargs))
        found.constants.update({name: wrapped(value) for name, value in found.constants.items()})
    return found


@contextlib.contextmanager
def fake_cuda():
    """A block in which there is one simulated GPU, of compute capability 8.0."""
    autocast = torch.autocast
    with contextlib.ExitStack() as stack:
        for target, name, value in (
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "device_count", lambda: 1),
                (torch.cuda, "get_device_capability", lambda device=None: (8, 0)),
                (Tensor, "pin_memory", Tensor.clone), (torch, "autocast", lambda _, *rest: autocast("cpu", *rest)),
                (torch.autograd, "backward", backward(torch.autograd.backward)),
                (torch.autograd, "grad", backward(torch.autograd.grad)), (nn.Module, "_apply", applied),
                (nn.RNNBase, "flatten_parameters", lambda self: None), (torch.export, "export", exported),
                (torch.export.ExportedProgram, "run_decompositions", decomposed),
                (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(Factories())
        stack.enter_context(Gradients())
        yield
