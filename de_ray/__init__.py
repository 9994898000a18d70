"""Neural-network compression by Directed Evolution.

`compress` and `load` are all that most users need. They are imported on first use, so that `import de_ray` costs
nothing and reading a file imports neither Ray nor Hydra nor MLflow.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from de_ray.api import compress
    from de_ray.codec import DamagedFileError, load

__all__ = ["DamagedFileError", "compress", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "compress":
        from de_ray.api import compress

        return compress
    if name in ("load", "DamagedFileError"):
        from de_ray import codec

        return getattr(codec, name)
    raise AttributeError(f"module 'de_ray' has no attribute {name!r}")
