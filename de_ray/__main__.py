"""`python -m de_ray inspect FILE` and `python -m de_ray evaluate FILE problem=NAME [overrides] [--pictures PNG]`."""

import argparse
import copy
import json
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException


def inspect(path: str) -> None:
    """Print a file's layers: shape, density, levels, bytes; totals and ratio."""
    from de_ray import codec
    from de_ray.report import print_file_summary

    print_file_summary(path, codec.inspect(path))


def evaluate(path: str, overrides: list[str], pictures: str | None = None) -> None:
    """Print the decoded network's metrics and divergence beside the teacher's, as JSON.

    Args:
        path: a compressed file.
        overrides: of the configuration, in Hydra's syntax; `problem=NAME` among them.
        pictures: a PNG to write, of what teacher and file detect in held-out images; for detectors.
    """
    from de_ray import codec
    from de_ray.problem.build import build_problem
    from de_ray.problem.measure import measure
    from de_ray.report import BYTES_A_PARAMETER
    from de_ray.schema import compose

    if pictures is not None and not Path(pictures).absolute().parent.is_dir():
        raise FileNotFoundError(f"--pictures={pictures!r}: no such folder")
    state = codec.decode(path)  # a damaged file need not wait for data and teacher
    config = compose(overrides)
    problem = build_problem(config.problem, config.seed)
    if pictures is not None and problem.pictures is None:
        raise ValueError(f"--pictures={pictures!r}: expected nothing, problem={problem.name} has no pictures to draw")
    decoded = codec.fill(copy.deepcopy(problem.teacher), state)
    parameters, size = sum(p.numel() for p in problem.teacher.parameters()), Path(path).stat().st_size
    print(json.dumps({
        "problem": problem.name, "parameters": parameters, "file_bytes": size,
        "ratio": BYTES_A_PARAMETER * parameters / size, "teacher": measure(problem, problem.teacher),
        "decoded": measure(problem, decoded),
    }, indent=2))
    if pictures is not None:
        from de_ray.figures import save

        save(problem.pictures({"decoded file": decoded}), Path(pictures))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m de_ray", description="Look into compressed networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="table of a file's layers")
    command.add_argument("file")
    command = commands.add_parser("evaluate", help="metrics and divergence of a file beside its teacher's")
    command.add_argument("file")
    command.add_argument("overrides", nargs="+", metavar="override", help="problem=NAME and other Hydra overrides")
    command.add_argument("--pictures", metavar="PNG", help="draw what teacher and file detect; for detectors")
    given = parser.parse_args(arguments)
    try:
        if given.command == "inspect":
            inspect(given.file)
        else:
            evaluate(given.file, given.overrides, given.pictures)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
