"""Figures of a run that people look at: course, layers, levels, Pareto front."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from de_ray.quantization import pareto

BLUE, ORANGE, GREEN, GREY = "#2f6690", "#d1662a", "#3b8f5a", "#6b7280"
MOST_PANELS = 12
"""Histograms a figure; the layers with the most survivors where there are more."""
NAMED_LAYERS = 24
"""Layers up to which the axis names them and bars carry numbers."""
NARROW = 7
"""Layers up to which their names stand upright."""
MOST_BINS = 80
LONGEST = 40
"""Characters of a name over a histogram; the end of a longer one is shown."""
SHOWN = 0.999
"""Share of the survivors that a histogram's axis spans, so that a few outliers do not flatten it."""

Survivors = dict[str, tuple[np.ndarray, np.ndarray | None]]


def draw_all(folder: Path, report: dict, survivors: Survivors, pictures: Figure | None = None) -> list[Path]:
    """Draw every figure that the report has data for.

    Args:
        folder: made where it is missing.
        report: as `report.json` has it.
        survivors: layer -> its survivors' values [k] before quantization and its levels [L].
        pictures: of held-out inputs, where the problem has some.

    Returns:
        Paths of the PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"course": _course(report["history"]), "layers": _layers(report["layers"]),
               "levels": _levels(survivors)}
    if len(report["trials"]) > 1:
        figures["pareto"] = _pareto(report["trials"], report["chosen"])
    if pictures is not None:
        figures["pictures"] = pictures
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG at the figure's own resolution; returns its path."""
    FigureCanvasAgg(figure).print_png(path)
    return path


def _figure(width: float = 8, height: float = 4.5) -> Figure:
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _tidy(axes: Axes, title: str, x: str, y: str, grid: str = "both", size: int = 10) -> None:
    axes.set_title(title, fontsize=size, loc="left", weight="bold" if size > 8 else "normal")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _positive(values: list[float | None]) -> list[float]:
    """What a logarithmic axis can show; gaps elsewhere."""
    return [value if value is not None and math.isfinite(value) and value > 0 else math.nan for value in values]


def _course(history: list[dict]) -> Figure:
    """Divergence, before and after each refit, and sparsity, over cycles."""
    figure = _figure(height=5.5)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    cycles = [record["cycle"] for record in history]
    before = _positive([record["candidate_divergence"] for record in history])
    if not all(map(math.isnan, before)):
        top.plot(cycles, before, "o", ms=4, mew=0, color=ORANGE, alpha=0.55, label="set committed, before refit")
    top.plot(cycles, _positive([record["divergence"] for record in history]), "o-", ms=3, color=ORANGE,
             label="student, after refit")
    top.set_yscale("log")
    top.legend(fontsize=8, frameon=False)
    _tidy(top, "Divergence from the teacher", "", "mean over calibration inputs")
    bottom.plot(cycles, [record["sparsity"] for record in history], "o-", ms=3, color=BLUE)
    bottom.set_ylim(0, 1.03)
    bottom.yaxis.set_major_formatter(PercentFormatter(1))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tidy(bottom, "Sparsity", "cycle, then parts of the final refit", "weights that are zero")
    return figure


def _layers(layers: list[dict]) -> Figure:
    """Density and bits by layer."""
    few = len(layers) <= NAMED_LAYERS
    figure = _figure(max(8, 0.16 * len(layers)), 5.5)
    top, bottom = figure.subplots(2, sharex=True)
    places = np.arange(len(layers))
    densities = [layer["density"] for layer in layers]
    bars = top.bar(places, densities, width=0.7, color=BLUE)
    top.set_yscale("log")
    # From the decade below, since a bar's foot on a logarithmic axis is arbitrary.
    top.set_ylim(10 ** math.floor(math.log10(0.9 * min([d for d in densities if d > 0], default=0.1))), 1.6)
    top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    top.yaxis.set_minor_formatter(NullFormatter())
    _tidy(top, "Density by layer", "", "weights that survive", "y")
    widths = bottom.bar(places, [layer["bits"] for layer in layers], width=0.7, color=ORANGE)
    bottom.set_ylim(0, 9)
    bottom.set_yticks(range(0, 9, 2))
    _tidy(bottom, "Bit-width by layer", "layer" if few else "layer, by its position in the network", "bits a survivor",
          "y")
    bottom.set_xlim(-0.7, len(layers) - 0.3)
    if few:
        top.bar_label(bars, [f"{100 * density:.3g}%" for density in densities], fontsize=7, padding=1)
        bottom.bar_label(widths, fontsize=7, padding=1)
        upright = len(layers) <= NARROW
        bottom.set_xticks(places, [layer["name"] for layer in layers], rotation=0 if upright else 45,
                          ha="center" if upright else "right", rotation_mode="anchor")
    return figure


def _levels(survivors: Survivors) -> Figure:
    """Survivors' values and where the levels were placed."""
    largest = sorted(survivors, key=lambda name: -len(survivors[name][0]))[:MOST_PANELS]
    names = [name for name in survivors if name in largest]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(max(6, 4 * columns), 0.5 + max(3, 2.5 * rows))
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for place, (axes, name) in enumerate(zip(panels, names, strict=False)):
        _histogram(axes, name, *survivors[name])
        axes.set_ylabel("survivors" if place % columns == 0 else "", fontsize=8)
        axes.set_xlabel("value over its row's scale" if place >= len(names) - columns else "", fontsize=8)
    for axes in panels[len(names):]:
        axes.set_visible(False)
    shown = f", the {len(names)} layers with the most of {len(survivors)}" if len(names) < len(survivors) else ""
    figure.suptitle(f"Survivors before quantization (blue) and their levels (orange){shown}", fontsize=10,
                    weight="bold", x=0.01, ha="left")
    return figure


def _histogram(axes: Axes, name: str, values: np.ndarray, levels: np.ndarray | None) -> None:
    """A histogram, and the levels as ticks below it, where they hide nothing however many they are."""
    levels = np.empty(0) if levels is None else levels
    counts = f"{len(values):,} survivors, {len(levels)} level{'' if len(levels) == 1 else 's'}"
    _tidy(axes, f"{name if len(name) <= LONGEST else '...' + name[3 - LONGEST:]}\n{counts}", "", "", "y", 8)
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(values) == 0:
        axes.text(0.5, 0.5, "no survivors", transform=axes.transAxes, ha="center", fontsize=8, color=GREY)
        return
    low, high = np.quantile(values, [(1 - SHOWN) / 2, (1 + SHOWN) / 2])
    low, high = min(low, *levels, 0.0), max(high, *levels, 0.0)
    heights, _, _ = axes.hist(values, bins=min(MOST_BINS, max(10, len(values) // 20)), range=(low, high), color=BLUE)
    foot = -0.12 * heights.max()
    axes.vlines(levels, foot, 0.15 * foot, color=ORANGE, lw=1.2 if len(levels) < 32 else 0.6)
    axes.set_ylim(1.1 * foot, None)


def _pareto(trials: list[dict], chosen: dict) -> Figure:
    """Bytes against divergence of the sweep's trials, their front, and the one that was taken."""
    figure = _figure()
    axes = figure.subplots()
    measured = [trial for trial in trials if not math.isnan(_positive([trial["divergence"]])[0])]
    best = pareto.front(measured, lambda trial: trial["bytes"], lambda trial: trial["divergence"])
    axes.plot([t["bytes"] for t in measured], [t["divergence"] for t in measured], "o", ms=5, mew=0, color=GREY,
              alpha=0.5, label="trials")
    axes.step([t["bytes"] for t in best], [t["divergence"] for t in best], "o-", ms=5, where="post", color=BLUE,
              label="Pareto front")
    axes.plot(chosen["bytes"], chosen["divergence"], "*", ms=15, color=GREEN, mec="white", zorder=3,
              label=f"taken: {_widths(chosen['widths'])}")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes, "Bit-widths: size against divergence, before levels are refitted", "coded size of the layers",
          "mean divergence, calibration inputs")
    axes.tick_params(labelsize=8, which="minor")
    return figure


def draw_sweep(folder: Path, summary: dict, labels: dict[int, str]) -> Path:
    """Draw a sweep's trials: ratio against metric, the Pareto front, the teacher and the best.

    Args:
        folder: made where it is missing.
        summary: as `sweep.json` has it.
        labels: by trial.

    Returns:
        Path of the PNG file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = _figure()
    axes = figure.subplots()
    finished = [row for row in summary["trials"] if row["status"] == "finished"]
    front = sorted((row for row in finished if row["front"]), key=lambda row: row["ratio"])
    (best,) = (row for row in finished if row["number"] == summary["best"])
    axes.plot([row["ratio"] for row in finished], [row["metric"] for row in finished], "o", ms=5, mew=0, color=GREY,
              alpha=0.5, label="compressions")
    axes.step([row["ratio"] for row in front], [row["metric"] for row in front], "o-", ms=5, where="pre", color=BLUE,
              label="Pareto front")
    axes.plot(best["ratio"], best["metric"], "*", ms=15, color=GREEN, mec="white", zorder=3,
              label=f"best: {labels[best['number']]}")
    axes.axhline(summary["teacher"], color=ORANGE, lw=1, ls="--", label="teacher")
    if max(row["ratio"] for row in finished) > 4 * min(row["ratio"] for row in finished):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.legend(fontsize=8, frameon=False)
    stopped = sum(row["status"] == "stopped" for row in summary["trials"])
    told = f"{len(finished)} compressions" + (f", {stopped} more stopped on the way" if stopped else "")
    better = "lower" if summary["lower_is_better"] else "higher"
    _tidy(axes, f"{summary['problem']}: size against {summary['metric']}, {told}",
          "ratio to float32, bytes of the file", f"{summary['metric']}, {better} is better")
    return save(figure, folder / "sweep.png")


def _widths(widths: list[int]) -> str:
    """Bit-widths by layer: all of a few, the range of many."""
    if len(set(widths)) == 1:
        return f"{widths[0]} bit{'' if widths[0] == 1 else 's'} in every layer"
    return f"{', '.join(map(str, widths))} bits" if len(widths) <= NARROW else f"{min(widths)} to {max(widths)} bits"
