"""Start Ray on this machine, or join a cluster that runs.

Ray's token authentication (on by default since Ray 2.60 where a token exists) is the one thing that joining by address
needs a hand with. `ray.init(address="auto")` takes up a token by itself; with HOST:PORT or RAY_ADDRESS it does not, and
gives up after 20 s with an error that names no cause.
"""

import logging
import os
import socket
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from de_ray.checks import first_line
from de_ray.cluster.address import LOCAL, chosen
from de_ray.signals import sigterm_kept

log = logging.getLogger(__name__)

TOKEN_FILE = ".ray/auth_token"
"""In the home folder, where `ray get-auth-token --generate` writes."""
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 5.0
"""Patience with a head's port."""
TOKEN_HELP = ("the cluster's token belongs in ~/.ray/auth_token, in a file named by RAY_AUTH_TOKEN_PATH, or in "
              "RAY_AUTH_TOKEN, on this machine as on all nodes (`ray get-auth-token` on the head prints it), "
              "with RAY_AUTH_MODE=token")


def ensure_ray(address: str | None = None) -> None:
    """Have Ray in this process, unless it is there already: the jobs of a multirun share one session.

    Args:
        address: see `ClusterConfig.address`.

    Raises:
        ConnectionError: the cluster cannot be joined.
    """
    if ray.is_initialized():
        return
    address = chosen(address)
    if address == LOCAL:
        _start()
    else:
        _join(os.environ.get("RAY_ADDRESS") or address if address == "auto" else address)


def _start() -> None:
    """Ray on this machine alone: no dashboard, no port for Ray Client, and every other port asks for a token.

    Actors run at the priority of everything else. At Ray's default, 15, they starve beside other processes that
    compute; on an idle machine it makes no difference.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        _turn_tokens_on()
    os.environ.setdefault("RAY_worker_niceness", "0")
    with sigterm_kept():
        ray.init(address=LOCAL, include_dashboard=False, dashboard_host=LOOPBACK, logging_level=logging.WARNING,
                 log_to_driver=False)


def _join(address: str) -> None:
    use_token()
    if address != "auto":
        _require_listener(address)
    try:
        with sigterm_kept():
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except AuthenticationError as error:
        raise ConnectionError(f"cluster.address={address}: Ray's token authentication refused this machine; "
                              f"{TOKEN_HELP}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == "auto":
            raise ConnectionError("cluster.address=auto: no Ray cluster runs on this machine; run on a node of one, "
                                  "set RAY_ADDRESS=HOST:PORT, or send the command there with cluster.submit=true "
                                  f"cluster.dashboard=http://HOST:8265 ({first_line(error)})") from error
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        raise ConnectionError(f"cluster.address={address}: {first_line(error)}. Where Ray listens there, check that "
                              "its version is this machine's, and the token (RAY_AUTH_MODE is "
                              f"{mode} here): {TOKEN_HELP}") from error


def use_token() -> None:
    """Offer the cluster a token where the user has one and has not said by RAY_AUTH_MODE whether to.

    A cluster that asks for none ignores it. It gives nothing away to a cluster whose code this process runs anyway.
    """
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if "RAY_AUTH_MODE" in os.environ or not (
            os.environ.get("RAY_AUTH_TOKEN") or Path(given or Path.home() / TOKEN_FILE).is_file()):
        return
    _turn_tokens_on()


def _turn_tokens_on() -> None:
    """Token authentication for this process and its children; Ray itself has read the environment long ago."""
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray._raylet import Config

    Config.initialize("")


def _require_listener(address: str) -> None:
    """Say at once that nobody listens, which Ray finds out in half a minute and many lines."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"cluster.address={address}: nobody listens there ({error}); expected HOST:PORT of a "
                              "cluster's head, such as 10.0.0.1:6379") from error
