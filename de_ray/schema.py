"""The bridge between Hydra and the typed configuration; nothing else of the package sees either's objects."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
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
ALIKE = 0.8
"""Of difflib: keys that share little more than their group are below it, slips of the keyboard above."""


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


def refuse_unknown(arguments: list[str]) -> None:
    """Raise `ValueError` for `KEY=VALUE` with a key that no configuration has, for which Hydra would advise a plus, and
    then fail all the same.

    Args:
        arguments: of the command line. Hydra's own keys, groups that want a plus (of which it says so), deletions and
            whatever else is more than a dotted key are left to it.
    """
    groups = (path.name for path in CONF.iterdir() if path.is_dir())
    known = list(dict.fromkeys([*_keys(Config), "hydra.*", *groups]))
    for argument in arguments:
        found = re.match(r"([A-Za-z_][\w.]*)=", argument)
        if found is None or any(fnmatchcase(found[1], pattern) for pattern in known):
            continue
        meant = _meant(found[1], [one for one in known if not one.endswith("*")])
        way_out = (f"did you mean {' or '.join(meant)}?" if meant else
                   "--cfg job shows all, de_ray/config.py says what each means")
        raise ValueError(f"{argument}: no such key; {way_out}")


def _keys(group: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a group; below a mapping, which users fill, a glob of any."""
    for name, hint in typing.get_type_hints(group).items():
        yield prefix + name
        if typing.get_origin(hint) is dict:
            yield f"{prefix}{name}.*"
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _keys(part, f"{prefix}{name}.")


def _meant(key: str, known: list[str]) -> list[str]:
    """What a key that is not known may stand for: its last part in another group, or a slip of the keyboard."""
    by_last: dict[str, list[str]] = {}
    for one in known:
        by_last.setdefault(one.rpartition(".")[2], []).append(one)
    last = key.rpartition(".")[2]
    if last in by_last:
        return by_last[last]
    alike = get_close_matches(last, by_last, 1, ALIKE)
    return get_close_matches(key, known, 1, ALIKE) or (by_last[alike[0]] if alike else [])


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
