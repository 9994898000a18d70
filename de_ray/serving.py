"""The compressed network as MLflow loads it: `mlflow.pyfunc.load_model(URI).predict(inputs)`.

The model is the file itself: this module is its loader, and nothing is pickled.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from de_ray import codec
from de_ray.checks import require
from de_ray.config import ProblemConfig
from de_ray.problem.base import Output, Problem
from de_ray.problem.packing import Field, Packing, packing_of, take_packed

if TYPE_CHECKING:
    from mlflow.models import Model

REQUIREMENTS = ("torch", "numpy", "safetensors", "constriction", "numba")
"""What reading a file takes, besides this package."""
BATCH = 256
"""Inputs of a forward pass."""


class Predictor:
    """What `mlflow.pyfunc.load_model` wraps.

    Args:
        module: the network.
        dtype: of the inputs that it was compressed with: networks may take bytes otherwise than numbers.
        packing: of its arguments, where it takes several.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32, packing: Packing | None = None) -> None:
        self.module, self._dtype, self._packing = module, dtype, packing
        if packing is not None:
            take_packed(module, packing)

    def predict(self, inputs: Any, params: dict | None = None) -> Any:
        """The network's outputs.

        Args:
            inputs: [N, ...], an array, a tensor, lists, or a table with a row a sample; of several arguments a dict of
                arrays by name.
            params: none are known.

        Returns:
            Arrays [N, ...], in tuples, lists and dicts as the network has them.

        Raises:
            ValueError: the network takes whole numbers, and inputs are none, or out of their range; or it takes
                several arguments, and others are given.
        """
        if self._packing is None:
            array = _as_type(inputs, self._dtype, "inputs")
        else:
            wanted = {field.name: field for field in self._packing.fields}
            given = set(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            require(given == set(wanted), "inputs", given, f"a dict of {', '.join(wanted)}")
            array = self._packing.pack({field.place: _as_type(inputs[name], field.dtype, name)
                                        for name, field in wanted.items()}, "inputs")
        with torch.inference_mode():
            return _joined([self.module(part) for part in array.split(BATCH)])


def _as_type(values: Any, dtype: torch.dtype, key: str) -> Tensor:
    """Values of a type.

    Raises:
        ValueError: they are no whole numbers of its range, where it is one of those.
    """
    given = torch.as_tensor(np.asarray(values))
    array = given.to(dtype)
    if not dtype.is_floating_point:  # pixels in [0, 1], say, would all become black
        require(bool((array == given).all()), key, str(given.dtype), f"whole numbers in {dtype}'s range")
    return array


def _joined(outputs: list[Output]) -> Any:
    """Batches' outputs as one, in NumPy."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs).numpy()
    if isinstance(first, dict):
        return {key: _joined([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        parts = [_joined(list(part)) for part in zip(*outputs, strict=True)]
        return parts if isinstance(first, list) else tuple(parts)
    return first


def saver(problem: Problem, file: Path, module: nn.Module, config: ProblemConfig) -> Any:
    """What `Tracker.log_model` calls to write a compressed network as an MLflow model.

    Args:
        problem: what was compressed.
        file: the compressed file.
        module: what it decodes to, on the CPU.
        config: of the problem; says how the network is built where its name does not.
    """
    return partial(_save, problem, file, module, config)


def _save(problem: Problem, file: Path, module: nn.Module, config: ProblemConfig, path: Path,
          metadata: "Model") -> None:
    from mlflow import pyfunc

    here = [f"{name}=={version(name)}" for name in ("de-ray", *REQUIREMENTS)]
    cfg = None if config.cfg is None else Path(config.cfg).expanduser().read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants an example beside the signature
        pyfunc.save_model(path, loader_module=__name__, data_path=str(file), mlflow_model=metadata,
                          pip_requirements=here, signature=_signature(problem, module),
                          model_config={"architecture": problem.architecture, "model": config.model, "cfg": cfg,
                                        "dtype": _told(problem.held_out.dtype), "arguments": _arguments(module)})


def _arguments(module: nn.Module) -> list[dict] | None:
    """Several arguments of a network as JSON can hold them; None: it takes one."""
    packing = packing_of(module)
    return None if packing is None else [{"place": field.place, "dtype": _told(field.dtype), "shape": list(field.shape)}
                                         for field in packing.fields]


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _signature(problem: Problem, module: nn.Module) -> Any:
    """Types and shapes of inputs, and of outputs where they are one tensor."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    sample = problem.held_out[:1]
    with torch.inference_mode():
        output = module(sample)

    def described(tensor: Tensor, name: str | None = None) -> TensorSpec:
        array = tensor.numpy()
        return TensorSpec(array.dtype, (-1, *array.shape[1:]), name)

    packing = packing_of(module)
    given = [described(sample)] if packing is None else [
        described(value, field.name) for field, value in zip(packing.fields, packing.values(sample), strict=True)]
    return ModelSignature(Schema(given), Schema([described(output)]) if isinstance(output, Tensor) else None)


def _build(config: dict) -> nn.Module:
    """The network that a file's weights are for; see `_load_pyfunc`."""
    if config.get("model"):
        from de_ray.problem.custom import import_model

        return import_model(config["model"])
    if config.get("cfg"):
        from de_ray.problem.darknet import Darknet
        from de_ray.problem.darknet_cfg import parse

        return Darknet(parse(config["cfg"], config["architecture"])).eval()
    from de_ray.problem.build import build_architecture

    return build_architecture(config["architecture"])


def _load_pyfunc(path: str, model_config: dict | None = None) -> Predictor:
    """MLflow's protocol of a loader.

    Args:
        path: of the compressed file.
        model_config: the architecture, what builds it where it is the user's own (`model`, or a Darknet `cfg` as
            text), and the type of inputs, or those of several arguments.

    Raises:
        ValueError: the architecture is not built in and no `model` is given.
    """
    config = model_config or {}
    module = _build(config)
    arguments = config.get("arguments")
    packing = None if arguments is None else Packing(tuple(
        Field(one["place"], getattr(torch, one["dtype"]), tuple(one["shape"])) for one in arguments))
    return Predictor(codec.fill(module.float(), codec.decode(path)), getattr(torch, config["dtype"]), packing)
