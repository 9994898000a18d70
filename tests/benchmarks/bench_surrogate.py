"""How well curvature ranks zeroing sets that are then evaluated: rank correlations by layer, and over all layers.

The student is the teacher, or one that `--cycles` of evolution without generations have pruned and refitted. Sets are
drawn around each criterion's own as the search's first generation is, in one layer at a time and in all at once. The
last line is one JSON object.

    python tests/benchmarks/bench_surrogate.py --problem lenet300_mnist --zero 0.1
"""

import argparse
import dataclasses
import json
import time

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.pool import Pool
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.curvature import SaliencyInputs
from de_ray.evolution.saliency import saliencies
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import DiagonalSurrogate, KroneckerSurrogate, rank_correlation
from de_ray.evolve import evolve, saliency_inputs
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from de_ray.student import Student

PROPOSERS = ("fisher", "magnitude")


def drawn(given: SaliencyInputs, scores: dict, budget: Budget, config: EvolutionConfig, seed: int) -> list[Candidate]:
    """A first generation of the search."""
    masks = [mask.flatten().numpy() for mask in given.student.masks]
    return DirectedSearch(SearchSpace(scores, masks, budget, config.regrow), config, 4,
                          np.random.default_rng(seed)).ask().candidates


def correlations(candidates: list[Candidate], surrogates: dict, pool: Pool) -> dict[str, float]:
    """Of each surrogate with evaluation on all batches."""
    exact = pool.evaluate(candidates, range(pool.batches))
    return {name: round(rank_correlation(estimate(candidates), exact), 3) for name, estimate in surrogates.items()}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist")
    parser.add_argument("--zero", type=float, default=0.1, help="share of the survivors that a set zeroes")
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--cycles", type=int, default=0, help="of pruning before, each of 100 steps of refit")
    parser.add_argument("--sparsity", type=float, default=0.9, help="that those cycles reach")
    parser.add_argument("override", nargs="*")
    arguments = parser.parse_args()
    config = compose([f"problem={arguments.problem}", "evolution=fisher", f"evolution.sparsity={arguments.sparsity}",
                      f"evolution.cycles={max(1, arguments.cycles)}", "refit.final_steps=0", "pool=serial", "threads=1",
                      *arguments.override])
    problem = build_problem(config.problem, config.seed)
    student = Student(problem.teacher, problem.layers)
    search = dataclasses.replace(config.evolution, criteria=list(PROPOSERS), population=arguments.candidates,
                                 generations=1)
    with threads(config.threads), build_pool(problem, config.pool, student) as pool:
        if arguments.cycles:
            evolve(problem, config, student, pool, None, {}, lambda record, total: None)
            pool.refresh(student)
        given = saliency_inputs(problem, config, student, arguments.cycles)
        scores = saliencies(PROPOSERS, given)
        started = time.process_time()
        surrogates = {"fisher": DiagonalSurrogate(scores["fisher"]), "magnitude": DiagonalSurrogate(
            [score ** 2 for score in scores["magnitude"]]), "kronecker": KroneckerSurrogate(given)}
        prepared = time.process_time() - started
        survivors = np.array([int(mask.sum()) for mask in student.masks])
        zeros, layers, found = (survivors * arguments.zero).astype(np.int64), len(survivors), []
        for layer, name in enumerate(one.name for one in problem.layers):
            alone = Budget(np.ones(layers, bool), np.where(np.arange(layers) == layer, zeros, 0), 0)
            found.append({"name": name, **correlations(drawn(given, scores, alone, search, layer), surrogates, pool)})
            print(found[-1], flush=True)
        together = drawn(given, scores, Budget(np.zeros(layers, bool), np.zeros(layers, np.int64), int(zeros.sum())),
                         search, layers)
        started = time.process_time()
        surrogates["kronecker"](together)
        estimated = time.process_time() - started
        started = time.process_time()
        pool.evaluate(together, range(pool.batches))
        evaluated = time.process_time() - started
        whole = correlations(together, surrogates, pool)
    print(json.dumps({"problem": arguments.problem, "sparsity": round(student.sparsity, 4), "zero": arguments.zero,
                      "candidates": arguments.candidates, "layers": found, "all_layers": whole,
                      "prepare_s": round(prepared, 3), "estimate_ms": round(1e3 * estimated / len(together), 3),
                      "evaluate_ms": round(1e3 * evaluated / len(together), 3)}))


if __name__ == "__main__":
    main()
