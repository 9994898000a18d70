"""The bridge between Hydra and the typed configuration; nothing else of the package sees either's objects."""

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from de_ray.config import Config

CONF = Path(__file__).resolve().parent.parent / "conf"
CONFIG_FILE = "config.yaml"
"""Of a run's folder: the configuration that it ran with."""


def register() -> None:
    """Store the schema that `conf/config.yaml` builds on."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """The checked dataclasses of a composed configuration.

    Raises:
        ValueError: a value is outside its range.
    """
    return OmegaConf.to_object(composed)


def compose(overrides: list[str]) -> Config:
    """Compose the configuration from `conf/` as `launch.py` does.

    Args:
        overrides: in Hydra's syntax.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(hydra_compose("config", overrides))


def resumed(folder: str, overrides: list[str]) -> tuple[Config, Path]:
    """The configuration and the folder of an interrupted run.

    Args:
        folder: of the run.
        overrides: given beside; only `resume=` itself is allowed, since a run continues as it was configured.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: other overrides were given.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: no {CONFIG_FILE} there; expected the output folder of a run, such "
                                "as outputs/digits-directed/...")
    others = [override for override in overrides if not override.lstrip("+").startswith("resume=")]
    if others:
        raise ValueError(f"resume={folder} continues with that run's own configuration; leave out {' '.join(others)}")
    return to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))), Path(folder)
