"""Networks of the package `ultralytics` as plain modules with raw heads; the only place where it is imported.

The package is licensed under AGPL-3.0. It is imported when one of its networks is asked for and not before, and nothing
of it is copied. Everything in it that would reach for the internet, install packages or report to third parties is off.

A network becomes a module of this project: batch norm is fused, the fixed weights that take the expectation of a box's
distribution are left out (decoding is `anchor_free.py`'s), and the transposed convolution of mask prototypes is written
as the convolution that it is, so that it can be compressed. Keys of the state dict are otherwise the package's own.
"""

import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from de_ray.checks import require
from de_ray.device import precision
from de_ray.problem.anchor_free import AnchorFree
from de_ray.problem.cache import cache_folder

log = logging.getLogger(__name__)

SIZE = r"(\d)[nslmx](?=-|$)"
"""The letter of a network's size, in its name."""
ACTIVATION = r"(torch\.)?nn\.\w+\([\w=., -]*\)"
DESCRIBING = ("backbone", "head", "activation", "scales", "reg_max")
"""Entries of a YAML that make a network what it is, its scale aside."""

LEGACY = {"ultralytics.yolo.utils": "ultralytics.utils", "ultralytics.yolo.v8": "ultralytics.models.yolo",
          "ultralytics.yolo.data": "ultralytics.data"}
"""Where checkpoints of the package's first versions say that their classes are, and where these are now."""
FOREIGN = {"pathlib.WindowsPath": "pathlib.PosixPath"} if os.name == "posix" else {}
"""The same of classes that another system's checkpoints hold."""

SILENT = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
"""The package's settings that send something somewhere, or start what this project has its own of."""


def definitions() -> ModuleType:
    """`ultralytics.nn.tasks`, imported offline, silent, and with its settings in the cache folder."""
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if not os.environ.get("YOLO_CONFIG_DIR"):
        os.environ["YOLO_CONFIG_DIR"] = str(cache_folder() / "ultralytics")
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)  # it would take another, with a warning
    save = torch.save
    try:
        from ultralytics import settings as chosen
        from ultralytics.nn import tasks
    finally:
        torch.save = save  # it puts its own there
    dict.update(chosen, {key: False for key in SILENT if key in chosen})  # in memory: the user's file stays as it is
    return tasks


def read_yaml(name: str) -> dict:
    """An architecture in the package's terms.

    Args:
        name: of one of the package's YAML files, such as yolov8n-seg.yaml, or a path of another. `yolov3u.yaml` is an
            alias of `yolov3.yaml`, which describes that network.

    Raises:
        FileNotFoundError: there is no such YAML.
    """
    definitions()
    require(name.endswith((".yaml", ".yml")), "problem.weights", name, "a checkpoint .pt, or a .yaml: of the installed "
            "ultralytics, yolov8n.yaml say, or your own")
    own = Path(name).expanduser()
    path, stem = own, own.stem
    if not own.is_file():
        if _packaged(stem) is None:
            stem = stem.removesuffix("u")
        path = _packaged(stem) if own.name == name else None
    if path is None:
        raise FileNotFoundError(f"problem.weights={name!r}: no such file, and no YAML of the installed ultralytics has "
                                f"that name; it has {', '.join(sorted(_yamls()))}")
    return _read(path, f"{stem}.yaml")


def build_network(description: str | Mapping, classes: int | None = None, seed: int = 0) -> nn.Module:
    """A network with random weights, in the package's own form, which learns.

    Args:
        description: what `read_yaml` reads, or its name.
        classes: None: as the YAML has it.
        seed: of the weights.

    Raises:
        FileNotFoundError: there is no such YAML.
        ValueError: it is no detector or segmenter.
    """
    tasks = definitions()
    described = read_yaml(description) if isinstance(description, str) else dict(description)
    name = described.get("yaml_file")
    require(all(isinstance(described.get(part), list) for part in ("backbone", "head")), "problem.weights", name,
            "a network's YAML, with backbone and head")
    # The package runs this text as Python.
    activation = described.get("activation")
    require(activation is None or re.fullmatch(ACTIVATION, str(activation)), "problem.weights", activation,
            "an activation such as torch.nn.ReLU()")
    head = described["head"][-1][2]
    kinds = {"Detect": tasks.DetectionModel, "Segment": tasks.SegmentationModel}
    require(head in kinds, "problem.weights", name,
            f"a network whose head is {' or '.join(kinds)}, not {head}")
    with torch.random.fork_rng(devices=[]):  # the package draws from the global generator
        torch.manual_seed(seed)
        return kinds[head](described, nc=classes, verbose=False)


def load_network(path: Path) -> nn.Module:
    """The network of one of the package's checkpoints, which are pickles: opening one runs whatever it holds.

    Raises:
        ValueError: for a file that holds no such network.
    """
    tasks = definitions()
    try:
        with tasks.temporary_modules(LEGACY, FOREIGN):
            content = torch.load(path, "cpu", weights_only=False)
        network = content.get("ema") or content["model"]
        network.model[-1].stride  # noqa: B018
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            ImportError) as error:
        raise ValueError(f"problem.weights={str(path)!r}: not a checkpoint that the installed ultralytics opens: "
                         f"{type(error).__name__}: {error}") from error
    return network.float()


def raw_heads(network: nn.Module) -> "RawHeads":
    """A network of the package as what is compressed; `network` is used up.

    Raises:
        ValueError: its head is neither Detect nor Segment, or has no box distributions.
    """
    head = network.model[-1]
    require(type(head).__name__ in ("Detect", "Segment"), "problem.weights", type(head).__name__,
            "a network with a Detect or Segment head")
    require(head.reg_max > 1, "problem.weights", f"reg_max={head.reg_max}",
            "a head with box distributions, as yolov3u, yolov5u, yolov8, yolov9, yolo11 and yolo12 have them")
    return RawHeads(network.eval().fuse(verbose=False)).eval().requires_grad_(False)


def training_loss(network: nn.Module, images: Tensor, labels: Mapping[str, Tensor], **gains: float) -> Tensor:
    """The package's own loss of a network that learns, summed over its parts and over images: [], differentiable.

    Args:
        network: as `build_network` returned it, in training mode.
        images: float [N, 3, H, W] in [0, 1].
        labels: of T objects: batch_idx [T], their images; cls [T, 1]; bboxes [T, 4], centre and size in shares of the
            image; and of a segmenter masks [N, h, w], 0 or 1 more than the object's place among its image's.
        gains: weights of the parts box, cls and dfl, where they are not the package's own.
    """
    from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace

    network.args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), **gains})
    with precision("bfloat16", images.device):
        outputs = network(images)
    outputs = {key: [v.float() for v in value] if isinstance(value, list | tuple) else value.float()
               for key, value in outputs.items()}
    return network.loss({"img": images, **labels}, outputs)[0].sum()


def architecture_name(network: nn.Module) -> str:
    """NAME:CLASSES, which `build_named` builds; own-NAME:CLASSES where no YAML of the package describes it."""
    stem = Path(str(network.yaml.get("yaml_file", "network"))).stem
    path = _packaged(stem)
    known = path is not None and all(_read(path, stem).get(part) == network.yaml.get(part) for part in DESCRIBING)
    return f"{'' if known else 'own-'}{stem}:{network.model[-1].nc}"


def build_named(name: str) -> "RawHeads":
    """The network that `architecture_name` described, untrained.

    Only the package's own YAML files are opened: a name that a file holds opens none of the user's.

    Raises:
        ValueError: for a name that is none of the package's.
    """
    stem, _, classes = name.partition(":")
    definitions()
    path = _packaged(stem)
    if path is None or not classes.isdecimal():
        raise ValueError(f"architecture {name!r} is none of the installed ultralytics': build the module yourself "
                         "(raw_heads in de_ray.problem.ultralytics) and pass it to de_ray.load(path, model=...)")
    return raw_heads(build_network(_read(path, f"{stem}.yaml"), int(classes)))


class RawHeads(nn.Module):
    """A fused network whose output is what its heads say, before any decoding.

    Args:
        network: of the package, in eval mode and fused; its layers are taken over.

    Attributes:
        head: what decoding needs to know.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleList(network.model)
        last = self.model[-1]
        last.dfl = nn.Identity()
        masks = hasattr(last, "proto")
        if masks:
            last.proto.upsample = _as_convolution(last.proto.upsample)
        self.head = AnchorFree(last.nc, last.reg_max, tuple(map(int, last.stride.tolist())), last.nm if masks else 0)
        self._sources = [tuple(index + source if source < 0 else source for source in
                               (layer.f if isinstance(layer.f, list) else [layer.f]))
                         for index, layer in enumerate(self.model)]  # layers that each reads; -1 is the images
        self._needed = {source for sources in self._sources for source in sources}

    def extra_repr(self) -> str:
        """What modules do not say: two networks of one text and the same weights compute the same."""
        return f"{self.head}\nsources={self._sources}"

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Raw heads.

        Args:
            images: [N, 3, H, W], RGB, float in [0, 1] or uint8; H and W multiples of the largest stride.

        Returns:
            boxes: a scale each [N, 4 x R, H / stride, W / stride], logits of the distances left, top, right, bottom;
            scores: a scale each [N, C, H / stride, W / stride], logits of the classes; and of a segmenter
            coefficients: a scale each [N, M, H / stride, W / stride], and prototypes [N, M, h, w].
        """
        # Images kept in bytes take a quarter of the memory; with channels innermost convolutions take half the time.
        x = (images if images.is_floating_point() else images.float() / 255).contiguous(
            memory_format=torch.channels_last)
        outputs: dict[int, Tensor] = {}

        def given(index: int) -> list[Tensor]:
            return [x if source == index - 1 else outputs[source] for source in self._sources[index]]

        last = len(self.model) - 1
        for index, layer in enumerate(self.model[:-1]):
            inputs = given(index)
            x = layer(inputs if len(inputs) > 1 else inputs[0])
            if index in self._needed:
                outputs[index] = x
        features, head = given(last), self.model[last]
        found: dict[str, Tensor | list[Tensor]] = {
            "boxes": [branch(feature) for branch, feature in zip(head.cv2, features, strict=True)],
            "scores": [branch(feature) for branch, feature in zip(head.cv3, features, strict=True)]}
        if self.head.coefficients:
            found["coefficients"] = [branch(feature) for branch, feature in zip(head.cv4, features, strict=True)]
            found["prototypes"] = head.proto(features[0])
        return found

    def __reduce__(self) -> tuple:
        # Workers that unpickle the network import the package as this process does: before its classes are looked up.
        return _blank, (), self.__dict__


def _blank() -> RawHeads:
    definitions()
    return RawHeads.__new__(RawHeads)


def _as_convolution(upsample: nn.Module) -> nn.Module:
    """A transposed convolution whose windows do not overlap as a convolution of 1 x 1 and a shuffle of its channels."""
    if type(upsample) is not nn.ConvTranspose2d or not (upsample.kernel_size == upsample.stride == (2, 2)) or (
            upsample.groups != 1 or upsample.padding != (0, 0) or upsample.output_padding != (0, 0)):
        return upsample
    inputs, outputs = upsample.in_channels, upsample.out_channels
    convolution = nn.Conv2d(inputs, 4 * outputs, 1)
    with torch.no_grad():
        convolution.weight.copy_(upsample.weight.permute(1, 2, 3, 0).reshape(4 * outputs, inputs, 1, 1))
        convolution.bias.copy_(upsample.bias.repeat_interleave(4))
    return nn.Sequential(convolution, nn.PixelShuffle(2))


def _yamls() -> dict[str, Path]:
    """The package's YAML files that describe networks, by name."""
    import ultralytics

    return {path.name: path for path in (Path(ultralytics.__file__).parent / "cfg" / "models").rglob("yolo*.yaml")}


def _packaged(stem: str) -> Path | None:
    """The package's YAML of a network: its own, or that of all its sizes, yolov8's of yolov8n; None: there is none."""
    known, family = _yamls(), re.sub(SIZE, r"\1", stem)
    return known.get(f"{stem}.yaml", known.get(f"{family}.yaml"))


def _read(path: Path, name: str) -> dict:
    """A YAML file in the package's terms, of the size that the name says."""
    from ultralytics.utils import YAML

    return YAML.load(path) | {"scale": definitions().guess_model_scale(name), "yaml_file": name}
