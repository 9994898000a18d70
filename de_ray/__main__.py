"""`python -m de_ray inspect FILE` and `python -m de_ray evaluate FILE problem=NAME [overrides]`."""

import argparse
import json
import sys
from pathlib import Path


def inspect(path: str) -> None:
    """Print a file's layers: shape, density, bits, bytes; totals and ratio."""
    from de_ray import codec
    from de_ray.report import print_file_summary

    print_file_summary(path, codec.inspect(path))


def evaluate(path: str, overrides: list[str]) -> None:
    """Print the decoded network's metrics and divergence beside the teacher's, as JSON.

    Args:
        path: a compressed file.
        overrides: Hydra overrides of the configuration; `problem=NAME` among them.
    """
    from de_ray import codec
    from de_ray.problem.build import build_problem
    from de_ray.problem.measure import measure
    from de_ray.schema import compose

    config = compose(overrides)
    state = codec.load(path)
    problem = build_problem(config.problem, config.seed)
    teacher = measure(problem, problem.teacher)
    import copy

    decoded = measure(problem, codec.fill(copy.deepcopy(problem.teacher), state))
    parameters = sum(p.numel() for p in problem.teacher.parameters())
    size = Path(path).stat().st_size
    print(json.dumps({"problem": problem.name, "file_bytes": size, "ratio": 4 * parameters / size, "teacher": teacher,
                      "decoded": decoded}, indent=2))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m de_ray", description="Look into compressed networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="table of a file's layers")
    command.add_argument("file")
    command = commands.add_parser("evaluate", help="metrics and divergence of a file beside its teacher's")
    command.add_argument("file")
    command.add_argument("overrides", nargs="+", metavar="override", help="problem=NAME and other Hydra overrides")
    given = parser.parse_args(arguments)
    try:
        if given.command == "inspect":
            inspect(given.file)
        else:
            evaluate(given.file, given.overrides)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
