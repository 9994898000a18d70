"""Figures of a run that people look at: course, layers, levels, Pareto front."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

TEACHER, STUDENT, MARK = "#4878a8", "#d1662a", "#3b8f5a"
MOST_PANELS = 12
"""Histograms a figure; the largest layers where there are more."""
NAMED_LAYERS = 24
"""Layers up to which the axis names them."""

Survivors = dict[str, tuple[np.ndarray, np.ndarray | None]]


def draw_all(folder: Path, report: dict, survivors: Survivors) -> list[Path]:
    """Draw every figure that the report has data for.

    Args:
        folder: made where it is missing.
        report: as `report.json` has it.
        survivors: layer -> its survivors' values [k] before quantization and its levels [L].

    Returns:
        Paths of the PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"course": _course(report["history"]), "layers": _layers(report["layers"]),
               "levels": _levels(survivors)}
    if len(report["trials"]) > 1:
        figures["pareto"] = _pareto(report["trials"], report["chosen"])
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(path)
    return path


def _figure(width: float = 8, height: float = 4.5) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _course(history: list[dict]) -> Figure:
    """Divergence, before and after each refit, and sparsity over cycles."""
    figure = _figure()
    left = figure.subplots()
    right = left.twinx()
    cycles = [record["cycle"] for record in history]
    before = [record["candidate_divergence"] for record in history]
    if any(value is not None for value in before):
        left.plot(cycles, [math.nan if value is None else value for value in before], "o", ms=3, color=STUDENT,
                  alpha=0.5, label="divergence of the committed set, before refit")
    left.plot(cycles, [record["divergence"] for record in history], color=STUDENT, label="divergence after refit")
    right.plot(cycles, [record["sparsity"] for record in history], color=TEACHER, ls="--", label="sparsity")
    left.set_yscale("log")
    left.set(title="Evolution", xlabel="cycle (chunks of the final refit at the end)",
             ylabel="mean divergence, calibration inputs")
    right.set(ylabel="sparsity", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, fontsize=8, loc="best")
    left.grid(alpha=0.25)
    return figure


def _layers(layers: list[dict]) -> Figure:
    """Density and bits a layer."""
    figure = _figure(max(8, 0.16 * len(layers)), 5.5)
    top, bottom = figure.subplots(2, sharex=True)
    places = np.arange(len(layers))
    top.bar(places, [layer["density"] for layer in layers], color=TEACHER)
    top.set_yscale("log")
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    top.set(title="Layers", ylabel="density")
    bottom.bar(places, [layer["bits"] for layer in layers], color=STUDENT)
    bottom.set(ylabel="bit-width", ylim=(0, 8.4))
    if len(layers) <= NAMED_LAYERS:
        bottom.set_xticks(places, [layer["name"] for layer in layers], rotation=45 if len(layers) > 6 else 0)
    bottom.set_xlabel("layer" if len(layers) <= NAMED_LAYERS else "layer, by position")
    for axes in (top, bottom):
        axes.grid(alpha=0.25, axis="y")
    return figure


def _levels(survivors: Survivors) -> Figure:
    """Survivors' values and where the levels were placed."""
    chosen = sorted(survivors, key=lambda name: -len(survivors[name][0]))[:MOST_PANELS]
    names = [name for name in survivors if name in chosen]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(max(5, 4 * columns), max(3.2, 2.8 * rows))
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, name in zip(panels, names, strict=False):
        _histogram(axes, name, *survivors[name])
    for axes in panels[len(names):]:
        axes.set_visible(False)
    figure.suptitle("Survivors before quantization and their levels")
    return figure


def _histogram(axes: Axes, name: str, values: np.ndarray, levels: np.ndarray | None) -> None:
    axes.hist(values, bins=min(80, max(10, len(values) // 20)), color=TEACHER, alpha=0.8)
    for level in () if levels is None else levels:
        axes.axvline(level, color=STUDENT, lw=0.8)
    axes.set_title(f"{name}: {len(values):,} survivors, {0 if levels is None else len(levels)} levels", fontsize=9)
    axes.set_xlabel("value", fontsize=8)
    axes.set_ylabel("survivors", fontsize=8)
    axes.tick_params(labelsize=8)


def _pareto(trials: list[dict], chosen: dict) -> Figure:
    """Bytes against divergence of the sweep's trials, their front, and the one that was taken."""
    figure = _figure()
    axes = figure.subplots()
    finite = sorted((t for t in trials if math.isfinite(t["divergence"])), key=lambda t: (t["bytes"], t["divergence"]))
    front: list[dict] = []
    for trial in finite:
        if not front or trial["divergence"] < front[-1]["divergence"]:
            front.append(trial)
    axes.plot([t["bytes"] for t in finite], [t["divergence"] for t in finite], "o", color=TEACHER, alpha=0.6,
              label="trials")
    axes.step([t["bytes"] for t in front], [t["divergence"] for t in front], where="post", color=TEACHER, label="front")
    widths = ", ".join(map(str, chosen["widths"][:8])) + (" ..." if len(chosen["widths"]) > 8 else "")
    axes.plot(chosen["bytes"], chosen["divergence"], "*", ms=14, color=MARK, label=f"taken: {widths} bits")
    axes.set_yscale("log")
    axes.set(title="Bit-widths", xlabel="coded bytes of the layers", ylabel="mean divergence, calibration inputs")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25, which="both")
    return figure
