"""Darknet `.cfg` files as sections of checked options (https://pjreddie.com/darknet/yolo)."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from de_ray.checks import require

log = logging.getLogger(__name__)

SHIPPED = {"yolov3": "yolov3.cfg", "yolov3_tiny": "yolov3-tiny.cfg"}
"""Architectures whose configuration is part of the package."""
DEFAULTS = {  # a section's options that are read, as Darknet has them where they are not written
    "convolutional": {"filters": 1, "size": 1, "stride": 1, "pad": 0, "padding": 0, "groups": 1, "batch_normalize": 0,
                      "activation": "logistic"},
    "maxpool": {"size": None, "stride": 1, "padding": None},
    "upsample": {"stride": 2},
    "route": {"layers": "", "groups": 1, "group_id": 0},
    "shortcut": {"from": "", "activation": "linear"},
    "yolo": {"mask": "", "anchors": "", "classes": 20, "num": 1},
}
UNSUPPORTED = {
    "convolutional": {"binary": "0", "xnor": "0", "flipped": "0", "dilation": "1", "antialiasing": "0", "deform": "0",
                      "sway": "0", "rotate": "0", "stretch": "0", "stretch_sway": "0", "coordconv": "0",
                      "share_index": None},
    "maxpool": {"maxpool_depth": "0", "antialiasing": "0", "stride_x": None, "stride_y": None},
    "upsample": {"scale": "1"},
    "shortcut": {"weights_type": "none", "weights_normalization": "none", "alpha": "1", "beta": "1"},
    "yolo": {"new_coords": "0", "scale_x_y": "1"},
}
"""Options, Darknet's own and AlexeyAB's, that change what a section computes: the one value that is allowed."""
HARMLESS = {"ignore_thresh", "truth_thresh", "jitter", "random", "resize", "max", "map", "label_smooth_eps",
            "objectness_smooth", "iou_loss", "iou_thresh", "iou_normalizer", "obj_normalizer", "cls_normalizer",
            "delta_normalizer", "max_delta", "nms_kind", "beta_nms", "focal_loss", "counters_per_class", "stopbackward",
            "learning_rate", "burnin_update", "onlyforward", "train_only_bn", "dontload", "dontloadscales",
            "stride_x", "stride_y", "out_channels"}
"""Options that change nothing of what a trained network computes, as far as what is beside them is supported."""


@dataclass(frozen=True)
class Section:
    """One layer's options, in text."""

    kind: str
    """What stands between the brackets."""
    options: dict[str, str]
    """Key -> value."""
    where: str
    """File and line, for messages."""

    def integer(self, key: str, least: int = 0) -> int:
        """An option as a whole number, its default where it is not written."""
        value = self.text(key)
        try:
            found = int(value)
        except ValueError:
            found = least - 1
        require(found >= least, self.at(key), value, f"a whole number, at least {least}")
        return found

    def text(self, key: str) -> str:
        """An option as it is written."""
        return self.options.get(key, str(DEFAULTS[self.kind][key]))

    def integers(self, key: str) -> tuple[int, ...]:
        """An option as whole numbers between commas, at least one."""
        return self._numbers(key, int)

    def numbers(self, key: str) -> tuple[float, ...]:
        """An option as finite numbers between commas, at least one."""
        return self._numbers(key, float)

    def at(self, key: str) -> str:
        """The option's place, for messages."""
        return f"{self.where}: [{self.kind}] {key}"

    def _numbers(self, key, kind):
        try:
            values = tuple(kind(part) for part in self.text(key).split(",") if part.strip())
        except ValueError:
            values = ()
        require(bool(values) and all(map(math.isfinite, values)), self.at(key), self.text(key),
                ("whole numbers" if kind is int else "numbers") + " between commas")
        return values


def parse(text: str, name: str = "cfg") -> list[Section]:
    """The sections after `[net]`, in order.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ValueError: for lines that are neither sections nor options, sections or options that are not supported.
    """
    found: list[Section] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        where = f"{name}, line {number}"
        if line.startswith("["):
            found.append(Section(line.strip("[]").strip().lower(), {}, where))
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        require(bool(found and equals and key), where, line, "[section] or key=value, the first section being [net]")
        found[-1].options[key] = value
    require(bool(found) and found[0].kind in ("net", "network"), name, found[0].kind if found else "", "[net] first")
    require(len(found) > 1, name, "[net] alone", "layers after it")
    require(found[0].options.get("channels", "3") == "3", f"{name}: [net] channels", found[0].options.get("channels"),
            "3, colour images")
    for section in found[1:]:
        _require_supported(section)
    return found[1:]


def input_size(text: str) -> tuple[int, int] | None:
    """Width and height of images that the `[net]` of a file names; None where it does not."""
    lines = text.partition("]")[2].partition("[")[0].splitlines()
    options = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    width, height = (options.get(key, "") for key in ("width", "height"))
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else None


def shipped(name: str) -> list[Section]:
    """The sections of a network in `SHIPPED`."""
    text = resources.files("de_ray.problem").joinpath("data", SHIPPED[name]).read_text()
    return parse(text, SHIPPED[name])


def classes(sections: Sequence[Section]) -> int:
    """Number of classes, the same at every head.

    Raises:
        ValueError: there is no head, or heads differ.
    """
    found = {section.integer("classes", 1) for section in sections if section.kind == "yolo"}
    require(len(found) == 1, "cfg: [yolo] classes", sorted(found), "one number of classes at one or more heads")
    return found.pop()


def _equal(value: str, allowed: str | None) -> bool:
    try:
        return allowed is not None and float(value) == float(allowed)
    except ValueError:
        return False


def _require_supported(section: Section) -> None:
    if section.kind not in DEFAULTS:
        raise ValueError(f"{section.where}: section [{section.kind}] is not supported; there are "
                         + ", ".join(f"[{kind}]" for kind in DEFAULTS))
    for key, allowed in UNSUPPORTED.get(section.kind, {}).items():
        value = section.options.get(key, allowed)
        require(value == allowed or _equal(value, allowed), section.at(key), value,
                "nothing, it is not supported" if allowed is None else f"{allowed}, others are not supported")
    if section.kind == "convolutional":
        for key in ("stride_x", "stride_y"):
            value = section.options.get(key, section.text("stride"))
            require(_equal(value, section.text("stride")), section.at(key), value, "stride, others are not supported")
    known = {*DEFAULTS[section.kind], *UNSUPPORTED.get(section.kind, {}), *HARMLESS}
    unknown = section.options.keys() - known
    if unknown:
        log.warning("%s: [%s] has options that are not known and change nothing: %s", section.where, section.kind,
                    ", ".join(sorted(unknown)))
    if section.kind in ("convolutional", "shortcut"):
        allowed = ("leaky", "linear")
        require(section.text("activation") in allowed, section.at("activation"), section.text("activation"),
                " or ".join(allowed) + ", others are not supported")
