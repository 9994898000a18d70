"""Any network as a problem: a module, unlabelled inputs, and nothing else."""

import copy
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from de_ray.checks import first_line, require, require_choice
from de_ray.config import DIVERGENCES, ProblemConfig
from de_ray.problem.arrays import Given, checked, load_inputs
from de_ray.problem.augment import augmentation, spliced
from de_ray.problem.base import Augment, Layer, Problem
from de_ray.problem.buffers import promote
from de_ray.problem.divergence import make_divergence
from de_ray.problem.fold import fold_batch_norm
from de_ray.problem.idle import empty_idle
from de_ray.problem.layers import check_finite, find_layers, layer_weights, told_of_recomputed
from de_ray.problem.layout import take_channels_last
from de_ray.problem.measure import pass_size
from de_ray.problem.outputs import flatten
from de_ray.problem.packing import Arguments, Packing, packing_of, take_packed
from de_ray.problem.probing import differ, probe, refuses
from de_ray.problem.sampling import draw_inputs
from de_ray.problem.teacher import load_checkpoint

log = logging.getLogger(__name__)

OUTPUT_NUMBERS = 2**27
"""Of all calibration inputs' outputs, at most: 512 MB, which only language models come near to."""
COMPOSED = 128
"""Inputs, at most, that are composed of each other to see whether the model takes them."""
PROBE = 8
"""Inputs, at most, of the forward passes that check a model."""
DENSE_SHARE = 0.1
"""Of the parameters, in layers of other kinds: from there on a user should know that they are rounded alone."""


def build_custom(config: ProblemConfig, seed: int) -> Problem:
    """The problem of `problem=custom`: a model by import path, its inputs from `.npy` or `.npz` files.

    Raises:
        FileNotFoundError, ValueError: naming the key at fault.
    """
    model = import_model(config.model)
    if config.teacher.checkpoint is not None:
        load_checkpoint(model, Path(config.teacher.checkpoint))
    calibration = load_inputs(config.calibration, "problem.calibration")
    held_out = None if config.held_out is None else load_inputs(config.held_out, "problem.held_out")
    return problem_from_model(
        model, calibration, divergence=config.divergence, held_out=held_out, include=config.include,
        exclude=config.exclude, name=config.name, architecture=config.model, seed=seed,
        calibration_size=config.calibration_size, inputs_size=config.inputs_size, augment=config.augment,
        augment_share=config.augment_share)


def problem_from_model(
    model: nn.Module,
    calibration: Given,
    *,
    divergence: str = "kl",
    held_out: Given | None = None,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    name: str = "custom",
    architecture: str | None = None,
    seed: int = 0,
    calibration_size: int = 1024,
    inputs_size: int = 0,
    augment: str = "none",
    augment_share: float = 0.5,
) -> Problem:
    """A problem of a trained module and unlabelled inputs.

    Args:
        model: any module from a batch [N, ...] to tensors [N, ...]; copied in float32 on the CPU, never changed.
        calibration: [M, ...] inputs, see `checked` for their types; those of several arguments in a tuple, or in a dict
            by name.
        divergence: kl, mse or cosine.
        held_out: [H, ...] inputs for the report alone. None: the last fifth of `calibration`, kept apart.
        include, exclude: a glob of layer names, or several; each must match a layer.
        name: of reports.
        architecture: what the file will be loaded into, as its header says. None: the model's class.
        seed: of the draw of calibration inputs.
        calibration_size: inputs on which candidates are evaluated; all of them where there are fewer.
        inputs_size: inputs that saliency and refit may use; 0: all.
        augment: none, shift, cutmix or auto; see `augmentation`.
        augment_share: share of the inputs that augmentation changes.

    Raises:
        ValueError: for inputs or weights that are not finite, inputs that the model does not accept, patterns that
            match no layer.
    """
    require_choice("problem.divergence", divergence, DIVERGENCES)
    include, exclude = (glob_list(key, globs) for key, globs in (("include", include), ("exclude", exclude)))
    plain = isinstance(model, nn.Module) and not any(isinstance(one, torch.jit.ScriptModule) for one in model.modules())
    require(plain, "model", type(model).__name__, "a torch.nn.Module of which TorchScript has compiled no part")
    require(not isinstance(model, nn.DataParallel), "model", type(model).__name__, "the module within, `model.module`")
    for path, module in model.named_modules():
        place = f"model.{path}" if path else "model"
        require(not hasattr(module, "_orig_mod"), place, type(module).__name__,  # torch.compile's
                f"the module within, `{place}._orig_mod`")
    calibration = checked(calibration, "calibration")
    packing = None if isinstance(calibration, Tensor) else Packing.of(calibration)
    inputs = calibration if packing is None else packing.pack(calibration, "calibration")
    if held_out is None:
        require(len(inputs) >= 2, "calibration", list(inputs.shape), "two or more samples, one of them to hold out")
        kept = len(inputs) - max(1, len(inputs) // 5)
        inputs, held_out = inputs[:kept], inputs[kept:]
    else:
        held_out = _like(checked(held_out, "held_out"), calibration, packing)
    if calibration_size > len(inputs):
        log.info("calibration on all %d inputs, fewer than the %d asked for", len(inputs), calibration_size)
    _require_values(model)
    _tell_of_size(model)
    teacher = _copied(model).cpu().float().eval().requires_grad_(False)
    if packing is not None:
        take_packed(teacher, packing)
    check_finite(teacher)
    distance = make_divergence(divergence)
    numbers = probe(teacher, inputs[:PROBE], distance)
    promote(teacher, inputs[:PROBE])
    take_channels_last(teacher, inputs[:PROBE])
    if calibration_size > (most := max(1, OUTPUT_NUMBERS // numbers)):
        log.info("calibration on %d inputs at most, as evaluators keep the outputs, %d numbers each", most, numbers)
        calibration_size = most
    distort = _augmentation(teacher, augment, inputs, augment_share)
    inputs, drawn = draw_inputs(inputs, min(calibration_size, len(inputs)), inputs_size, seed, distort)
    if augment not in ("auto", "none"):
        probe(teacher, drawn[:PROBE], distance)
    teacher = _folded(teacher, drawn[:PROBE])
    measure = _agreement if divergence == "kl" else _relative_error
    layers = empty_idle(teacher, find_layers(teacher, include, exclude, drawn[:PROBE]), drawn)
    _tell_of_dense(teacher, layers)
    return Problem(
        name=name,
        architecture=architecture or f"{type(model).__module__}:{type(model).__qualname__}",
        teacher=teacher,
        layers=layers,
        inputs=inputs,
        calibration=drawn,
        held_out=held_out,
        divergence=distance,
        metrics=partial(measure, teacher, held_out),
        augment=distort,
        left_out=frozenset(layer_weights(teacher, drawn[:PROBE])) - {layer.parameter for layer in layers},
    )


def _like(held_out: Tensor | Arguments, calibration: Tensor | Arguments, packing: Packing | None) -> Tensor:
    """Held-out inputs, as calibration inputs are.

    Raises:
        ValueError: they are of other arguments, types or shapes.
    """
    if isinstance(held_out, Tensor) != isinstance(calibration, Tensor):
        raise ValueError(f"held_out is a {type(held_out).__name__}: expected a {type(calibration).__name__}, as "
                         "calibration is")
    if packing is not None:
        return packing.pack(held_out, "held_out")
    if held_out.shape[1:] != calibration.shape[1:] or held_out.dtype != calibration.dtype:
        raise ValueError(f"held_out has samples {held_out.dtype} {list(held_out.shape[1:])}, calibration "
                         f"{calibration.dtype} {list(calibration.shape[1:])}: expected the same")
    return held_out


def _augmentation(teacher: nn.Module, name: str, inputs: Tensor, share: float) -> Augment | None:
    """The augmentation of a name; of auto the first one that the teacher takes, or none, with a warning."""
    packing = packing_of(teacher)
    chosen = augmentation(name, inputs, share, packing)
    if name != "auto" or chosen is None:
        return chosen
    other = spliced(inputs, share, packing)
    same = (other.func, other.keywords) == (chosen.func, chosen.keywords)
    for distort in (chosen,) if same else (chosen, other):
        if not refuses(teacher, distort(inputs[:COMPOSED], torch.Generator().manual_seed(0), share=1.0)):
            return distort
    log.warning("the model does not take inputs that are composed of each other: refit has them as they are, and may "
                "learn few of them by heart")
    return None


def glob_list(key: str, globs: str | Sequence[str]) -> list[str]:
    """One glob or several as a list."""
    globs = [globs] if isinstance(globs, str) else globs
    require(isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs), key, globs,
            "a glob of layer names, or a list of them, which may be empty for exclude")
    return list(globs)


def import_model(path: str) -> nn.Module:
    """The module that `package.module:build` names: what the callable returns, or a module object itself.

    The working folder joins `sys.path` for good, since workers that unpickle the model import it from there too.

    Raises:
        ValueError: when it cannot be imported, or is not an `nn.Module` in the end.
    """
    key = f"problem.model={path!r}"
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{key}: expected package.module:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: no module named {error.name!r} in {os.getcwd()} or on the Python path") from error
    except Exception as error:  # running the user's code: anything may come out of it
        raise ValueError(f"{key}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{key}: {module_name} has no attribute {attribute!r}")
        target = getattr(target, part)
    if not isinstance(target, nn.Module):
        require(callable(target), "problem.model", path, f"a callable, but it is a {type(target).__name__}")
        try:
            target = target()
        except Exception as error:  # the user's code again
            raise ValueError(f"{key}: calling it failed: {type(error).__name__}: {error}") from error
    require(isinstance(target, nn.Module), "problem.model", path,
            f"a callable that returns a torch.nn.Module, but it returned a {type(target).__name__}")
    return target


def _copied(model: nn.Module) -> nn.Module:
    """A copy, in which parameters that share their storage are one.

    Raises:
        ValueError: it cannot be copied, or has parameters that share a part of their memory, or all in another order.
    """
    _require_apart(model)
    try:
        copies: dict[int, nn.Parameter] = {}  # deepcopy's memo, by identity
        places: dict[tuple, int] = {}
        for parameter in model.parameters():
            # Two parameters may have the same values, `a.weight.data = b.weight.data`; deepcopy would part them.
            place = parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
            first = places.setdefault(place, id(parameter)) if parameter.numel() else id(parameter)
            copies[id(parameter)] = copies[first] if first in copies else copy.deepcopy(parameter)
        copied = copy.deepcopy(model, copies)
    except (RuntimeError, TypeError) as error:
        reason, hint = first_line(error), "expected a module that copy.deepcopy copies"
        if "graph leaves" in reason:
            hint = ("expected parameters that are no function of others; torch.nn.utils.remove_weight_norm, "
                    "prune.remove and their like undo what made them so")
        raise ValueError(f"model={type(model).__name__} cannot be copied: {hint} ({reason})") from error
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Nested tensors, of padded inputs without gradients, are no outputs that refit could come to.
            module.use_nested_tensor = False
    return copied


def _require_apart(model: nn.Module) -> None:
    """Raise `ValueError` for parameters that are views of one memory without being the same: copies would part them."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.element_size() * (1 + sum(
        (length - 1) * stride for length, stride in zip(p.shape, p.stride(), strict=True))), tuple(p.stride()), name)
        for name, p in model.named_parameters() if p.numel() and p.data_ptr())
    for (start, end, strides, name), (after, last, others, other) in pairwise(spans):
        if after < end and (start, end, strides) != (after, last, others):
            raise ValueError(f"the model's {' and '.join(sorted((name, other)))} are views of one memory: expected "
                             "parameters that are the same, `a.weight = b.weight`, or have values of their own, "
                             "`a.weight.data.clone()`")


@torch.no_grad()
def _folded(teacher: nn.Module, sample: Tensor) -> nn.Module:
    """The teacher with batch norm folded, or as it is when that changes its outputs."""
    folded = copy.deepcopy(teacher)
    fold_batch_norm(folded, sample)
    for before, after in zip(flatten(teacher(sample)), flatten(folded(sample)), strict=True):
        if differ(before, after):
            log.warning("batch norm is not folded: this model's outputs depend on it in other ways than by its call")
            return teacher
    return folded


def _require_values(model: nn.Module) -> None:
    """Raise `ValueError` for tensors without values of their own in memory, or that are laid out as sparse ones."""
    for name, value in [*model.named_parameters(), *model.state_dict().items()]:
        if not isinstance(value, Tensor):
            continue
        if isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"the model's {name} has no shape yet: expected a model that has been called once")
        if value.is_meta:
            raise ValueError(f"the model's {name} is on the meta device: expected values, as of model.to_empty "
                             "and load_state_dict")
        if value.layout != torch.strided:
            raise ValueError(f"the model's {name} is sparse ({value.layout}): expected a dense tensor; a buffer that "
                             "does not change may be registered with persistent=False")


def _tell_of_size(model: nn.Module) -> None:
    """Warn of parameters in 16 bits, whose bytes are half of those that ratios are over."""
    types = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if short := sorted(types & {"float16", "bfloat16"}):
        log.warning("the model's parameters are of %s; it is compressed as float32, ratios are over that size, and the "
                    "file is for a model in float32, model.float()", " and ".join(short))


def _tell_of_dense(teacher: nn.Module, layers: Sequence[Layer]) -> None:
    """Warn of a large share of parameters that cannot be zeroed, such as embeddings."""
    zeroable = {layer.parameter for layer in layers}
    others = {name: p.numel() for name, p in teacher.named_parameters()
              if p.ndim > 1 and name not in zeroable and p.any()}  # what nothing reads is empty
    share = sum(others.values()) / sum(p.numel() for p in teacher.parameters())
    if share > DENSE_SHARE:
        largest = ", ".join(sorted(others, key=others.get, reverse=True)[:3])
        log.warning("%.0f %% of the parameters stay dense and are rounded alone: they are excluded, looked up by rows, "
                    "as embeddings are, or nothing that the network multiplies with (%s, ...)%s", 100 * share, largest,
                    told_of_recomputed(teacher))


def _outputs(teacher: nn.Module, model: nn.Module, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the teacher's and the model's output tensors, batch by batch, on the CPU, wherever the two are."""

    def outputs(one: nn.Module, batch: Tensor) -> list[Tensor]:
        return [tensor.cpu() for tensor in flatten(one(batch.to(next(one.parameters()).device)))]

    for batch in inputs.split(pass_size(inputs, outputs(teacher, inputs[:1]))):
        expected, ours = outputs(teacher, batch), outputs(model, batch)
        yield from zip(expected, ours, strict=True)


@torch.no_grad()
def _agreement(teacher: nn.Module, inputs: Tensor, model: nn.Module) -> dict[str, float]:
    """Share of held-out samples (and positions, where there are more) whose largest logit is the teacher's."""
    equal = total = 0
    for expected, got in _outputs(teacher, model, inputs):
        same = expected.argmax(1) == got.argmax(1)
        equal, total = equal + int(same.sum()), total + same.numel()
    return {"agreement": equal / total}


@torch.no_grad()
def _relative_error(teacher: nn.Module, inputs: Tensor, model: nn.Module) -> dict[str, float]:
    """|student - teacher| / |teacher| over all held-out outputs, Euclidean norms."""
    error = norm = 0.0
    for expected, got in _outputs(teacher, model, inputs):
        error += float((expected - got).double().square().sum())
        norm += float(expected.double().square().sum())
    return {"relative_error": (error / norm) ** 0.5 if norm else float(error > 0)}
