"""How the pool scales: actors against actors on this machine, and how many candidates one driver can keep going.

1. The same generations on 1 and on 2 single-thread actors; efficiency is the ratio of their rates over 2.
2. The driver alone: replicas that answer at once, generations of `DirectedSearch` dispatched, gathered and bred. The
   problem is a layer stack late in its schedule, where 1,000 actors of 200 ms a candidate would need 5,000 a second.
Bytes on the wire are those of a task's pickled candidates. The last line is one JSON object.

    python tests/benchmarks/bench_scaling.py --problem lenet5_mnist
"""

import argparse
import json
import time

import numpy as np
import ray
import torch
from ray import cloudpickle

from de_ray.cluster.join import ensure_ray
from de_ray.config import EvolutionConfig, PoolConfig
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.parcel import Parcel
from de_ray.evaluation.ray_pool import RayPool
from de_ray.evaluation.replica import ReplicaSetup
from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from de_ray.student import Student

SHARE = 0.02
"""Of every layer's weights, what a candidate zeroes."""


class Instant:
    """A replica that answers at once."""

    def __init__(self, setup: ReplicaSetup) -> None:
        """Build nothing."""

    def evaluate(self, candidates: list[Candidate], batches: list[int], screening: bool = False) -> np.ndarray:
        """Some number that differs from candidate to candidate."""
        return np.array([float(candidate[0].zero[:16].sum() % 1000) for candidate in candidates])


def random_candidates(problem: Problem, count: int) -> list[Candidate]:
    """Candidates of all layers."""
    rng = np.random.default_rng(0)
    return [tuple(ZeroingSet(layer, np.sort(rng.choice(one.size, max(1, int(SHARE * one.size)), replace=False)))
                  for layer, one in enumerate(problem.layers)) for _ in range(count)]


def rate(problem: Problem, actors: int, count: int, seconds: float) -> float:
    """Candidates a second on actors."""
    candidates = random_candidates(problem, count)
    with build_pool(problem, PoolConfig(actors=actors), Student(problem.teacher, problem.layers)) as pool:
        everything = range(pool.batches)
        # Every actor must have started and filled its cache before the clock does.
        for _ in range(3):
            pool.evaluate(candidates, everything)
        while len(pool.actors) < actors:
            pool.evaluate(candidates, everything)
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            pool.evaluate(candidates, everything)
            done += count
        return done / (time.perf_counter() - started)


def driver(population: int, generations: int, weights: int, density: float, seconds: float, stack: int) -> dict:
    """Candidates a second that one driver dispatches, gathers and breeds, and where its time goes."""
    rng = np.random.default_rng(0)
    sizes = [weights * 7 // 8, weights // 8]
    masks = [rng.random(size) < density for size in sizes]
    saliency = {name: [rng.random(size).astype(np.float32) for size in sizes] for name in ("fisher", "magnitude")}
    survivors = sum(int(mask.sum()) for mask in masks)
    budget = Budget(np.zeros(2, bool), np.zeros(2, np.int64), survivors // 20)
    config = EvolutionConfig(population=population, generations=generations)
    problem = build_problem(compose(["problem=digits"]).problem, seed=0)
    setup = ReplicaSetup(problem, 256, "cpu", 1)
    spent = {"dispatched and gathered": 0.0, "bred": 0.0}
    evaluated = sent = 0
    with RayPool(setup, PoolConfig(actors=2, stack=stack), Student(problem.teacher, problem.layers), Instant) as pool:
        pool.evaluate([(ZeroingSet(0, np.arange(1)),)], [0])
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            space = SearchSpace(saliency, masks, budget, config.regrow)
            search = DirectedSearch(space, config, 8, np.random.default_rng(evaluated))
            with pool.dispatch() as dispatch:
                while not search.over:
                    before = time.perf_counter()
                    for request in iter(search.ask, None):
                        dispatch.submit(request)
                    request, fitness = dispatch.next()
                    spent["dispatched and gathered"] += time.perf_counter() - before
                    search.tell(request, fitness)
                    evaluated += len(request.candidates)
            last = request.candidates
            sent = len(cloudpickle.dumps(Parcel(last[:stack]))) / len(last[:stack])
        total = time.perf_counter() - started
    spent["bred"] = total - spent["dispatched and gathered"]
    return {"stack": stack, "population": population, "weights": weights, "survivors": survivors,
            "zeroed_a_candidate": survivors // 20, "candidates_per_s": evaluated / total,
            "microseconds": {k: 1e6 * v / evaluated for k, v in spent.items()}, "bytes_a_candidate": sent}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet5_mnist")
    parser.add_argument("--candidates", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--population", type=int, default=1024)
    parser.add_argument("--weights", type=int, default=100_000)
    parser.add_argument("--density", type=float, default=0.05)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ensure_ray()
    problem = build_problem(compose([f"problem={arguments.problem}"]).problem, seed=0)
    rates = {actors: rate(problem, actors, arguments.candidates, arguments.seconds) for actors in (1, 2)}
    print(rates, flush=True)
    found = [driver(arguments.population, 4, arguments.weights, arguments.density, arguments.seconds, stack)
             for stack in (8, 32)]
    ray.shutdown()
    wire = len(cloudpickle.dumps(Parcel(random_candidates(problem, 8)))) / 8
    print(json.dumps({"problem": arguments.problem, "per_s": rates, "efficiency": rates[2] / (2 * rates[1]),
                      "bytes_a_candidate": wire, "driver": found}))


if __name__ == "__main__":
    main()
