"""The four stages in order: evolve, quantize, encode, report."""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from de_ray import codec
from de_ray.checks import first_line, require
from de_ray.codec.raw import raw_entry
from de_ray.config import Config, PoolConfig
from de_ray.device import moved, products, resolve_device, threads
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.capture import PROBE
from de_ray.evaluation.pool import students_divergence
from de_ray.evolve import OnRecord, evolve
from de_ray.files import write_atomically
from de_ray.fingerprint import fingerprint
from de_ray.memory import full_gpus_explained
from de_ray.minutes import schedule, with_minutes
from de_ray.negligible import constant_divergence, with_negligible
from de_ray.problem.base import Problem
from de_ray.problem.measure import measure
from de_ray.quantization.scales import row_scales
from de_ray.quantize import Quantized, quantize
from de_ray.rate import size_limit
from de_ray.report import BYTES_A_PARAMETER, tell_of_harm, versions
from de_ray.signals import compiled_interrupts_told
from de_ray.student import Student
from de_ray.units import find_units, tidy
from de_ray.workload import with_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A compressed network."""

    data: bytes
    """The file."""
    report: dict
    """As `report.json` has it."""
    student: nn.Module
    """What was measured, in eval mode, on the run's device."""
    model: nn.Module
    """What the file decodes to, in eval mode, on the CPU."""
    survivors: dict[str, tuple[np.ndarray, np.ndarray]]
    """Layer -> values of the survivors before quantization, divided by their row's scale, and the layer's levels."""

    def save(self, path: str | Path) -> Path:
        """Write the file; returns its path."""
        write_atomically(path, self.data)
        return Path(path)


@compiled_interrupts_told()
@full_gpus_explained("Lower refit.memory_mb (activations of a step), pool.cache_mb, pool.stack or pool.batch "
                     "(evaluators), or take device=cpu")
@torch.enable_grad()  # refit needs it, in whatever mode the caller is
def run(problem: Problem, config: Config, folder: Path | None = None,
        on_record: OnRecord = lambda record, total: None,
        on_stage: Callable[[str], None] = lambda stage: None) -> Result:
    """Compress a problem's teacher.

    Args:
        problem: what is compressed.
        config: validated by its own checks.
        folder: for checkpoints and Tune's results; None: keep nothing.
        on_record: told of each cycle.
        on_stage: told the name of each stage as it starts.

    Raises:
        ValueError: no file can hold one of the teacher's tensors, or its outputs have no gradient.
        FloatingPointError: the divergence became NaN or infinite.
        MemoryError: a GPU has no room left.
        RuntimeError: the file does not decode to the student, bit for bit.
    """
    config = with_minutes(problem, with_threads(problem, config), folder)
    clock, limit = _Clock(on_stage), size_limit(problem, config)
    _require_state(problem)
    device = resolve_device(config.device)
    problem.teacher.to(device)
    with threads(config.threads), products("float32", device):
        student = Student(problem.teacher, problem.layers, device)
        _require_gradients(problem, student)
        scaled = with_negligible(problem, config)  # not for fingerprints: processors round differently
        earlier = None if config.start is None else _earlier(student, config.start)
        with build_pool(problem, _pool_config(config, device.type), student, str(device)) as pool:
            # Not before it is needed: until then actors start while the driver works.
            units = cache(lambda: find_units(problem.teacher, moved(problem.calibration[:PROBE], device),
                                             pool.hidden()))
            if earlier is not None:
                units().restore(earlier, problem.teacher.state_dict())
                student.start_from(earlier)
                pool.load(student)
                _tell_of_strangers(problem, config.start, students_divergence(pool))
            with clock.stage("evolve"):
                history = evolve(problem, scaled, student, pool, folder, fingerprint(problem, config), on_record, limit,
                                 units)
            student.rewind()  # before units move: a run that was continued has made other passes
            tidy(student, units())
            student.keep_buffers()
            pool.load(student)
            clock.seconds["evolve"] = history[-1]["seconds"]  # earlier sittings included
            pruned = measure(problem, student.module)
            weights = [weight.cpu().numpy().copy() for weight in student.weights]
            with clock.stage("quantize"):
                quantized = quantize(problem, scaled, student, pool, folder, limit, units().unread_values(student))
            evaluated = {"evaluations": pool.evaluations, "evaluator_peak_mb": pool.peak_mb(),
                         "saved_evaluations": sum(record["saved_evaluations"] for record in history)}
        with clock.stage("encode"):
            data = codec.encode(quantized.tensors, quantized.raw, problem.architecture, quantized.shared)
            state, summary = codec.examine(data)
            _require_equal(state, student.module.state_dict())
            decoded = codec.fill(copy.deepcopy(problem.teacher), state)
        with clock.stage("report"):
            measured = measure(problem, student.module)
            report = _report(problem, config, quantized, summary) | {
                "divergence": measured["divergence"], "teacher": problem.metrics(problem.teacher), "pruned": pruned,
                "student": measured["metrics"], "decoded": problem.metrics(decoded), "decoded_equals_student": True,
                "history": history}
    report |= {**evaluated, "target_bytes": limit, "seconds": clock.seconds, "seed": config.seed,
               "schedule": schedule(config), "versions": versions()}
    tell_of_harm(report["decoded"])
    model = codec.fill(decoded.cpu(), state)  # again: a network may count its own passes in a buffer
    return Result(data, report, student.module.eval(), model, _survivors(problem, weights, quantized))


def _require_state(problem: Problem) -> None:
    """Raise `ValueError` for what no file can hold, or could not give back: it need not wait for the end."""
    state = problem.teacher.state_dict()
    for name, value in state.items():
        raw_entry(name, value)
    missing = [name for name, _ in problem.teacher.named_parameters() if name not in state]
    if missing:
        raise ValueError(f"the teacher's state dict lacks {', '.join(missing[:4])}: expected all its parameters, by "
                         "their names in named_parameters")


def _require_gradients(problem: Problem, student: Student) -> None:
    """Raise `ValueError` where outputs are no differentiable function of the layers' weights, or a pass leaves
    something to the next one that is none, or that files cannot hold."""
    weights = student.weights
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for count in (1, 2):
            output = student.module(problem.calibration[:count].to(weights[0].device))
            score = problem.divergence.score(output, torch.Generator().manual_seed(0))
            torch.autograd.grad(score, weights, materialize_grads=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        require("same device" not in str(error), "device", str(weights[0].device), "cpu, as the teacher makes or keeps "
                "tensors that stay there; register_buffer has what it keeps follow its weights, device=x.device what "
                "its forward pass makes")
        raise ValueError("the teacher's outputs have no gradient with respect to its layers' weights, which saliencies "
                         "and refit follow: expected no torch.no_grad or inference_mode in its forward pass, no "
                         "reentrant checkpoints (use_reentrant=False), nothing changed in place that gradients need, "
                         "nothing kept for the next pass but what is detached, "
                         f"and scores rather than their argmax ({first_line(error)})") from error
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    before = problem.teacher.state_dict()  # of which the student is a copy
    for name, value in student.module.state_dict().items():
        if value.shape != before[name].shape:
            raise ValueError(f"the teacher's {name} is {list(before[name].shape)} before a pass and "
                             f"{list(value.shape)} after another: expected buffers that keep their shape, or "
                             "register_buffer(..., persistent=False), which keeps them out of files")


def _earlier(student: Student, path: str) -> dict[str, Tensor]:
    """The state dict of the file that a run starts from."""
    try:
        state = codec.decode(Path(path).read_bytes())
        student.check(state)
    except (OSError, ValueError) as error:
        raise ValueError(f"start={path!r}: {error}; expected a compressed file of this teacher") from error
    return state


def _tell_of_strangers(problem: Problem, path: str, divergence: float) -> None:
    """Warn of a start whose outputs tell nothing of the teacher's: another network's student may have its shapes."""
    nothing = constant_divergence(problem, problem.calibration)
    if not divergence < nothing:
        log.warning("start=%s: its divergence from the teacher is %.4g, and a constant output's would be %.4g; is it a "
                    "student of this teacher?", path, divergence, nothing)


def _pool_config(config: Config, device: str) -> PoolConfig:
    """The pool's configuration; actors that kept whole GPUs would leave none for refit's workers."""
    if config.refit.workers > 1 and device == "cuda" and config.pool.kind == "ray":
        return replace(config.pool, gpus=config.pool.gpus_beside_workers)
    return config.pool


def _require_equal(decoded: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    """The file's hash says that it decodes to what was encoded; this says that what was encoded is the student."""
    for name, value in student.items():
        # Bits, not numbers: -0.0 equals 0.0 and NaN does not equal itself.
        if decoded[name].numpy().tobytes() != value.cpu().contiguous().numpy().tobytes():
            raise RuntimeError(f"{name}: the file decodes to other values than the student's; this is a bug in de_ray, "
                               "please report it with the run's folder")


def _report(problem: Problem, config: Config, quantized: Quantized, file: codec.FileSummary) -> dict:
    """What can be told of the file without running it."""
    parameters = sum(p.numel() for p in problem.teacher.parameters())
    lines = {line.name: line for line in file.tensors}
    layers = [{"name": layer.name, "weights": layer.size, "density": lines[layer.parameter].density, "bits": bits,
               "bytes": lines[layer.parameter].payload_bytes}
              for layer, bits in zip(problem.layers, quantized.bits, strict=True)]
    survivors = sum(layer["density"] * layer["weights"] for layer in layers)
    return {
        "problem": problem.name, "method": config.evolution.method, "architecture": problem.architecture,
        "parameters": parameters, "sparsity": 1 - survivors / problem.weights, "layers": layers,
        "file_bytes": file.file_bytes, "ratio": BYTES_A_PARAMETER * parameters / file.file_bytes,
        "bits_per_survivor": 8 * sum(layer["bytes"] for layer in layers) / max(1.0, survivors),
        "trials": [asdict(trial) for trial in quantized.trials], "chosen": asdict(quantized.chosen),
    }


def _survivors(problem: Problem, weights: list[np.ndarray], quantized: Quantized) -> dict:
    """See `Result.survivors`."""
    tensors = {tensor.name: tensor for tensor in quantized.tensors}
    found = {}
    for layer, weight in zip(problem.layers, weights, strict=True):
        exponents = tensors[layer.parameter].row_exponents
        rows = weight.reshape(len(weight), -1)
        scaled = rows if exponents is None else rows / row_scales(exponents)[:, None]
        found[layer.name] = scaled[rows != 0], tensors[layer.parameter].levels
    return found


class _Clock:
    """Seconds by stage."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        self._on_stage(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
