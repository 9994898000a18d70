"""The evaluation engine against naive direct evaluation, layer by layer, in one process on the same threads.

Naive: copy the layer's weight, zero, run the whole network on every calibration batch, undo. Both sides go through
the same batches and evaluate the same candidates, random sets of 0.5 % of the layer. The engine's rate is that of a
generation's later candidates; `speedup_cold_mean` makes each layer's candidates pay for a forward pass that fills the
cache as well, as the first of a cycle do. With one thread times are the processor's, so that other work on the machine
counts for less. The last line is one JSON object.

    python tests/benchmarks/bench_evaluation.py --problem lenet5_mnist --candidates 16
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from de_ray.config import DETECTORS
from de_ray.device import threads
from de_ray.evaluation.operations import weighted_op
from de_ray.evaluation.replica import Replica, ReplicaSetup
from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.problem.custom import problem_from_model
from de_ray.schema import compose

SHARE = 0.005
"""Of a layer's weights, what a candidate zeroes."""
SCREENED, KEPT = 0.25, 0.5
"""Racing as the search does it: share of the batches that all candidates see, share of the candidates that see all."""
SECONDS = 0.5
"""Least time of a measurement."""


def resnet18() -> Problem:
    """A network of ResNet-18's shape with random weights and inputs of 64 x 64 pixels."""
    from torchvision.models import resnet18 as build

    torch.manual_seed(0)
    model = build(num_classes=100).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return problem_from_model(model, torch.randn(80, 3, 64, 64))


def load(name: str, overrides: list[str]) -> tuple[Problem, int]:
    """A problem and its calibration inputs a pass."""
    if name == "resnet18":
        return resnet18(), 32
    few = ["problem.calibration_size=16", "problem.inputs_size=16", "pool.batch=4"] if name in DETECTORS else []
    config = compose([f"problem={name}", *few, *overrides])
    return build_problem(config.problem, seed=0), config.pool.batch


def random_sets(problem: Problem, layer: int, count: int) -> list[Candidate]:
    """Candidates of one layer."""
    rng = np.random.default_rng(layer)
    size = problem.layers[layer].size
    return [(ZeroingSet(layer, np.sort(rng.choice(size, math.ceil(SHARE * size), replace=False))),)
            for _ in range(count)]


@torch.inference_mode()
def naive(replica: Replica, candidates: list[Candidate], batches: list[int]) -> np.ndarray:
    """Fitness by a full forward pass for each candidate and batch."""
    found = []
    for (change,) in candidates:
        weight = replica.student.weights[change.layer].data
        former = weight.clone()
        weight.view(-1)[torch.from_numpy(change.zero)] = 0
        total = sum(float(replica.divergence(replica.teacher_outputs[b], replica.student.module(replica.batches[b]))
                          .double().sum()) for b in batches)
        weight.copy_(former)
        found.append(total / sum(len(replica.batches[b]) for b in batches))
    return np.array(found)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the mean over `SECONDS`, after a first one that is not counted."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    started, calls = clock(), 0
    while calls == 0 or clock() - started < SECONDS:
        work()
        calls += 1
    return (clock() - started) / calls


def race(evaluate: Callable, candidates: list[Candidate], batches: list[int]) -> int:
    """The winner when all candidates see some batches and the best of them see them all."""
    some = batches[:max(1, round(SCREENED * len(batches)))]
    first = evaluate(candidates, some)
    finalists = np.argsort(first)[:max(1, round(KEPT * len(candidates)))]
    fitness = evaluate([candidates[k] for k in finalists], batches)
    return int(finalists[np.argmin(fitness)])


def needed_flops(replica: Replica, layer: int) -> float:
    """Floating-point operations of one candidate's suffix: the sparse correction and every layer below."""
    runner = replica._runner
    suffix, total = runner.suffix((layer,)), 0.0
    for samples in map(len, replica.batches):
        for node in suffix.plan:
            op = weighted_op(node)
            if op is not None:
                each = suffix.splits[node].products if node in suffix.splits else fan_in(op)
                products = runner.program.floats(node, samples) * each
                total += 2 * products * (SHARE if node in suffix.ops else 1)
    return total


def fan_in(op) -> int:
    """Products that an output of the operation sums."""
    return math.prod(op.weight.meta["val"].shape[1:])


def gemm_peak() -> float:
    """Floating-point operations a second of a large float32 product on these threads."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    return 2 * 1536**3 / min(seconds(lambda: a @ b) for _ in range(3))


def measure_layer(problem: Problem, replica: Replica, layer: int, count: int) -> dict:
    """Rates of both sides, and how far their numbers are apart."""
    batches = list(range(len(replica.batches)))
    candidates = random_sets(problem, layer, count)
    few = candidates[:2]
    expected = naive(replica, candidates, batches)
    found = replica.evaluate(candidates, batches)
    naive_seconds = seconds(lambda: naive(replica, few, batches)) / len(few)
    engine_seconds = seconds(lambda: replica.evaluate(candidates, batches)) / count

    def cold() -> None:
        replica._runner.refitted()
        replica.evaluate(candidates, batches)

    cold_seconds = seconds(cold) / count
    raced_seconds = seconds(lambda: race(replica.evaluate, candidates, batches))
    winner = race(replica.evaluate, candidates, batches)
    return {"name": problem.layers[layer].name, "naive_per_s": 1 / naive_seconds, "engine_per_s": 1 / engine_seconds,
            "speedup": naive_seconds / engine_seconds, "speedup_cold": naive_seconds / cold_seconds,
            "speedup_raced": naive_seconds * count / raced_seconds, "same_winner": bool(winner == np.argmin(expected)),
            "same_ranks": bool((np.argsort(expected) == np.argsort(found)).all()),
            "max_rel_diff": float(np.max(np.abs(found - expected) / expected)),
            "flops": needed_flops(replica, layer), "seconds": engine_seconds, "weights": problem.layers[layer].size}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist", help="a problem of conf/problem, or resnet18")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--layers", nargs="*", help="of these names alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--override", nargs="*", default=[], help="of the problem's configuration and of pool.batch")
    arguments = parser.parse_args()
    if arguments.override and arguments.problem == "resnet18":
        parser.error("--override: resnet18 has no configuration")
    problem, batch = load(arguments.problem, arguments.override)
    with threads(arguments.threads):
        replica = Replica(ReplicaSetup(problem, batch, "cpu", arguments.threads))
        peak = gemm_peak()
        layers = []
        for layer in range(len(problem.layers)):
            if arguments.layers and problem.layers[layer].name not in arguments.layers:
                continue
            row = measure_layer(problem, replica, layer, arguments.candidates)
            layers.append(row)
            print(json.dumps(row), flush=True)
    weights = np.array([row["weights"] for row in layers], float)
    speedups = np.array([row["speedup"] for row in layers])
    print(json.dumps({
        "problem": arguments.problem, "candidates": arguments.candidates, "threads": arguments.threads,
        "layers": [{key: row[key] for key in ("name", "naive_per_s", "engine_per_s", "speedup")} for row in layers],
        "speedup_mean": float(speedups.mean()), "speedup_by_parameters": float(np.average(speedups, weights=weights)),
        "speedup_cold_mean": float(np.mean([row["speedup_cold"] for row in layers])),
        "speedup_raced_mean": float(np.mean([row["speedup_raced"] for row in layers])),
        "speedup_raced_by_parameters": float(np.average([row["speedup_raced"] for row in layers], weights=weights)),
        "same_winner": float(np.mean([row["same_winner"] for row in layers])),
        "same_ranks": float(np.mean([row["same_ranks"] for row in layers])),
        "max_rel_diff": max(row["max_rel_diff"] for row in layers),
        "gemm_fraction": sum(row["flops"] for row in layers) / sum(row["seconds"] for row in layers) / peak,
        "gemm_peak_gflops": peak / 1e9, "peak_mb": replica.peak_mb()}))


if __name__ == "__main__":
    main()
