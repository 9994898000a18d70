"""Bytes of whole files at equal held-out divergence: ECSQ with curvature, k-means codebooks, NNCodec.

    python tests/benchmarks/bench_quantizers.py --prepare student.npz
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --state student.npz --out nncodec.npz
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --state student-ordered.npz --out nncodec-ordered.npz
    python tests/benchmarks/bench_quantizers.py --student student-ordered.npz --nncodec nncodec.npz nncodec-ordered.npz

`--prepare` writes the student with its units as they are numbered, and in the order that files have them in. One
pruned student is quantized at several rates by every method. `ecsq` places entropy-constrained levels weighted by the
divergence's curvature; `kmeans` places exact one-dimensional k-means levels, all weights alike; both files are written
by the same coder, with the same biases, once with the levels as placed and once after equal distillation of them
(`refitted`). NNCodec's are its own quantizer's and coder's. With `--trials` each layer has a width of its own instead,
as the sweep finds them (`searched`). Of each method's points those count that no other of it beats in both; between
them bytes are interpolated, logarithm over logarithm. The last line is one JSON object: for each divergence, in
multiples of the pruned student's, bytes by method. A student may be a compressed file, and settings be set:

    python tests/benchmarks/bench_quantizers.py --problem yolov3_tiny --student FILE.der --trials 16 \
        --set problem.calibration_size=32 quantization.row_scales=auto quantization.rate_weight=3
"""

import argparse
import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from de_ray import codec
from de_ray.config import Config, QuantizationConfig
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.capture import PROBE
from de_ray.evolve import evolve, saliency_inputs
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.biases import quantize_biases
from de_ray.quantization.choice import LevelChoice
from de_ray.quantization.pareto import pareto
from de_ray.quantization.refit import refit_levels
from de_ray.quantization.sensitivity import choices_at, sensitivity
from de_ray.quantization.sweep import sweep, tolerated
from de_ray.quantize import level_curvature
from de_ray.refit.objective import Objective
from de_ray.schema import compose
from de_ray.seeds import torch_generator
from de_ray.student import Student
from de_ray.units import find_units, tidy

Point = tuple[int, float]
"""Bytes, held-out divergence."""
MULTIPLES = (1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
RATES = {"ecsq": [(bits, weight) for bits in (3, 4, 5) for weight in (0.5, 1.0, 2.0, 4.0)],
         "kmeans": [(bits, 0.0) for bits in (1, 2, 3, 4, 5, 6, 7)]}
"""Width and rate weight."""
WIDTHS = 3, 8
"""That a search may take."""
RISES = 0.1, 0.4
"""Of the calibration divergence, the rises that a search is after, one after the other."""


@dataclass(frozen=True)
class Setting:
    """What a method makes of the student, before any refit."""

    method: str
    name: str
    choices: tuple[LevelChoice, ...]


def configured(arguments: argparse.Namespace) -> Config:
    """Fisher pruning in 40 cycles."""
    return compose([f"problem={arguments.problem}", "evolution=fisher", f"evolution.sparsity={arguments.sparsity}",
                    "evolution.cycles=40", "refit.steps=150", f"refit.final_steps={arguments.final_steps}",
                    "refit.relative=false", "refit.backoff=false", "refit.learning_rate=2e-3",
                    "quantization.learning_rate=2e-4", "quantization.row_scales=never", "pool=serial",
                    f"threads={arguments.threads}", f"pool.threads={arguments.threads}", *arguments.set])


def prune(problem: Problem, config: Config) -> Student:
    """A pruned, distilled student."""
    student = Student(problem.teacher, problem.layers)
    with build_pool(problem, config.pool, student) as pool:
        evolve(problem, config, student, pool, None, {}, lambda record, total: None)
    return student


def write(path: Path, student: Student) -> None:
    """Write a student for `restored`, and for NNCodec."""
    np.savez(path, **{name: v.numpy() for name, v in student.module.state_dict().items()})


def restored(problem: Problem, path: Path) -> Student:
    """The student that `--prepare` wrote, or that of a compressed file."""
    student = Student(problem.teacher, problem.layers)
    if path.suffix == ".der":
        student.start_from(codec.load(path))
        return student
    with np.load(path) as file:
        student.module.load_state_dict({name: torch.from_numpy(file[name]) for name in file.files})
    for weight, mask in zip(student.weights, student.masks, strict=True):
        mask.copy_(weight != 0)
    return student


def round_biases(problem: Problem, student: Student, tolerance: float) -> list[codec.QuantizedTensor]:
    """Biases in coded form, the same for all methods; the student ends with them."""
    exact = {name: p.detach().numpy().copy() for name, p in student.others.items()}

    def measure(values: dict[str, np.ndarray]) -> float:
        for name, value in values.items():
            student.others[name].data.copy_(torch.from_numpy(value))
        return mean_divergence(problem, student.module, problem.calibration)

    rounded = quantize_biases(exact, measure, measure(exact) * (1 + tolerance))
    measure({name: tensor.dequantize() for name, tensor in rounded.items()})
    return list(rounded.values())


def settings(problem: Problem, config: Config, student: Student, method: str, trials: int) -> list[Setting]:
    """Levels at every rate of a method, one width for all layers or, with trials, widths that the sweep finds at the
    configured weight of the rate."""
    weights = [weight.detach().numpy() for weight in student.weights]
    curved = method == "ecsq"
    curvature = level_curvature(saliency_inputs(problem, config, student, -1)) if curved else None
    asked = QuantizationConfig(placement="ecsq" if curved else "lloyd",
                               row_scales=config.quantization.row_scales if curved else "never")
    if not trials:
        return [Setting(method, f"{bits} bits, rate weight {rate:g}", tuple(
            row for row, in choices_at(weights, replace(asked, bits=bits, rate_weight=rate), curvature)[0]))
            for bits, rate in RATES[method]]
    asked = replace(asked, rate_weight=config.quantization.rate_weight if curved else 0.0, min_bits=WIDTHS[0],
                    max_bits=WIDTHS[1], trials=trials)
    with build_pool(problem, config.pool, student) as pool:
        pool.load(student)
        table = sensitivity(weights, [layer.name for layer in problem.layers], pool, asked, curvature)
        made = [trial for rise in RISES
                for trial in sweep(table, pool, asked, tolerated(table, replace(asked, tolerance=rise)), 0, Path())]
    return [Setting(f"{method}, searched", f"{trial.widths}", table.candidate(trial.widths))
            for trial in pareto(made)]


def point(problem: Problem, config: Config, student: Student, setting: Setting, refit_steps: int) -> Point:
    """The whole file of a setting."""
    candidate = copy.deepcopy(student)
    # No steps: the levels as they are placed.
    layers = refit_levels(Objective(problem, config.refit, candidate.weights[0].device), candidate, setting.choices,
                          refit_steps, config.quantization.learning_rate, config.refit.relative,
                          torch_generator(0, "levels"))
    biases = round_biases(problem, candidate, 0.01)
    found = (len(codec.encode([*layers, *biases], {}, "student")),
             mean_divergence(problem, candidate.module, problem.held_out))
    print(f"{setting.method}, {setting.name}, {refit_steps} steps: {found[0]} bytes, divergence {found[1]:.5f}",
          flush=True)
    return found


def peer_points(problem: Problem, student: Student, path: Path) -> list[Point]:
    """What nncodec_peer.py wrote."""
    module, result = copy.deepcopy(student.module), []
    with np.load(path) as file:
        names = list(module.state_dict())
        for index, size in enumerate(file["bytes"]):
            module.load_state_dict({name: torch.from_numpy(file[f"{index}/{name}"]) for name in names})
            result.append((int(size), mean_divergence(problem, module, problem.held_out)))
    return result


def bytes_at(found: list[Point], divergence: float) -> float | None:
    """Bytes for a divergence along the points that none of them beats; None outside their range."""
    front: list[Point] = []
    for size, value in sorted(found):
        if not front or value < front[-1][1]:
            front.append((size, value))
    sizes, values = np.log(np.array(front, np.float64)[::-1]).T
    if not values[0] <= np.log(divergence) <= values[-1]:
        return None
    return round(float(np.exp(np.interp(np.log(divergence), values, sizes))))


def main() -> None:
    """Prepare, or compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--final-steps", type=int, default=6000)
    parser.add_argument("--refit-steps", type=int, default=1000)
    parser.add_argument("--prepare", type=Path, help="prune, and write the student here")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--trials", type=int, default=0, help="of each search of widths by layer; 0: none")
    parser.add_argument("--methods", nargs="*", choices=RATES, default=list(RATES))
    parser.add_argument("--multiples", type=float, nargs="*", default=MULTIPLES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--nncodec", type=Path, nargs="*", default=[], help="what nncodec_peer.py wrote")
    arguments = parser.parse_args()
    config = configured(arguments)
    problem = build_problem(config.problem, 0)
    with threads(arguments.threads):
        if arguments.prepare:
            student = prune(problem, config)
            write(arguments.prepare, student)
            with build_pool(problem, config.pool, student) as pool:
                tidy(student, find_units(problem.teacher, problem.calibration[:PROBE], pool.hidden()))
            write(arguments.prepare.with_stem(f"{arguments.prepare.stem}-ordered"), student)
            return
        student = restored(problem, arguments.student)
        base = mean_divergence(problem, student.module, problem.held_out)
        print(f"pruned: divergence {base:.5f}", flush=True)
        asked = [setting for method in arguments.methods
                 for setting in settings(problem, config, student, method, arguments.trials)]
        found: dict[str, list[Point]] = {}
        for setting in asked:
            found.setdefault(setting.method, []).append(point(problem, config, student, setting, 0))
            if arguments.refit_steps:
                found.setdefault(f"{setting.method}, refitted", []).append(
                    point(problem, config, student, setting, arguments.refit_steps))
        for path in arguments.nncodec:
            found[path.stem] = peer_points(problem, student, path)
    print(json.dumps({"pruned_divergence": base, "bytes": {
        f"{multiple:g}": {method: bytes_at(rows, multiple * base) for method, rows in found.items()}
        for multiple in arguments.multiples}}))


if __name__ == "__main__":
    main()
