"""Compressed networks as ONNX: dense float32, and int8 by quantize-dequantize nodes, checked against the student.

The int8 network is made by `onnxruntime.quantization`: static, calibrated on the problem's unlabelled inputs, weights
symmetric in int8 with a scale an output channel. The file's own levels are not kept exactly: they are placed where the
survivors are, not on a uniform grid, and integer kernels know no other.
"""

import contextlib
import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from de_ray.checks import first_line
from de_ray.problem.base import Problem
from de_ray.problem.measure import mean_divergence
from de_ray.problem.outputs import leaves
from de_ray.problem.packing import Packing, packing_of, take_arguments, unpacked

TOLERANCE = 1e-3
"""Largest difference of a float output, relative to the largest magnitude of the student's."""
BATCH = 64
"""Inputs of a calibration pass."""
CHECKED = 64
"""Inputs on which the float network is compared with the student."""
MEASURED = 256
"""Inputs of a pass that measures."""
SHAPES = {"digits_mlp": (8, 8), "lenet300": (1, 28, 28), "lenet5": (1, 28, 28), "yolov3_tiny": (3, 416, 416),
          "yolov3": (3, 416, 416)}
"""Inputs of the built-in architectures, where no problem tells."""
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime", "root")
"""Loggers that tell of their own steps."""


class OnnxNetwork(nn.Module):
    """An ONNX file in place of the module that it was exported from, on the CPU.

    Args:
        data: the file's bytes.
        like: what the module returned for some inputs: the structure of the outputs.
        packing: of its arguments, where it takes several.
    """

    def __init__(self, data: bytes, like: Any, packing: Packing | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]
        self._like, self._packing = like, packing
        self.device = nn.Parameter(torch.empty(0), requires_grad=False)  # which callers ask a module's parameters for

    def forward(self, inputs: Tensor) -> Any:
        """As the module: [N, ...] to its outputs."""
        found = iter(self._session.run(None, _feed(self._names, inputs, self._packing)))
        return _filled(self._like, found)


class _Tensors(nn.Module):
    """A network's tensors alone: outputs of ONNX are nothing else. `OnnxNetwork` puts them back between the others.

    It takes several arguments one after the other.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._packing = packing_of(module)
        self.module = module if self._packing is None else take_arguments(copy.deepcopy(module))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given, named = (inputs, {}) if self._packing is None else self._packing.arguments(list(inputs))
        return list(_tensors(self.module(*given, **named)))


def _feed(names: list[str], inputs: Tensor, packing: Packing | None) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in zip(names, unpacked(inputs, packing), strict=True)}


def _names(packing: Packing | None) -> list[str]:
    """Of an ONNX network's inputs."""
    return ["input"] if packing is None else [field.name for field in packing.fields]


def to_onnx(module: nn.Module, sample: Tensor) -> bytes:
    """A network as ONNX, its batch size free.

    Args:
        module: in eval mode on the CPU.
        sample: [N, ...] inputs, N >= 2.

    Raises:
        ValueError: it cannot be exported, packages are missing, or the ONNX network's outputs differ.
    """
    _require_packages()
    packing = packing_of(module)
    given = tuple(unpacked(sample, packing))
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        try:
            batch = {0: torch.export.Dim("N", min=1)}
            program = torch.onnx.export(_Tensors(module), given, dynamo=True, verbose=False,
                                        input_names=_names(packing), dynamic_shapes=((batch,) * len(given),))
        # The user's network on PyTorch's compiler: anything may come out of it.
        except Exception as error:  # noqa: BLE001
            cause: BaseException = error
            while cause.__cause__ is not None:  # the exporter's own messages are of its steps
                cause = cause.__cause__
            reason = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip().partition("\n")[0]
            raise ValueError(f"this network cannot be exported to ONNX: {type(cause).__name__}: {reason}") from error
        path = Path(folder) / "float.onnx"
        program.save(path, external_data=False)
        data = path.read_bytes()
    _require_equal(module, data, sample)
    return data


def to_int8(data: bytes, calibration: Tensor, packing: Packing | None = None) -> bytes:
    """A float ONNX network with quantize-dequantize nodes.

    Args:
        data: as `to_onnx` gives it.
        calibration: [N, ...] inputs that say which range activations have.
        packing: of the network's arguments, where it takes several.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(calibration[start:start + BATCH] for start in range(0, len(calibration), BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else _feed(_names(packing), batch, packing)

    with _quietly(), tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (str(Path(folder) / f"{name}.onnx") for name in ("float", "prepared", "int8"))
        Path(given).write_bytes(data)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, made, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        reduce_range=True,  # else processors without VNNI saturate sums of two products
                        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True})
        return Path(made).read_bytes()


@torch.inference_mode()
def against(student: nn.Module, network: nn.Module, problem: Problem) -> dict:
    """How far a network is from the student it was made from, on held-out inputs.

    Returns:
        {"from_student": {"divergence": the problem's, "agreement": share of inputs with the same class, of networks
        that return scores [N, classes]}}.
    """
    told = {"divergence": mean_divergence(replace(problem, teacher=student), network, problem.held_out)}
    if isinstance(output := student(problem.held_out[:1]), Tensor) and output.ndim == 2:
        same = total = 0
        for inputs in problem.held_out.split(MEASURED):
            same += int((student(inputs).argmax(1) == network(inputs).argmax(1)).sum())
            total += len(inputs)
        told["agreement"] = same / total
    return {"from_student": told}


def sample_inputs(architecture: str) -> Tensor:
    """Random inputs of a built-in architecture.

    Raises:
        ValueError: for others.
    """
    if architecture not in SHAPES:
        raise ValueError(f"architecture {architecture!r} does not say what its inputs are: name its problem, as in "
                         "problem=custom problem.model=package.module:build problem.calibration=inputs.npy")
    return torch.randn(2, *SHAPES[architecture], generator=torch.Generator().manual_seed(0))


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"exporting needs a package that is not installed ({error.name}): "
                         "pip install 'de-ray[export]'") from error


@torch.inference_mode()
def _require_equal(module: nn.Module, data: bytes, sample: Tensor) -> None:
    expected = module(sample)
    try:
        got = OnnxNetwork(data, expected, packing_of(module))(sample)
    except RuntimeError as error:  # onnxruntime's own are of that kind
        raise ValueError(f"the ONNX network does not run: {first_line(error)}") from error
    for (place, ours), (_, theirs) in zip(leaves(expected), leaves(got), strict=True):
        scale = max(float(ours.abs().max()), torch.finfo(torch.float32).tiny)
        difference = float((ours - theirs).abs().max()) / scale
        if not difference <= TOLERANCE:
            raise ValueError(f"the ONNX network's {place} differs from the student's by {difference:.3g} of its "
                             f"largest value: expected at most {TOLERANCE:g}")


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in order, those of integers too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _filled(like: Any, found: Iterator[np.ndarray]) -> Any:
    """A structure like another one, its tensors taken in order."""
    if isinstance(like, Tensor):
        return torch.from_numpy(next(found))
    if isinstance(like, Mapping):
        return {key: _filled(value, found) for key, value in like.items()}
    if isinstance(like, list | tuple):
        parts = [_filled(value, found) for value in like]
        return parts if isinstance(like, list) else tuple(parts)
    return like


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep exporters from telling of each step; their errors are raised."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
