"""Where the time of one real cycle goes, at the start of a run and late in it.

The student is pruned by magnitude to a sparsity, then goes through a cycle of `evolution=directed`: saliencies,
breeding, evaluation, refit, and the measurement that ends a cycle. The last line is one JSON object, in seconds.

    python tests/benchmarks/bench_cycle.py --problem lenet5_mnist --sparsity 0 0.95
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from de_ray.config import Config
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evolution.candidate import Candidate, ZeroingSet
from de_ray.evolution.saliency import saliencies
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolve import saliency_inputs, settled
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.refit.build import build_refit
from de_ray.schema import compose
from de_ray.seeds import numpy_generator, torch_generator
from de_ray.student import Student

CUT = 0.1
"""Of the survivors, what the cycle zeroes."""


def magnitude_set(student: Student, sparsity: float) -> Candidate:
    """The candidate that zeroes the smallest weights of all layers."""
    everything = torch.cat([weight.abs().flatten() for weight in student.weights])
    count = round(sparsity * len(everything))
    if count == 0:
        return ()
    threshold = everything.kthvalue(count).values
    return tuple(ZeroingSet(layer, np.flatnonzero((weight.abs() <= threshold).flatten().numpy()))
                 for layer, weight in enumerate(student.weights))


def cycle(problem: Problem, config: Config, sparsity: float) -> dict:
    """Seconds of a cycle by part."""
    spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name] += time.perf_counter() - started

    student = Student(problem.teacher, problem.layers)
    with build_pool(problem, config.pool, student) as pool:
        refit = build_refit(student, problem, config.refit)
        start = magnitude_set(student, sparsity)
        student.commit(start)
        pool.commit(start)
        refit.after_cycle(torch_generator(0, "warm"))  # compiles, and makes the student a sensible one
        pool.refresh(student)
        pool.evaluate([()], range(pool.batches))
        with part("saliencies"):
            scores = saliencies(settled(config).criteria, saliency_inputs(problem, config, student, 0))
        evaluated = 0.0
        with part("breeding"):
            masks = [mask.flatten().numpy() for mask in student.masks]
            layers = len(masks)
            budget = Budget(np.zeros(layers, bool), np.zeros(layers, np.int64), round(CUT * student.survivors))
            search = DirectedSearch(SearchSpace(scores, masks, budget, config.evolution.regrow), config.evolution,
                                    pool.batches, numpy_generator(0, "search"))
        while (request := search.ask()) is not None:
            with part("evaluation"):
                fitness = pool.evaluate(request.candidates, request.batches, request.screening)
            evaluated += len(request.candidates) * len(request.batches) / pool.batches
            with part("breeding"):
                search.tell(request, fitness)
        best, _ = search.best()
        student.commit(best)
        pool.commit(best)
        with part("refit"):
            refit.after_cycle(torch_generator(0, "refit"))
        with part("measurement"):
            pool.refresh(student)
            pool.evaluate([()], range(pool.batches))
    return {"sparsity": sparsity, "evaluations_on_all_batches": evaluated, "refit_steps": config.refit.steps, **spent}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet5_mnist")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.95])
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    config = compose([f"problem={arguments.problem}", "pool=serial", "threads=1", f"refit.steps={arguments.steps}"])
    problem = build_problem(config.problem, seed=0)
    with threads(config.threads):
        found = [cycle(problem, config, sparsity) for sparsity in arguments.sparsity]
    print(json.dumps({"problem": arguments.problem, "cycles": found}))


if __name__ == "__main__":
    main()
