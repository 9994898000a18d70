"""What the order of hidden units is worth: a compressed file written again from the same symbols.

Three sizes a file: as it is numbered, with what makes units that nobody reads zeroed, and with units in order as well.
The network computes the same in all of them. The last line is one JSON object.

    python tests/benchmarks/bench_units.py --problem lenet5_mnist docs/results/lenet5_mnist-0/student.der
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from de_ray.codec import container
from de_ray.config import PoolConfig
from de_ray.evaluation.build import build_pool
from de_ray.evaluation.capture import PROBE
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from de_ray.student import Student
from de_ray.units import Units, find_units, renumbered, silence


def sizes(path: Path, student: Student, units: Units) -> dict[str, int]:
    """Bytes of a file by what was done to it."""
    decoded = container._decode(container._read(path))
    tensors = [tensor for _, tensor in decoded.tensors if tensor is not None]

    def size() -> int:
        return len(container.encode(tensors, architecture=decoded.architecture))

    found = {"as numbered": size()}
    student.start_from(decoded.state)
    silence(student, units)
    state = student.module.state_dict()
    tensors = [replace(one, symbols=np.where(state[one.name].numpy() == 0, 0, one.symbols)) for one in tensors]
    found["unread units zeroed"] = size()
    order = units.order(state)
    for k, one in enumerate(tensors):
        axes = order.get(one.name, [])
        exponents = one.row_exponents
        if exponents is not None:
            exponents = renumbered(exponents, [axis for axis in axes if axis[0] == 0])
        tensors[k] = replace(one, symbols=np.ascontiguousarray(renumbered(one.symbols, axes)), row_exponents=exponents)
    found["in order"] = size()
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", required=True)
    parser.add_argument("--override", nargs="*", default=[], help="of the configuration, such as problem.inputs_size=4")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    problem = build_problem(compose([f"problem={arguments.problem}", *arguments.override]).problem, seed=0)
    with build_pool(problem, PoolConfig(kind="serial"), Student(problem.teacher, problem.layers)) as pool:
        units = find_units(problem.teacher, problem.calibration[:PROBE], pool.hidden())
    found = {str(path): sizes(path, Student(problem.teacher, problem.layers), units) for path in arguments.files}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
