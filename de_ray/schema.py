"""The bridge between Hydra and the typed configuration; nothing else of the package sees either's objects."""

import dataclasses
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from de_ray.checks import require
from de_ray.config import Config

CONF = next(folder for folder in (Path(__file__).parent / "conf", Path(__file__).resolve().parent.parent / "conf")
            if folder.is_dir())
"""The first is in wheels, and in the repository a link to the second for the sake of wheels; not every checkout holds
links."""
CONFIG_FILE = "config.yaml"
"""Of a run's folder: the configuration that it ran with."""


def register() -> None:
    """Store the schema that `conf/config.yaml` builds on."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """The checked dataclasses of a composed configuration.

    Raises:
        ValueError: a value is outside its range, or a key is none of the schema's.
    """
    config = OmegaConf.to_object(composed)
    _require_known(config, "")
    return config


def _require_known(config: object, prefix: str) -> None:
    """Refuse keys that `+KEY=VALUE` put beside the schema's: nothing reads them, be they misspelt or `_target_`."""
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in vars(config).items():
        require(name in known, f"+{prefix}{name}", value, "no such key; there are " + ", ".join(sorted(known)))
        if dataclasses.is_dataclass(value):
            _require_known(value, f"{prefix}{name}.")


def compose(overrides: list[str]) -> Config:
    """Compose the configuration from `conf/` as `launch.py` does.

    Args:
        overrides: in Hydra's syntax.
    """
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(hydra_compose("config", overrides))


def refuse_without_plus(arguments: list[str]) -> None:
    """Raise `ValueError` for `cluster=NAME`, at which Hydra would print six lines, and for `sweep.KEY=VALUE` without a
    sweep, at which it would fail with a traceback.

    Neither group is in the root's defaults list, since a configuration in it would come before what the schema says and
    every run would carry one; hence they are added, not chosen.

    Args:
        arguments: of the command line.
    """
    sweeps = [argument for argument in arguments if argument.startswith("sweep.")]
    if sweeps and not any(argument.lstrip("+").startswith("sweep=") for argument in arguments):
        raise ValueError(f"{sweeps[0]}: there is no sweep; type +sweep=tune besides")
    for argument in arguments:
        name = argument.removeprefix("cluster=")
        if name != argument:
            known = ", ".join(f"+cluster={path.stem}" for path in sorted((CONF / "cluster").glob("*.yaml")))
            raise ValueError(f"{argument}: type +cluster={name or 'NAME'}; there are {known}")


def saved_config(path: Path) -> Config:
    """What a run's folder says that it was configured by.

    Raises:
        ValueError: it cannot be read, or holds what no configuration does.
    """
    try:
        return to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected what a run wrote there. Its mirror, where it has "
                         "one, holds a copy; otherwise start in a new folder") from error


def resumed(config: Config, overrides: list[str]) -> tuple[Config, Path]:
    """The configuration and the folder of an interrupted run.

    Args:
        config: of which `resume` is read, and `cluster` where overrides name it, with what that says of the pool: where
            a run continues is free. Its storage stays unless another one is named.
        overrides: given beside; no others are allowed, since a run continues as it was configured.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: other overrides were given.
    """
    folder = config.resume
    names = [override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides]
    others = [override for name, override in zip(names, overrides, strict=True) if name not in ("resume", "cluster")]
    if others:
        raise ValueError(f"resume={folder} continues with that run's own configuration; leave out {' '.join(others)}")
    if "://" in folder:
        from de_ray.cluster.storage import fetch

        folder = fetch(folder)
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: no {CONFIG_FILE} there; expected the output folder of a run, such "
                                "as outputs/digits-directed/...")
    saved = saved_config(path)
    if "cluster" not in names:
        return saved, Path(folder)
    cluster = config.cluster
    if cluster.storage is None and not any(one.lstrip("+").startswith("cluster.storage=") for one in overrides):
        cluster = dataclasses.replace(cluster, storage=saved.cluster.storage)
    pool = dataclasses.replace(saved.pool, autoscale=config.pool.autoscale)
    return dataclasses.replace(saved, cluster=cluster, pool=pool), Path(folder)
