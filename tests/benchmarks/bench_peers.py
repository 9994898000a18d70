"""The same candidates and objective through EvoTorch's `Problem`, for the same wall-clock, with 1 and 2 actors.

A user of EvoTorch writes an objective that decodes a solution into a zeroing set, zeroes a copy of the weight, runs the
network on the calibration inputs and returns the divergence; EvoTorch spreads solutions over Ray actors. The pool gets
exactly these candidates. Fitness is compared first: both must compute the same thing. The last line is one JSON object.

    pip install -e '.[bench]'
    python tests/benchmarks/bench_peers.py --problem lenet5_mnist --seconds 20
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import numpy as np
import ray
import torch
from evotorch import Problem as PeerProblem
from evotorch import SolutionBatch

from de_ray.cluster.join import ensure_ray
from de_ray.config import PoolConfig
from de_ray.evaluation.build import build_pool
from de_ray.evolution.candidate import ZeroingSet
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from de_ray.student import Student

SHARE = 0.005
"""Of a layer's weights, what a candidate zeroes."""


class Zeroing(PeerProblem):
    """Solutions are [layer, seed of the set]: as small on the wire as a solution can be."""

    def __init__(self, problem: Problem, actors: int) -> None:
        self._calibration = problem.calibration.split(PoolConfig().batch)
        self._divergence = problem.divergence
        self._layers = problem.layers
        self._model = problem.teacher
        self._reference = None
        super().__init__("min", solution_length=2, initial_bounds=(0, 1), dtype=torch.float32,
                         num_actors=actors if actors > 1 else None)

    @torch.inference_mode()
    def _evaluate_batch(self, solutions: SolutionBatch) -> None:
        torch.set_num_threads(1)
        if self._reference is None:
            self._reference = [self._model(batch) for batch in self._calibration]
        fitness = [self._fitness(*map(int, values)) for values in solutions.values]
        solutions.set_evals(torch.tensor(fitness))

    def _fitness(self, layer: int, seed: int) -> float:
        weight = self._model.get_submodule(self._layers[layer].name).weight.data
        former = weight.clone()
        weight.view(-1)[torch.from_numpy(members(self._layers[layer].size, layer, seed))] = 0
        total = sum(float(self._divergence(reference, self._model(batch)).double().sum())
                    for reference, batch in zip(self._reference, self._calibration, strict=True))
        weight.copy_(former)
        return total / sum(map(len, self._calibration))


def members(size: int, layer: int, seed: int) -> np.ndarray:
    """The set that a solution stands for."""
    rng = np.random.default_rng((layer, seed))
    return np.sort(rng.choice(size, math.ceil(SHARE * size), replace=False))


def rate(evaluate: Callable[[np.ndarray], np.ndarray], solutions: np.ndarray, seconds: float) -> float:
    """Evaluations a second over a span of wall-clock, in generations of all solutions."""
    evaluate(solutions)  # actors start, caches fill
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        evaluate(solutions)
        done += len(solutions)
    return done / (time.perf_counter() - started)


def peer(problem: Problem, actors: int) -> Callable[[np.ndarray], np.ndarray]:
    """EvoTorch's evaluation of solutions."""
    found = Zeroing(problem, actors)

    def evaluate(solutions: np.ndarray) -> np.ndarray:
        batch = SolutionBatch(found, len(solutions), empty=True)
        batch.set_values(torch.from_numpy(solutions))
        found.evaluate(batch)
        return batch.evals[:, 0].numpy()

    return evaluate


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist")
    parser.add_argument("--candidates", type=int, default=128, help="of each layer, in a generation")
    parser.add_argument("--stack", type=int, default=32, help="pool.stack; these candidates take milliseconds")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ensure_ray()
    problem = build_problem(compose([f"problem={arguments.problem}"]).problem, seed=0)
    problem.teacher.requires_grad_(False)
    solutions = np.array([(layer, seed) for layer in range(len(problem.layers))
                          for seed in range(arguments.candidates)], np.float32)
    candidates = [(ZeroingSet(int(layer), members(problem.layers[int(layer)].size, int(layer), int(seed))),)
                  for layer, seed in solutions]
    rows = []
    everything = range(len(problem.calibration.split(PoolConfig().batch)))
    for actors in arguments.actors:
        config = PoolConfig(actors=actors, stack=arguments.stack)
        with build_pool(problem, config, Student(problem.teacher, problem.layers)) as pool:
            ours = pool.evaluate(candidates, everything)
            mine = rate(lambda _, pool=pool: pool.evaluate(candidates, everything), solutions, arguments.seconds)
        evaluate = peer(problem, actors)
        theirs = evaluate(solutions)
        other = rate(evaluate, solutions, arguments.seconds)
        rows.append({"actors": actors, "de_ray_per_s": mine, "evotorch_per_s": other, "speedup": mine / other,
                     "max_rel_diff": float(np.max(np.abs(ours - theirs) / theirs))})
        print(rows[-1], flush=True)
    ray.shutdown()
    print(json.dumps({"problem": arguments.problem, "candidates": len(candidates), "seconds": arguments.seconds,
                      "rows": rows, "speedup": min(row["speedup"] for row in rows)}))


if __name__ == "__main__":
    main()
