"""Darknet `.cfg` files as sections of checked options (https://pjreddie.com/darknet/yolo)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from de_ray.checks import require

SHIPPED = {"yolov3": "yolov3.cfg", "yolov3_tiny": "yolov3-tiny.cfg"}
"""Architectures whose configuration is part of the package."""
DEFAULTS = {  # a section's options that change what it computes, as Darknet has them where they are not written
    "convolutional": {"filters": 1, "size": 1, "stride": 1, "pad": 0, "padding": 0, "groups": 1, "batch_normalize": 0,
                      "activation": "logistic", "binary": 0, "xnor": 0, "flipped": 0, "dilation": 1},
    "maxpool": {"size": None, "stride": 1, "padding": None},
    "upsample": {"stride": 2, "scale": 1.0},
    "route": {"layers": "", "groups": 1, "group_id": 0},
    "shortcut": {"from": "", "activation": "linear"},
    "yolo": {"mask": "", "anchors": "", "classes": 20, "num": 1, "scale_x_y": 1.0},
}
UNSUPPORTED = {"convolutional": ("binary", "xnor", "flipped"), "yolo": (), "upsample": ()}
"""Options that must be 0."""


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
        return self._number(key, int, least)

    def number(self, key: str) -> float:
        """An option as a number."""
        return self._number(key, float, None)

    def text(self, key: str) -> str:
        """An option as it is written."""
        return self.options.get(key, str(DEFAULTS[self.kind][key]))

    def integers(self, key: str) -> tuple[int, ...]:
        """An option as whole numbers between commas, at least one."""
        return tuple(int(value) for value in self.numbers(key))

    def numbers(self, key: str) -> tuple[float, ...]:
        """An option as numbers between commas, at least one."""
        try:
            values = tuple(float(part) for part in self.text(key).split(",") if part.strip())
        except ValueError:
            values = ()
        require(bool(values), self.at(key), self.text(key), "numbers between commas")
        return values

    def at(self, key: str) -> str:
        """The option's place, for messages."""
        return f"{self.where}: [{self.kind}] {key}"

    def _number(self, key, kind, least):
        value = self.text(key)
        try:
            found = kind(value)
        except ValueError:
            found = None
        wanted = ("a whole number" if kind is int else "a number") + ("" if least is None else f", at least {least}")
        require(found is not None and (least is None or found >= least), self.at(key), value, wanted)
        return found


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


def _require_supported(section: Section) -> None:
    if section.kind not in DEFAULTS:
        raise ValueError(f"{section.where}: section [{section.kind}] is not supported; there are "
                         + ", ".join(f"[{kind}]" for kind in DEFAULTS))
    for key in UNSUPPORTED.get(section.kind, ()):
        require(section.integer(key) == 0, section.at(key), section.text(key), "0, other kinds are not supported")
    for kind, key in (("convolutional", "dilation"), ("upsample", "scale"), ("yolo", "scale_x_y")):
        if section.kind == kind:
            require(section.number(key) == 1, section.at(key), section.text(key), "1, others are not supported")
    if section.kind in ("convolutional", "shortcut"):
        allowed = ("leaky", "linear")
        require(section.text("activation") in allowed, section.at("activation"), section.text("activation"),
                " or ".join(allowed) + ", others are not supported")
