"""Checkpoints of a run: safetensors files, written atomically, the newest two kept; no pickle."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from de_ray.files import write_atomically

log = logging.getLogger(__name__)

FOLDER = "checkpoint"
KEPT = 2
PACKED = "packed:"
"""Prefix of a boolean tensor's key: its values are stored as bits."""


@dataclass(frozen=True)
class Checkpoint:
    """A state to continue from."""

    done: int
    """Steps of the stage that are finished."""
    tensors: dict[str, Tensor]
    meta: dict
    """What JSON holds."""


def save_checkpoint(folder: Path, done: int, tensors: dict[str, Tensor], meta: dict) -> Path:
    """Write `folder/checkpoint/step-NNNN.safetensors` and drop all but the newest two.

    Args:
        folder: of the run; must exist.
        done: steps finished, >= 0.
        tensors: on the CPU.
        meta: of JSON's types.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    shapes = {key: list(value.shape) for key, value in tensors.items() if value.dtype == torch.bool}
    stored = {PACKED + key if key in shapes else key: _pack(value) if key in shapes else value.contiguous()
              for key, value in tensors.items()}
    path = folder / FOLDER / f"step-{done:04d}.safetensors"
    write_atomically(path, save(stored, {"meta": json.dumps(meta), "shapes": json.dumps(shapes)}))
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read, or None; damaged ones are passed over with a warning."""
    for path in _newest_first(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                meta, shapes = json.loads(metadata["meta"]), json.loads(metadata["shapes"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s); going back to the checkpoint before it", path, error)
            continue
        for key, shape in shapes.items():
            tensors[key] = _unpack(tensors.pop(PACKED + key), shape)
        return Checkpoint(int(path.stem.split("-")[1]), tensors, meta)
    return None


def require_same(meta: dict, fingerprint: dict) -> None:
    """Raise `ValueError`, naming the keys that differ, unless a checkpoint was made with this fingerprint."""
    saved, now = meta["fingerprint"], json.loads(json.dumps(fingerprint))
    different = [f"{key}={old!r} then, {new!r} now" for key, old, new in _differences("", saved, now)]
    if different:
        raise ValueError("the checkpoint is another run's: " + "; ".join(different) + ". Continue with that run's own "
                         "configuration, or start afresh in a new folder")


def _differences(prefix: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif old != new:
        yield prefix, old, new


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in (folder / FOLDER).glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def _pack(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)], the mask's values as bits."""
    padded = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:torch.Size(shape).numel()].bool().view(shape)
