"""Pictures of objects in images, several networks side by side: boxes and masks with class and score."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

DPI = 100
PANEL = 480
"""Pixels of a panel's longer side. Panels start on whole pixels: equal photographs side by side compress as one."""
GAP = 8
"""Pixels between panels."""
HEAD = 26
"""Pixels of the columns' titles, and of the note below."""
FONT = 7.5
"""Points of a label."""
PAD = 1.5
"""Pixels around a label's text."""
RED = (0.9, 0.0, 0.1)
"""Of what was missed, and of no class."""
HUES = (0.08, 0.9)
"""Range of the classes' hues, without those that pass for red."""
GOLDEN = 0.618034
"""Step between the hues of consecutive classes, which takes them far apart."""
OPACITY = 0.45
"""Of masks."""


@dataclass(frozen=True)
class Mark:
    """An object in a panel."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in the scene's units."""
    kind: int
    """Class, >= 0; decides the colour."""
    label: str
    missed: bool = False
    """Whether it stands for something that should be there: dashed and red."""
    mask: np.ndarray | None = None
    """bool [h, w] over the whole image, at any resolution."""


@dataclass(frozen=True)
class Scene:
    """An image and what each column has in it."""

    pixels: np.ndarray
    """uint8 [h, w, 3], RGB."""
    size: tuple[float, float]
    """Width and height in the units of boxes, whatever resolution the pixels have."""
    columns: tuple[Sequence[Mark], ...]
    """Marks of each column, most important first: labels make way for earlier ones."""


def draw_scenes(titles: Sequence[str], scenes: Sequence[Scene], note: str = "") -> Figure:
    """A row a scene, a column a title.

    Args:
        titles: of the columns.
        scenes: with as many columns each.
        note: below the panels.

    Returns:
        A figure whose panels are `PANEL` pixels along their longer side, at its own resolution.
    """
    extents = [_extent(scene) for scene in scenes]
    width = len(titles) * (PANEL + GAP) + GAP
    height = 2 * HEAD + sum(tall + GAP for _, tall in extents)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)  # labels are measured
    for column, title in enumerate(titles):
        figure.text((GAP + column * (PANEL + GAP)) / width, 1 - HEAD / 2 / height, title, fontsize=10, weight="bold",
                    va="center")
    top = HEAD
    for scene, (wide, tall) in zip(scenes, extents, strict=True):
        for column, marks in enumerate(scene.columns):
            left = GAP + column * (PANEL + GAP) + (PANEL - wide) // 2
            axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
            draw_scene(axes, scene, marks)
        top += tall + GAP
    figure.text(GAP / width, HEAD / 2 / height, note, fontsize=9, va="center")
    return figure


def draw_scene(axes: Axes, scene: Scene, marks: Sequence[Mark]) -> None:
    """An image with its marks.

    Args:
        axes: of the proportions of the scene, in a figure with an Agg canvas.
        scene: its columns are not looked at.
        marks: to be drawn.
    """
    width, height = scene.size
    over = {"extent": (0, width, height, 0), "aspect": "auto"}
    axes.imshow(scene.pixels, **over)
    axes.set_axis_off()
    for mark in marks:
        colour = _colour(mark)
        if mark.mask is not None:
            tint = np.zeros((*mark.mask.shape, 4))
            tint[mark.mask] = (*colour, OPACITY)
            axes.imshow(tint, interpolation="nearest", **over)
        left, top, right, bottom = mark.box
        line = {"lw": 2, "ls": (0, (4, 2)), "zorder": 2} if mark.missed else {"lw": 1.6}
        outline = withStroke(linewidth=line["lw"] + 1, foreground="white" if mark.missed else "black", alpha=0.6)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, **line,
                                 path_effects=[outline]))
    axes.set(xlim=(0, width), ylim=(height, 0))
    _label(axes, marks)


def _extent(scene: Scene) -> tuple[int, int]:
    """Width and height of a scene's panels in pixels."""
    scale = PANEL / max(scene.size)
    return max(1, round(scene.size[0] * scale)), max(1, round(scene.size[1] * scale))


def _colour(mark: Mark) -> tuple[float, float, float]:
    if mark.missed:
        return RED
    low, high = HUES
    return tuple(hsv_to_rgb((low + (high - low) * ((mark.kind + 1) * GOLDEN % 1), 0.8, 0.95)))


def _label(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write labels at their boxes' corners, each where it hides the least of those before it."""
    renderer = axes.figure.canvas.get_renderer()
    frame, placed = axes.get_window_extent(renderer), []
    for mark in marks:
        colour = _colour(mark)
        bright = np.dot(colour, (0.3, 0.59, 0.11)) > 0.5
        text = axes.text(0, 0, mark.label, fontsize=FONT, color="black" if bright else "white", clip_on=True,
                         va="bottom", parse_math=False,
                         bbox={"boxstyle": f"square,pad={PAD * 72 / DPI / FONT}", "fc": colour, "lw": 0})
        size = text.get_window_extent(renderer).padded(PAD).size
        box = Bbox(axes.transData.transform(np.reshape(mark.box, (2, 2))))  # pixels, upwards
        places = [_inside(frame, place, size) for place in _places(box, size)]
        best = min(places, key=lambda place: _overlap(place, placed))
        placed.append(best.extents)
        text.set_position(axes.transData.inverted().transform(best.min + PAD))


def _places(box: Bbox, size: np.ndarray) -> list[tuple[float, float]]:
    """Lower left corners for a box's label, best first: above, inside at the top, below, inside at the bottom."""
    heights = (box.ymax, box.ymax - size[1], box.ymin - size[1], box.ymin)
    return [(left, low) for low in heights for left in (box.xmin, box.xmax - size[0])]


def _inside(frame: Bbox, corner: tuple[float, float], size: np.ndarray) -> Bbox:
    """A label moved into the panel."""
    low = np.clip(corner, frame.min, np.maximum(frame.min, frame.max - size))
    return Bbox([low, low + size])


def _overlap(label: Bbox, placed: list[np.ndarray]) -> float:
    """Area that a label shares with others, left, low, right, high each."""
    others = np.reshape(placed, (-1, 4))
    sides = np.minimum(label.max, others[:, 2:]) - np.maximum(label.min, others[:, :2])
    return float(sides.clip(0).prod(1).sum())
