"""`python -m de_ray inspect|evaluate|decode|export FILE ...`; `python -m de_ray COMMAND --help` tells of each."""

import argparse
import contextlib
import copy
import json
import logging
import sys
from collections.abc import Iterator
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
    from de_ray.device import products, resolve_device
    from de_ray.files import require_new
    from de_ray.problem.build import build_problem
    from de_ray.problem.measure import measure
    from de_ray.report import BYTES_A_PARAMETER
    from de_ray.schema import compose

    if pictures is not None:
        require_new(pictures, "--pictures")
        if Path(pictures).suffix.lower() != ".png":
            raise ValueError(f"--pictures={pictures!r}: expected a .png file")
    state = codec.decode(path)  # a damaged file need not wait for data and teacher
    config = compose(overrides)
    device = resolve_device(config.device)
    problem = build_problem(config.problem, config.seed, config.device)
    problem.teacher.to(device)
    if pictures is not None and problem.pictures is None:
        raise ValueError(f"--pictures={pictures!r}: expected nothing, problem={problem.name} has no pictures to draw")
    decoded = codec.fill(copy.deepcopy(problem.teacher), state)
    parameters, size = sum(p.numel() for p in problem.teacher.parameters()), Path(path).stat().st_size
    with products("float32", device):
        measured = {"teacher": measure(problem, problem.teacher), "decoded": measure(problem, decoded)}
    print(json.dumps({"problem": problem.name, "parameters": parameters, "file_bytes": size,
                      "ratio": BYTES_A_PARAMETER * parameters / size, **measured}, indent=2))
    if pictures is not None:
        from de_ray.figures import save

        save(problem.pictures({"decoded file": decoded}), Path(pictures))


def decode(path: str, output: str) -> None:
    """Write a file's state dict as safetensors, dense.

    Args:
        path: a compressed file.
        output: a safetensors file, which must not be there yet.
    """
    import torch
    from safetensors.torch import save

    from de_ray import codec
    from de_ray.files import require_new, write_new

    require_new(output, "-o")
    architecture, state = codec.decode_named(path)
    write_new(output, "-o", save({name: value.clone(memory_format=torch.contiguous_format) for name, value in
                                  state.items()}, {"architecture": architecture}))  # clones: tied ones share memory
    print(f"wrote {output}")


def export(path: str, onnx: str, int8: str | None, overrides: list[str]) -> None:
    """Write a file's network as ONNX, and print how it compares with the student, as JSON.

    Args:
        path: a compressed file.
        onnx: a file for the dense float32 network, which must not be there yet.
        int8: one for the network with int8 weights and activations; needs a problem for its calibration inputs.
        overrides: of the configuration, in Hydra's syntax. None: a built-in architecture, checked on random inputs.
    """
    import torch

    from de_ray import codec
    from de_ray.export import CHECKED, OnnxNetwork, against, sample_inputs, to_int8, to_onnx
    from de_ray.files import require_new, write_new
    from de_ray.problem.build import build_architecture, build_problem
    from de_ray.problem.measure import measure
    from de_ray.problem.packing import packing_of
    from de_ray.schema import compose

    files = {"--onnx": onnx} | ({"--int8": int8} if int8 is not None else {})
    for option, file in files.items():
        require_new(file, option)
    if int8 is not None and Path(int8).resolve() == Path(onnx).resolve():
        raise ValueError(f"--int8={int8!r}: expected another file than --onnx")
    if int8 is not None and not overrides:
        raise ValueError(f"--int8={int8!r}: expected a problem beside it, such as problem=digits, whose inputs tell "
                         "the range of activations")
    architecture, state = codec.decode_named(path)
    if overrides:
        config = compose(overrides)
        problem = build_problem(config.problem, config.seed)
        student = codec.fill(copy.deepcopy(problem.teacher), state)
        sample = problem.held_out[:CHECKED]
    else:
        problem, sample = None, sample_inputs(architecture)
        student = codec.fill(build_architecture(architecture), state)
    made = {"--onnx": to_onnx(student, sample)}
    if int8 is not None:
        made["--int8"] = to_int8(made["--onnx"], problem.calibration, packing_of(student))
    told = {"architecture": architecture, "file_bytes": Path(path).stat().st_size}
    if problem is not None:
        told["student"] = measure(problem, student)
    for option, data in made.items():
        told[option[2:]] = {"file": files[option], "bytes": len(data)}
        if problem is not None:
            with torch.inference_mode():
                network = OnnxNetwork(data, student(sample[:1]), packing_of(student))
            told[option[2:]] |= measure(problem, network) | against(student, network, problem)
    for option, data in made.items():
        write_new(files[option], option, data)
    print(json.dumps(told, indent=2))


@contextlib.contextmanager
def _progress_told() -> Iterator[None]:
    """Have what the package logs on stderr, beside a command's own output: a teacher may be trained first."""
    log, handler = logging.getLogger("de_ray"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


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
    command = commands.add_parser("decode", help="a file's state dict as safetensors, dense")
    command.add_argument("file")
    command.add_argument("-o", dest="output", required=True, metavar="SAFETENSORS", help="a file that is not there yet")
    command = commands.add_parser("export", help="a file's network as ONNX, compared with the student")
    command.add_argument("file")
    command.add_argument("overrides", nargs="*", metavar="override",
                         help="problem=NAME and other Hydra overrides; not needed for built-in architectures without "
                              "--int8")
    command.add_argument("--onnx", required=True, metavar="ONNX", help="dense float32, a file that is not there yet")
    command.add_argument("--int8", metavar="ONNX", help="int8 by quantize-dequantize nodes, likewise")
    given, rest = parser.parse_known_args(arguments)
    # argparse finds no overrides behind an option once it has found none before it.
    if rest and (given.command != "export" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _progress_told():
            if given.command == "inspect":
                inspect(given.file)
            elif given.command == "evaluate":
                from de_ray.memory import full_gpus_explained

                with full_gpus_explained("Take device=cpu"):
                    evaluate(given.file, given.overrides, given.pictures)
            elif given.command == "decode":
                decode(given.file, given.output)
            else:
                export(given.file, given.onnx, given.int8, [*given.overrides, *rest])
    except (ValueError, OSError, MemoryError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
