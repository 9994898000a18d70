"""Off the cluster: send a command there as a Ray job, show its log, end with its exit code, survive a lost connection.

A job's log is a file on the cluster's head. Whoever is connected anew is sent all of it, so that the number of
characters already shown is all that has to be remembered.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hydra.types import RunMode

from de_ray.checks import first_line
from de_ray.cluster.join import TOKEN_HELP, use_token
from de_ray.config import ClusterConfig
from de_ray.redact import without_credentials

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger(__name__)
T = TypeVar("T")

ENTRY = "python -m de_ray.launch"
"""With the working folder first on its path, so that a repository's own package is the one that runs."""
EXCLUDES = ["/outputs/", "/multirun/", "/data/", "/datasets/", "/mlartifacts/", "/mlruns/", "/build/", "/dist/",
            "mlflow.db*", ".git/", ".venv/", "venv/", "__pycache__/", "*.egg-info/", ".pytest_cache/", ".hypothesis/",
            ".ruff_cache/", ".env", ".env.*", "*.pem", "*.key", ".netrc", ".aws/", ".ssh/", ".ray/"]
"""Of the working folder, in .gitignore's syntax besides its own .gitignore and .rayignore: what is large and of this
machine, and what holds secrets. A leading slash leaves folders of the same name inside the package alone."""
FORWARDED = ("MLFLOW_TRACKING_URI", "DE_RAY_STORAGE")
"""Of the environment, what the job is given; the dashboard shows it to everybody who may open it."""
BACKOFF = 1.0, 30.0
"""First and longest pause in seconds between two attempts; each is twice the one before."""


def run_job(config: ClusterConfig, hydra: "HydraConf") -> int:
    """Submit the command line, or attach to a job, and follow it to its end.

    Args:
        config: with `submit` or `attach`.
        hydra: Hydra's own configuration, which knows the overrides.

    Returns:
        The job's exit code; 130 where Ctrl-C ended the following, which the job does not notice.

    Raises:
        ValueError: the command cannot be sent.
        ConnectionError: the dashboard did not answer for `config.patience` seconds.
    """
    connection = Connection(config)
    job = config.attach
    if job is None:
        if hydra.mode == RunMode.MULTIRUN:
            raise ValueError("cluster.submit=True: expected one run, not --multirun, whose jobs would be sent one by "
                             "one as each ends; submit runs one at a time")
        job = submit(connection, entrypoint([*hydra.overrides.task, *hydra.overrides.hydra]), Path.cwd())
    try:
        return follow(connection, job)
    except KeyboardInterrupt:
        log.warning("%s goes on; %s. To stop it: ray job stop --address %s %s", job, _again(config, job),
                    config.dashboard, job)
        return 130


def entrypoint(overrides: list[str]) -> str:
    """The command that does there what the overrides say here.

    Raises:
        ValueError: they carry a password, which the dashboard would show.
    """
    ours = ("cluster.submit=", "cluster.dashboard=", "cluster.attach=", "cluster.patience=", "hydra.mode=")
    command = shlex.join([*shlex.split(ENTRY), *(o for o in overrides if not o.lstrip("+").startswith(ours))])
    _require_no_credentials("the command line", command)
    return command


def _require_no_credentials(what: str, text: str) -> None:
    if without_credentials(text) != text:
        raise ValueError(f"{what} holds a password or a token, which Ray's dashboard would show: expected it in the "
                         f"environment of the cluster's nodes; it reads {without_credentials(text)}")


class Connection:
    """Calls of the dashboard, made again for a while where it does not answer.

    Args:
        config: says where it is and for how long.

    Raises:
        ConnectionError: it did not answer.
        ValueError: Ray's part for jobs is not installed here, or too old there.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        use_token()
        self._client: JobSubmissionClient | None = None

    def client(self) -> "JobSubmissionClient":
        """Connected to the configured dashboard, whatever RAY_ADDRESS says, which Ray itself would rather believe."""
        from ray.job_submission import JobSubmissionClient

        if self._client is None:
            with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
                self._client = JobSubmissionClient(self.config.dashboard)
        return self._client

    def call(self, action: "Callable[[JobSubmissionClient], T]", job: str | None = None) -> T:
        """The answer to an action.

        Args:
            action: may be carried out several times.
            job: to be named in the error where it is out of reach.
        """
        import requests
        from ray.exceptions import AuthenticationError

        pause, longest = BACKOFF
        deadline = time.monotonic() + self.config.patience
        while True:
            try:
                return action(self.client())
            except AuthenticationError as error:
                raise ConnectionError(f"cluster.dashboard={self.config.dashboard}: {first_line(error)}; "
                                      f"{TOKEN_HELP}") from error
            except (ConnectionError, requests.RequestException, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not _is_passing(error):
                    raise ValueError(f"cluster.dashboard={self.config.dashboard}: {first_line(error)}") from error
                if time.monotonic() + pause > deadline:
                    advice = _again(self.config, job) if job else "check that it is forwarded to this machine"
                    raise ConnectionError(f"cluster.dashboard={self.config.dashboard} did not answer for "
                                          f"cluster.patience={self.config.patience:g} s; {advice}") from error
                log.warning("no answer from %s; trying again in %g s", self.config.dashboard, pause)
            time.sleep(pause)
            pause = min(2 * pause, longest)


def submit(connection: Connection, command: str, folder: Path) -> str:
    """Package a folder and start a command in it on the cluster; returns the job's id."""
    variables = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    for name, value in variables.items():
        _require_no_credentials(name, value)
    environment = {"working_dir": str(folder), "excludes": EXCLUDES, "env_vars": variables}
    job = f"de-ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"

    def start(client: "JobSubmissionClient") -> str:
        # The answer to an earlier attempt may have been lost after the job had started.
        if job not in {found.submission_id for found in client.list_jobs()}:
            client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)
        return job

    connection.call(start)
    log.info("submitted %s: %s", job, command)
    log.info("should this end before the job does, %s", _again(connection.config, job))
    return job


def follow(connection: Connection, job: str) -> int:
    """Print a job's log until the job has ended; returns its exit code."""
    shown = 0

    async def tail(client: "JobSubmissionClient") -> None:
        nonlocal shown
        position = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, shown - position):]
            position += len(text)
            shown = max(shown, position)
            sys.stdout.write(new)
            sys.stdout.flush()

    while True:
        with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError):  # the next call looks into it
            asyncio.run(tail(connection.call(lambda client: client, job)))
        info = connection.call(lambda client: client.get_job_info(job), job)
        if info.status.is_terminal():
            rest = connection.call(lambda client: client.get_job_logs(job), job)[shown:]
            sys.stdout.write(rest)
            sys.stdout.flush()
            if info.driver_exit_code is None:
                log.error("%s ended as %s: %s", job, info.status, info.message)
            code = info.driver_exit_code
            return code if code is not None else int(str(info.status) != "SUCCEEDED")
        log.warning("lost the log of %s, which goes on; connecting again", job)
        time.sleep(BACKOFF[0])


def _is_passing(error: RuntimeError) -> bool:
    """Whether the dashboard, or a proxy before it, may answer otherwise in a while."""
    return any(f"status code {code}" in str(error) for code in (502, 503, 504))


def _again(config: ClusterConfig, job: str) -> str:
    return f"attach again with: python launch.py cluster.dashboard={config.dashboard} cluster.attach={job}"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """An environment without some variables."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
