"""The folder for what is made or fetched once: trained teachers and downloaded data sets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`DE_RAY_CACHE` where it is set, else `~/.cache/de_ray`. Not created here."""
    chosen = os.environ.get("DE_RAY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "de_ray"
