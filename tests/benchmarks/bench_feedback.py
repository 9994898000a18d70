"""Levels assigned with and without error feedback: held-out divergence and file bytes of one pruned student.

The last line is one JSON object.

    python tests/benchmarks/bench_feedback.py --problem lenet300_mnist --sparsity 0.95
"""

import argparse
import dataclasses
import json

from de_ray import codec
from de_ray.device import threads
from de_ray.evaluation.build import build_pool
from de_ray.evolve import evolve
from de_ray.problem.build import build_problem
from de_ray.problem.measure import measure
from de_ray.quantize import quantize
from de_ray.schema import compose
from de_ray.student import Student


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", default="lenet300_mnist")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500], help="of the refit of levels")
    parser.add_argument("override", nargs="*")
    arguments = parser.parse_args()
    config = compose([f"problem={arguments.problem}", "evolution=fisher", f"evolution.sparsity={arguments.sparsity}",
                      "pool=serial", "threads=1", *arguments.override])
    problem = build_problem(config.problem, config.seed)
    student, rows = Student(problem.teacher, problem.layers), []
    with threads(config.threads), build_pool(problem, config.pool, student) as pool:
        evolve(problem, config, student, pool, None, {}, lambda record, total: None)
        pruned, base = student.values(), measure(problem, student.module)["divergence"]["held_out"]
        for bits in arguments.bits:
            for steps in arguments.steps:
                for widest in (0, 8):
                    settings = dataclasses.replace(config.quantization, bits=bits, refit_steps=steps,
                                                   feedback_bits=widest)
                    student.set_values(pruned)
                    pool.refresh(student)
                    made = quantize(problem, dataclasses.replace(config, quantization=settings), student, pool, None)
                    rows.append({"bits": bits, "steps": steps, "feedback": widest > 0,
                                 "divergence": measure(problem, student.module)["divergence"]["held_out"],
                                 "bytes": len(codec.encode(made.tensors, made.raw, problem.architecture))})
                    print(rows[-1], flush=True)
    print(json.dumps({"problem": arguments.problem, "sparsity": arguments.sparsity, "pruned_divergence": base,
                      "rows": rows}))


if __name__ == "__main__":
    main()
