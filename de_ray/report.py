"""The report as a file and as tables."""

import json
import logging
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from de_ray.files import write_atomically

if TYPE_CHECKING:
    from de_ray.codec import FileSummary

PACKAGES = ("de-ray", "torch", "torchvision", "numpy", "ray", "optuna", "mlflow", "hydra-core", "safetensors",
            "constriction", "numba")
BYTES_A_PARAMETER = 4
"""Of an uncompressed network: float32."""
PLAIN_WIDTH = 110
"""Columns where there is no terminal to ask."""
LEAST_AGREEMENT, MOST_ERROR = 0.9, 0.3
"""Of a file on held-out inputs, beyond which a user is told."""

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def tell_of_harm(metrics: dict[str, float]) -> None:
    """Warn of a file whose outputs are far from the model's."""
    agreement, error = metrics.get("agreement", 1.0), metrics.get("relative_error", 0.0)
    if agreement < LEAST_AGREEMENT or error > MOST_ERROR:
        told = f"relative error {error:.2f}" if error else f"{1 - agreement:.0%} of the largest scores are others"
        log.warning("the file's outputs for held-out inputs are far from the model's: %s; more calibration inputs, "
                    "steps or bits, or a lower sparsity, bring them closer", told)


def write_json(path: Path, report: dict) -> None:
    """Write a report atomically; NaN and infinities, which JSON does not know, become null.

    Args:
        path: in a folder that exists.
        report: of JSON's types and NumPy scalars.
    """
    write_atomically(path, (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tell_of(written: list[Path], console: Console) -> None:
    for path in written:
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        console.print(f"wrote {escape(str(shown))}", soft_wrap=True, highlight=False)


def print_report(report: dict, written: list[Path], console: Console | None = None) -> None:
    """Print teacher, student and decoded file side by side, the layers, and what was written."""
    console = console or _console()
    console.print(_comparison(report))
    console.print(_layers(report))
    seconds = report["seconds"]
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    console.print(f"{report['evaluations']:,} evaluations, {sum(seconds.values()):.1f} s: {stages}", highlight=False)
    _tell_of(written, console)


def _comparison(report: dict) -> Table:
    table = Table(title=f"{escape(report['problem'])}, {escape(report['method'])}, seed {report['seed']}")
    table.add_column("")
    for who in ("teacher", "student", "decoded file"):
        table.add_column(who, justify="right")
    for name in report["teacher"]:
        digits = 2 if report["teacher"][name] > 1 else 4  # percent, or shares
        table.add_row(escape(name), *(f"{report[who][name]:.{digits}f}" for who in ("teacher", "student", "decoded")))
    for name, value in report["divergence"].items():
        table.add_row(f"divergence, {name.replace('_', ' ')}", "0", f"{value:.4g}", f"{value:.4g}")
    size = BYTES_A_PARAMETER * report["parameters"]
    table.add_row("sparsity", "0.00%", f"{report['sparsity']:.2%}", f"{report['sparsity']:.2%}")
    bits = f"{report['bits_per_survivor']:.2f}"
    table.add_row("coded bits per survivor", "32.00", bits, bits)
    table.add_row("bytes", f"{size:,}", "", f"{report['file_bytes']:,}")
    table.add_row("ratio", "1.0x", "", f"{report['ratio']:.1f}x")
    table.add_row("equals the student, bit for bit", "", "", "yes" if report["decoded_equals_student"] else "NO")
    return table


def _layers(report: dict) -> Table:
    table = Table(title="Layers", show_footer=True)
    weights = sum(layer["weights"] for layer in report["layers"])
    size = sum(layer["bytes"] for layer in report["layers"])
    for name, justify, footer in (("layer", "left", "all layers"), ("weights", "right", f"{weights:,}"),
                                  ("density", "right", f"{1 - report['sparsity']:.2%}"), ("bits", "right", ""),
                                  ("coded bits per survivor", "right", f"{report['bits_per_survivor']:.2f}"),
                                  ("bytes", "right", f"{size:,.0f}")):
        table.add_column(name, justify=justify, footer=footer)
    for layer in report["layers"]:
        survivors = layer["weights"] * layer["density"]
        table.add_row(escape(layer["name"]), f"{layer['weights']:,}", f"{layer['density']:.2%}", str(layer["bits"]),
                      f"{8 * layer['bytes'] / survivors:.2f}" if survivors else "-", f"{layer['bytes']:,.0f}")
    return table


def print_sweep(summary: dict, labels: dict[int, str], written: list[Path], console: Console | None = None) -> None:
    """Print a sweep's trials, the largest ratio first, and the command line of the best.

    Args:
        summary: as `sweep.json` has it.
        labels: by trial.
        written: paths to tell of.
        console: where to.
    """
    console = console or _console()
    table = Table(title=f"{escape(summary['problem'])}: {len(summary['trials'])} compressions")
    for name, justify in (("trial", "right"), ("", "left"), ("sparsity", "right"), ("ratio", "right"),
                          (summary["metric"], "right"), ("divergence, held out", "right"), ("", "left")):
        table.add_column(escape(name), justify=justify)
    for row in sorted(summary["trials"], key=lambda row: -row.get("ratio", 0)):
        name = str(row["number"]), escape(labels[row["number"]])
        if row["status"] != "finished":
            table.add_row(*name, "", "", "", "", row["status"])
            continue
        table.add_row(*name, f"{row['sparsity']:.2%}", f"{row['ratio']:.1f}x", f"{row['metric']:.4g}",
                      f"{row['divergence']:.4g}", "best" if row["number"] == summary["best"] else
                      "Pareto front" if row["front"] else "")
    console.print(table)
    _tell_of(written, console)
    console.print(f"the best again: {escape(summary['command'])}", soft_wrap=True, highlight=False)


def print_file_summary(path: str, summary: "FileSummary", console: Console | None = None) -> None:
    """Print a compressed file's tensors and totals."""
    console = console or _console()
    table = Table(title=escape(f"{path} ({summary.architecture or 'architecture not named'})"))
    for name, justify in (("tensor", "left"), ("shape", "left"), ("weights", "right"), ("density", "right"),
                          ("levels", "right"), ("bits", "right"), ("bytes", "right")):
        table.add_column(name, justify=justify)
    for tensor in summary.tensors:
        bits = math.ceil(math.log2(tensor.levels)) if tensor.levels > 1 else tensor.levels
        table.add_row(escape(tensor.name), " x ".join(map(str, tensor.shape)), f"{tensor.weights:,}",
                      f"{tensor.density:.2%}", str(tensor.levels), str(bits), f"{tensor.payload_bytes:,.0f}")
    weights = sum(tensor.weights for tensor in summary.tensors)
    table.add_section()
    table.add_row("container", "", "", "", "", "", f"{summary.container_bytes:,}")
    table.add_row("total", "", f"{weights:,}", "", "", "", f"{summary.file_bytes:,}")
    console.print(table)
    console.print(f"ratio {BYTES_A_PARAMETER * weights / summary.file_bytes:.1f}x over float32", highlight=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)
