"""The command line: `python launch.py OVERRIDES`, or `python -m de_ray.launch OVERRIDES` where only the wheel is."""

import logging
import shutil
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from de_ray.evaluation.members import EvaluationError
from de_ray.files import unwritable
from de_ray.redact import redact_logs, without_credentials
from de_ray.schema import CONF, refuse_unknown, refuse_without_plus, register, resumed, to_config

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(composed: DictConfig) -> float:
    """Compose, validate, hand over; returns the held-out divergence, for sweepers."""
    hydra_config = HydraConfig.get()
    try:
        config, folder = to_config(composed), Path(hydra_config.runtime.output_dir)
        if config.cluster.submit or config.cluster.attach:
            from de_ray.cluster.submit import run_job

            sys.exit(run_job(config.cluster, hydra_config))
        if config.resume is not None:
            config, folder = resumed(config, list(hydra_config.overrides.task))
            _log_into(folder, Path(hydra_config.runtime.output_dir))
        # Imports torch and MLflow, which a mistyped override need not wait for.
        from de_ray.multirun import parent_of
        from de_ray.session import run_session

        return run_session(config, folder, parent_of(hydra_config)).report["divergence"]["held_out"]
    except (ValueError, OSError, FloatingPointError, MemoryError, OmegaConfBaseException, EvaluationError) as error:
        _leave_nothing(Path(hydra_config.runtime.output_dir))
        # What users can mend is told in one line, which a traceback would hide; hydra.verbose=true shows both.
        log.debug("where it happened", exc_info=True)
        sys.exit(without_credentials(f"error: {str(error) or type(error).__name__}"))
    except KeyboardInterrupt:
        sys.exit(130)


def _log_into(folder: Path, made: Path) -> None:
    """Have a run that is continued go on with its own log, and leave nothing of the folder that Hydra made for it."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(made.absolute()):
            own = logging.FileHandler(folder / Path(handler.baseFilename).name)
            own.setFormatter(handler.formatter)
            root.removeHandler(handler)
            handler.close()
            root.addHandler(own)
    _leave_nothing(made)


def _leave_nothing(folder: Path) -> None:
    """Remove the log that Hydra made in a folder, if nothing is in it, and the folder, if nothing else is."""
    made = folder / f"{HydraConfig.get().job.name}.log"
    if made.is_file() and not made.stat().st_size:
        made.unlink()
        if all(path.is_dir() for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_unwritable(arguments: list[str]) -> None:
    """Raise `PermissionError` where no run's folder can be made, which Hydra would tell by a traceback.

    Args:
        arguments: of the command line; commands that make no folder are not checked, nor are folders that depend on
            more of Hydra's options than the one that names them.
    """
    sweeps = {"-m", "--multirun"}
    if any(argument.startswith("-") and argument not in sweeps for argument in arguments):
        return
    key, usual = ("hydra.sweep.dir", "multirun") if sweeps.intersection(arguments) else ("hydra.run.dir", "outputs")
    ours = [argument for argument in arguments if argument.lstrip("+").startswith("hydra.")]
    chosen = [argument for argument in ours if argument.lstrip("+").startswith(f"{key}=")]
    if ours and not chosen:
        return
    folder = _plain_path(chosen[-1]) if chosen else Path(usual).absolute()
    reason = folder and unwritable(folder)
    if reason:
        raise PermissionError(f"{folder} cannot be written to: {reason}; expected a folder that can, by {key}=FOLDER")


def _plain_path(argument: str) -> Path | None:
    """The path in `KEY=PATH`; None where only Hydra can tell it."""
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:  # it says itself what it cannot read
        return None
    return Path(value) if isinstance(value, str) and "${" not in value else None


def main() -> None:
    """The command."""
    try:
        refuse_without_plus(sys.argv[1:])
        refuse_unknown(sys.argv[1:])
        refuse_unwritable(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(without_credentials(f"error: {error}"))
    redact_logs()
    register()
    run()


if __name__ == "__main__":
    main()
