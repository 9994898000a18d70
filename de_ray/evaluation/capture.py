"""A network captured once as a functional graph, of which any part can be run by itself.

`torch.export` with a dynamic batch size sees through branches, skips, shared modules and in-place operations, and names
the weight that each operation reads.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from de_ray.checks import first_line
from de_ray.evaluation.functional import make_functional
from de_ray.evaluation.program import Program, Values
from de_ray.problem.base import Output
from de_ray.problem.outputs import flatten
from de_ray.problem.packing import packing_of

PROBE = 4
"""Inputs of a probe, of which halves are run as well: `torch.export` takes a batch of one for a constant."""
RTOL = 1e-3
"""Of the largest output, what two batch sizes may round apart. A network that mixes its samples is far beyond it."""


class CaptureError(ValueError):
    """The network cannot be run in parts."""


def capture(module: nn.Module, inputs: Tensor) -> Program:
    """Capture a network for any number of samples.

    Args:
        module: in eval mode. The program reads the parameters and buffers that it has now, wherever they change.
        inputs: [N, ...] a batch that the module accepts, N >= 1.

    Raises:
        CaptureError: `torch.export` cannot follow the module, it fixes the number of samples, or its samples influence
            each other, so that candidates could not be stacked along the batch axis.
    """
    probe = _probe(module, inputs)
    try:
        program = _exported(module, probe)
        whole, parts = program.outputs(probe), [program.outputs(part) for part in probe.split(PROBE // 2)]
        reference = module(probe)
    except CaptureError:
        raise
    except Exception as error:  # noqa: BLE001 - export runs the user's code on proxies: anything may come out of it
        raise CaptureError(f"torch.export cannot follow it: {first_line(error)}") from error
    require_close(whole, reference, "its captured graph computes something else than the module")
    apart = [torch.cat(pair) for pair in zip(*map(flatten, parts), strict=True)]
    require_close(whole, apart, "its samples influence each other")
    program.numbered = _numbered(program, probe)
    return program


def _probe(module: nn.Module, inputs: Tensor) -> Tensor:
    """[PROBE, ...] inputs, which must not all be equal: that would not show whether samples are mixed."""
    some = inputs[:PROBE]
    if len(some) == PROBE:
        return some
    # Where there are few, shifted ones make up the number, or, where the module does not take those, the last one.
    # Arguments that are packed cannot be shifted: words of one would be read as another.
    if packing_of(module) is None:
        probe = torch.cat([some, *(some.roll(shift, -1) for shift in range(1, PROBE))])[:PROBE]
        with contextlib.suppress(Exception):  # the user's code on values that may be out of its range
            module(probe)
            return probe
    return some[torch.arange(PROBE).clamp(max=len(some) - 1)]


def _numbered(program: Program, probe: Tensor) -> frozenset[fx.Node]:
    """See `Program.numbered`: what a batch of probes, given twice at once, does not have twice."""

    def holds_samples(node: fx.Node) -> bool:
        try:
            return program.holds_samples(node)
        except LookupError:  # samples lie elsewhere: candidates will not be stacked
            return False

    # All of them begin with what grows with the samples and is made of nothing that does.
    if not any(program.grows(node) and not any(map(program.grows, node.all_input_nodes))
               for node in program.operations):
        return frozenset()
    once: Values = {}
    program.run(program.result_nodes, {program.given: probe}, len(probe), once.__setitem__)
    found = set()

    def compare(node: fx.Node, value: Any) -> None:
        if holds_samples(node) and not _close(value, torch.cat([once[node]] * 2)):
            found.add(node)

    program.run(program.result_nodes, {program.given: torch.cat([probe] * 2)}, 2 * len(probe), compare)
    return frozenset(found)


class _OfOne(nn.Module):
    """A module called with one argument, whatever its own `forward` is declared to take."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Output:
        return self.module(inputs)


def _exported(module: nn.Module, probe: Tensor) -> Program:
    # Both log warnings of their own for networks that they handle, or whose errors are told here.
    quiet = logging.getLogger("torch")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), _masks_unread():
            # Of what modules keep of a pass; recurrent layers keep their weights as lists, too.
            warnings.filterwarnings("ignore", ".*(_flat_weights|was assigned during export)", UserWarning)
            exported = torch.export.export(_OfOne(module), (probe,), strict=False,
                                           dynamic_shapes=({0: torch.export.Dim.AUTO},))
        if not make_functional(exported.graph):
            # An empty table keeps convolutions and linear layers whole.
            exported = exported.run_decompositions({})
    finally:
        quiet.setLevel(level)
    signature = exported.graph_signature
    tensors = {f"module.{name}": value for name, value in module.named_parameters(remove_duplicate=False)}
    tensors |= {f"module.{name}": value for name, value in module.named_buffers(remove_duplicate=False)}
    tensors |= exported.constants
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
             **signature.inputs_to_lifted_tensor_constants}
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("it changes its buffers or its inputs")
    state: dict[fx.Node, Tensor] = {}
    given: list[fx.Node] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                state[node] = tensors[names[node.name]]
            else:
                given.append(node)
    batch = given[0].meta["val"].shape[0]
    if len(given) != 1 or not isinstance(batch, torch.SymInt) or not batch.node.expr.free_symbols:
        raise CaptureError("it works for one number of samples only; x.shape[0] in place of len(x) may help")
    if any(symbols - batch.node.expr.free_symbols for symbols in map(_symbols, exported.graph.nodes)):
        raise CaptureError("sizes within it depend on values")
    spec = exported.call_spec.out_spec
    (results,) = next(node for node in exported.graph.nodes if node.op == "output").args
    return Program(list(exported.graph.nodes)[:-1], given[0], state, list(results), _rebuild(spec), batch.node.expr)


@contextlib.contextmanager
def _masks_unread() -> Iterator[None]:
    """Keep PyTorch's transformers from asking whether a mask is causal, which the graph has no values for.

    It is a hint, by which attention may do without the mask: the mask itself is applied here.
    """
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect


def _symbols(node: fx.Node) -> set:
    """What the sizes of an operation's results depend on."""
    values = pytree.tree_leaves(node.meta.get("val"))
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,))]
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _rebuild(spec: pytree.TreeSpec) -> Callable[[list], Output]:
    return lambda values: pytree.tree_unflatten(values, spec)


def require_close(found: Output, expected: Output, otherwise: str) -> None:
    """Raise `CaptureError(otherwise)` where outputs differ by more than rounding may make of them."""
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        if a.shape != b.shape or not _close(a, b):
            raise CaptureError(otherwise)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors of one shape are equal but for what rounding may make of floating-point numbers."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=RTOL, atol=RTOL * largest, equal_nan=True)
