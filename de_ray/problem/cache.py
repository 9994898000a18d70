"""The folder for what is made or fetched once: trained teachers, downloaded data sets, passes over all inputs."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from de_ray.files import write_atomically

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`DE_RAY_CACHE` where it is set, else `~/.cache/de_ray`. Not created here."""
    chosen = os.environ.get("DE_RAY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "de_ray"


def kept(kind: str, parts: Iterable[str | Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """A tensor that takes long to compute, from the cache where it has been computed before.

    A cache that cannot be read or written costs the time, and a warning.

    Args:
        kind: what it is; a folder in the cache.
        parts: everything that determines it, tensors on the CPU.
        compute: makes it.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.contiguous().numpy())
    path = cache_folder() / kind / f"{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            return load_file(path)[kind]
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            log.warning("%s is damaged and made anew: %s", path, error)
    value = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({kind: value}))
    except OSError as error:
        log.warning("%s is not kept: %s", kind, error)
    return value
