"""The command line that gives a configuration again."""

import contextlib
import re
import shlex
from collections.abc import Iterator

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from de_ray.config import Config
from de_ray.redact import without_credentials
from de_ray.schema import CONF, register

ELSEWHERE = ("tracking", "resume", "sweep", "cluster")
"""Groups that decide where a run goes, not what it does."""
PLAIN = re.compile(r"[A-Za-z_/.][\w/.:*?-]*")
"""Texts that Hydra reads without quotation marks; globs among them."""
WORDS = ("null", "true", "false", "nan", "inf")
"""Texts that it would read as something else."""


def overrides(config: Config) -> list[str]:
    """What differs from the defaults of the configuration's problem, in Hydra's syntax."""
    register()
    problem = f"problem={config.problem.name}"
    with _apart(), initialize_config_dir(str(CONF), version_base="1.3"):
        base = _plain(compose("config", [problem]))
    ours = _plain(OmegaConf.structured(config))
    for group in ELSEWHERE:
        ours.pop(group, None)
    return [problem, *_differences("", base, ours)]


def command_line(config: Config) -> str:
    """`python launch.py problem=... key=value ...`, as a shell takes it, without credentials."""
    return without_credentials(shlex.join(["python", "launch.py", *overrides(config)]))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Let Hydra compose within its own application, for which it has but one place."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


def _plain(config: DictConfig) -> dict:
    return OmegaConf.to_container(config)


def _differences(prefix: str, base: dict, ours: dict) -> Iterator[str]:
    more = {key: value for key, value in ours.items() if key not in base}
    # Of a mapping that users may extend, such as targets by layer glob. Hydra takes a number in braces for one.
    for key in [key for key in more if key.isdigit()]:
        yield f"+{prefix}{key}={_text(more.pop(key))}"
    if more:
        yield f"+{prefix.rstrip('.')}={_text(more)}"
    for key in (key for key in ours if key in base):
        value, name = ours[key], f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(base[key], dict):
            yield from _differences(f"{name}.", base[key], value)
        elif value != base[key]:
            yield f"{name}={_text(value)}"


def argument(key: str, value: object) -> str:
    """`KEY=VALUE` as a shell and Hydra read it, whatever blanks and signs are in it."""
    return shlex.quote(f"{key}={_text(value)}")


def _text(value: object) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    # A backslash means itself unless a quotation mark follows.
    quoted = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda found: 2 * found[1], quoted) + "'"
