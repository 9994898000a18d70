"""Directed evolution against each baseline at equal sparsity: once at equal refit, once at equal wall-clock.

Every method prunes and refits the same teacher on the same inputs, in one process. At equal wall-clock a baseline's
distillation steps, or its cycles where there is no refit, are stretched until it takes as long as directed evolution
did; clocks count the processor time of the one thread, so that other work on the machine does not count. The last line
is one JSON object; divergences and metrics are of held-out inputs, medians over the seeds, before quantization.
`uniform` is the paper's bare method: evolution, with proposals that know nothing of the weights.

    python tests/benchmarks/bench_search.py --problem lenet300_mnist --sparsity 0.98 --seeds 0 1 2
    python tests/benchmarks/bench_search.py --problem lenet5_mnist --sparsity 0.9 --cycles 20 --refit none
    python tests/benchmarks/bench_search.py --problem lenet5_mnist --sparsity 0.95 --cycles 20 --refit least_squares
"""

import argparse
import dataclasses
import json
import statistics
import time

from de_ray.config import Config
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evolve import evolve
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.problem.measure import measure
from de_ray.schema import compose
from de_ray.student import Student

BASELINES = ("random", "uniform", "magnitude", "wanda", "obs", "kronecker", "fisher", "taylor")


def prune(problem: Problem, config: Config) -> dict:
    """Evolve one student; what it measured, and how long it took."""
    with threads(config.threads):
        student = Student(problem.teacher, problem.layers)
        with build_pool(problem, config.pool, student) as pool:
            started = time.process_time()
            evolve(problem, config, student, pool, None, {}, lambda record, total: None)
            seconds = time.process_time() - started
        found = measure(problem, student.module)
    return {"divergence": found["divergence"]["held_out"], "seconds": seconds, "cycles": config.evolution.cycles,
            "steps": config.refit.steps, "final_steps": config.refit.final_steps, **found["metrics"]}


def stretched(config: Config, factor: float) -> Config:
    """The same configuration with more distillation steps, or more cycles where there are none."""
    if config.refit.method != "distill" or config.refit.steps == config.refit.final_steps == 0:
        evolution = dataclasses.replace(config.evolution, cycles=round(config.evolution.cycles * factor))
        return dataclasses.replace(config, evolution=evolution)
    refit = dataclasses.replace(config.refit, steps=round(config.refit.steps * factor),
                                final_steps=round(config.refit.final_steps * factor))
    return dataclasses.replace(config, refit=refit)


def compare(arguments: argparse.Namespace, seed: int) -> dict[str, dict]:
    """All methods for a seed."""
    def configured(method: str) -> Config:
        return compose([f"problem={arguments.problem}", "threads=1", f"evolution={method}",
                        f"evolution.sparsity={arguments.sparsity}", f"evolution.cycles={arguments.cycles}",
                        f"refit.steps={arguments.steps}", f"refit.final_steps={arguments.final_steps}",
                        f"refit={arguments.refit}", "refit.relative=false", "refit.backoff=false",
                        "refit.learning_rate=2e-3", "pool=serial", f"seed={seed}", *arguments.override])

    problem = build_problem(configured("directed").problem, seed)
    found: dict[str, dict] = {}

    def note(name: str, config: Config) -> None:
        found[name] = prune(problem, config)
        print(f"seed {seed} {name}: {json.dumps(found[name])}", flush=True)

    note("directed", configured("directed"))
    for method in arguments.methods:
        note(method, configured(method))
        factor = found["directed"]["seconds"] / found[method]["seconds"]
        if factor > 1:
            note(f"{method}, equal wall-clock", stretched(configured(method), factor))
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--refit", default="distill", choices=("distill", "least_squares", "obs", "none"))
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--final-steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--override", nargs="+", default=[], help="of every method's configuration")
    arguments = parser.parse_args()
    rows = [compare(arguments, seed) for seed in arguments.seeds]
    names = list(dict.fromkeys(name for found in rows for name in found))
    medians = {name: {key: statistics.median(found[name][key] for found in rows if name in found)
                      for key in rows[0]["directed"]} for name in names}
    best = min(row["divergence"] for name, row in medians.items() if name != "directed")
    print(json.dumps({"problem": arguments.problem, "sparsity": arguments.sparsity, "refit": arguments.refit,
                      "seeds": arguments.seeds, "methods": medians,
                      "directed_over_best_baseline": medians["directed"]["divergence"] / best}))


if __name__ == "__main__":
    main()
