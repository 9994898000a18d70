"""Checkpoints of a run: safetensors files, written atomically, the newest two kept; no pickle."""

import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    texts = {"meta": json.dumps(meta), "shapes": json.dumps(shapes)}
    path = folder / FOLDER / f"step-{done:04d}.safetensors"
    write_atomically(path, save(stored, texts | {"checksum": _checksum(texts, stored)}))
    killed = (folder / FOLDER).glob(".step-*")  # what a kill in the middle of a write has left
    for old in [*_newest_first(folder)[KEPT:], *killed]:
        old.unlink()
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read, or None; damaged ones are passed over with a warning."""
    for path in _newest_first(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                texts = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not iterable itself
            if texts.pop("checksum") != _checksum(texts, tensors):
                raise ValueError("its checksum does not match")
            meta, shapes = json.loads(texts["meta"]), json.loads(texts["shapes"])
        except (safetensors.SafetensorError, OSError, KeyError, AttributeError, ValueError) as error:
            log.warning("%s is damaged (%s); going back to the checkpoint before it, or to the start where there is "
                        "none", path, error)
            continue
        for key, shape in shapes.items():
            tensors[key] = _unpack(tensors.pop(PACKED + key), shape)
        return Checkpoint(int(path.stem.split("-")[1]), tensors, meta)
    return None


def require_same(meta: dict, fingerprint: dict) -> None:
    """Raise `ValueError`, naming the keys that differ, unless a checkpoint was made with this fingerprint."""
    saved, now = meta["fingerprint"], json.loads(json.dumps(fingerprint))
    different = told(saved, now)
    if different:
        raise ValueError(f"the checkpoint is another run's: {different}. Continue with that run's own configuration, "
                         "or start afresh in a new folder")


def told(old: object, new: object) -> str:
    """Where two nested configurations differ, for a message; empty where they do not."""
    return "; ".join(f"{key}={was!r} then, {now!r} now" for key, was, now in _differences("", old, new))


def _differences(prefix: str, old: object, new: object) -> Iterator[tuple[str, object, object]]:
    """Dotted key, old and new value, wherever two nested configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif old != new:
        yield prefix, old, new


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in (folder / FOLDER).glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def _checksum(texts: dict[str, str], stored: dict[str, Tensor]) -> str:
    """Of all that a file holds: safetensors notices what is missing from a file, not what was altered."""
    value = 0
    for key, text in sorted(texts.items()):
        value = zlib.crc32(f"{key}={text}".encode(), value)
    for key, tensor in sorted(stored.items()):
        value = zlib.crc32(f"{key}:{tensor.dtype}{tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _pack(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)], the mask's values as bits."""
    return torch.from_numpy(np.packbits(mask.numpy().ravel()))


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).view(np.bool_)).view(shape)
