"""Bytes of whole files at equal held-out divergence: ECSQ with curvature, k-means codebooks, NNCodec.

    python tests/benchmarks/bench_quantizers.py --prepare student.npz
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --state student.npz --out nncodec.npz
    nncodec/bin/python tests/benchmarks/nncodec_peer.py --state student-ordered.npz --out nncodec-ordered.npz
    python tests/benchmarks/bench_quantizers.py --student student-ordered.npz --nncodec nncodec.npz nncodec-ordered.npz

`--prepare` writes the student with its units as they are numbered, and in the order that files have them in. One
pruned student is quantized at several rates by every method. `ecsq` places entropy-constrained levels weighted by the
divergence's curvature; `kmeans` places exact one-dimensional k-means levels, all weights alike; both files are written
by the same coder, with the same biases, once with the levels as placed and once after equal distillation of them
(`refitted`). NNCodec's are its own quantizer's and coder's. Of each method's points those count that no other of
it beats in both; between them bytes are interpolated, logarithm over logarithm. The last line is one JSON object: for
each divergence, in multiples of the pruned student's, bytes by method.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch

from de_ray import codec
from de_ray.config import Config, QuantizationConfig
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.capture import PROBE
from de_ray.evolution.curvature import fisher_diagonal
from de_ray.evolve import evolve, saliency_inputs
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.problem.measure import mean_divergence
from de_ray.quantization.biases import quantize_biases
from de_ray.quantization.choose import choose
from de_ray.quantization.refit import refit_levels
from de_ray.refit.objective import Objective
from de_ray.schema import compose
from de_ray.seeds import torch_generator
from de_ray.student import Student
from de_ray.units import find_units, tidy

Point = tuple[int, float]
"""Bytes, held-out divergence."""
MULTIPLES = (1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
RATES = {"ecsq": [(bits, weight) for bits in (3, 4, 5) for weight in (0.5, 1.0, 2.0, 4.0)],
         "kmeans": [(bits, 0.0) for bits in (1, 2, 3, 4, 5, 6)]}
"""Width and rate weight."""


def configured(arguments: argparse.Namespace) -> Config:
    """Fisher pruning in 40 cycles."""
    return compose([f"problem={arguments.problem}", "evolution=fisher", f"evolution.sparsity={arguments.sparsity}",
                    "evolution.cycles=40", "refit.steps=150", f"refit.final_steps={arguments.final_steps}",
                    "refit.relative=false", "refit.backoff=false", "refit.learning_rate=2e-3", "pool=serial"])


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
    """The student that `--prepare` wrote."""
    student = Student(problem.teacher, problem.layers)
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


def points(problem: Problem, config: Config, student: Student, placement: str, refit_steps: int) -> list[Point]:
    """Whole files at every rate of a placement."""
    curvature: list = [None] * len(student.weights)
    if placement == "ecsq":
        with torch.enable_grad():
            found = fisher_diagonal(saliency_inputs(problem, config, student, -1))
        # As in quantize.py: survivors that calibration never excites still count a little.
        curvature = [(c + c[mask].mean() * 1e-2).numpy() for c, mask in zip(found, student.masks, strict=True)]
    result = []
    for bits, rate_weight in RATES[placement]:
        quantization = QuantizationConfig(bits=bits, placement="lloyd" if placement == "kmeans" else placement,
                                          rate_weight=rate_weight, row_scales="never")
        candidate = copy.deepcopy(student)
        choices = tuple(choose(index, weight.detach().numpy(), bits, quantization, curvature[index])
                        for index, weight in enumerate(candidate.weights))
        # No steps: the levels as they are placed.
        layers = refit_levels(Objective(problem, config.refit, candidate.weights[0].device), candidate, choices,
                              refit_steps, 2e-4, config.refit.relative, torch_generator(0, "levels"))
        biases = round_biases(problem, candidate, 0.01)
        size = len(codec.encode([*layers, *biases], {}, "student"))
        result.append((size, mean_divergence(problem, candidate.module, problem.held_out)))
        print(f"{placement}, {bits} bits, rate weight {rate_weight:g}, {refit_steps} steps: {size} bytes, divergence "
              f"{result[-1][1]:.5f}", flush=True)
    return result


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
    parser.add_argument("--nncodec", type=Path, nargs="*", default=[], help="what nncodec_peer.py wrote")
    arguments = parser.parse_args()
    config = configured(arguments)
    problem = build_problem(config.problem, 0)
    with threads(1):
        if arguments.prepare:
            student = prune(problem, config)
            write(arguments.prepare, student)
            with build_pool(problem, config.pool, student) as pool:
                tidy(student, find_units(problem.teacher, problem.calibration[:PROBE], pool.hidden()))
            write(arguments.prepare.with_stem(f"{arguments.prepare.stem}-ordered"), student)
            return
        student = restored(problem, arguments.student)
        base = mean_divergence(problem, student.module, problem.held_out)
        found = {"ecsq": points(problem, config, student, "ecsq", 0),
                 "kmeans": points(problem, config, student, "kmeans", 0)}
        for path in arguments.nncodec:
            found[path.stem] = peer_points(problem, student, path)
        if arguments.refit_steps:
            for placement in ("ecsq", "kmeans"):
                found[f"{placement}, refitted"] = points(problem, config, student, placement, arguments.refit_steps)
    print(json.dumps({"pruned_divergence": base, "bytes": {
        f"{multiple:g}": {method: bytes_at(rows, multiple * base) for method, rows in found.items()}
        for multiple in MULTIPLES}}))


if __name__ == "__main__":
    main()
