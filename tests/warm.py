"""Workers of Ray for tests, forked from a process that has imported PyTorch.

A worker that starts from nothing takes ten seconds of a processor to import PyTorch and what captures a network's
graph, which is most of what tests of pools ask of it. Ray itself is left to each worker: it reads its environment once.
Sessions within pytest have such workers, and those of commands that tests start; nodes that `ray start` makes have
Ray's own. Processes that test side by side share a server, and kernels that are compiled once before they begin.

Raylets start this file as a script in place of Ray's, to have a worker forked by the server.
"""

import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

SHARED = "TESTS_WARM_SERVER"
"""Environment variable: the socket of the server that pytest's processes share."""
BACKLOG = 64
"""Workers that may ask at a time."""
END_SECONDS = 120
"""For which the server may take to end."""
COMMAND = "--python_worker_command="
"""What raylets are told to start workers by: an interpreter, Ray's script and its arguments."""


@contextlib.contextmanager
def warm_workers(path: str | None = None) -> Iterator[None]:
    """Nodes that this process starts meanwhile have such workers, by default of a server of its own."""
    from unittest import mock

    start, path = subprocess.Popen.__init__, path or server()

    def replaced(argument: str) -> str:
        if not argument.startswith(COMMAND):
            return argument
        _, script = argument.removeprefix(COMMAND).split(" ", 1)
        return f"{COMMAND}{sys.executable} -S -E {__file__} worker {path} {script}"

    def started(process: subprocess.Popen, command: list[str], *rest: object, **named: object) -> None:
        if any(isinstance(argument, str) and argument.startswith(COMMAND) for argument in command):
            command = [*map(replaced, command)]
        start(process, command, *rest, **named)

    with mock.patch.object(subprocess.Popen, "__init__", started):
        yield


@functools.cache
def server() -> str:
    """The socket of a warm server, of pytest's or of this process alone."""
    return os.environ.get(SHARED) or Server().warm()


class Server:
    """Forks workers; ends with the process that started it."""

    def __init__(self) -> None:
        import tempfile
        import weakref

        folder = tempfile.TemporaryDirectory(prefix="dr")  # short, as sockets' paths are
        self.path = os.path.join(folder.name, "warm")
        self._process = process = _start("serve", self.path)
        weakref.finalize(server, lambda: (process.communicate(timeout=END_SECONDS), folder.cleanup()))

    def warm(self) -> str:
        """Wait until it is; its socket."""
        assert self._process.stdout.readline() == b"warm\n"
        return self.path


def start_shared() -> Callable[[], None]:
    """Start what processes share that this one starts from now on; what is returned waits for it."""
    compiler, forks = _start("compile"), Server()
    os.environ[SHARED] = forks.path

    @functools.cache
    def ready() -> None:
        compiler.communicate()
        assert compiler.returncode == 0
        forks.warm()

    return ready


def _start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.warm", *arguments], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, cwd=os.path.dirname(os.path.dirname(__file__)))


def compile_kernels() -> None:
    """Compile most of the package's kernels into their cache, by a small run."""
    from de_ray.config import Config, EvolutionConfig, PoolConfig, QuantizationConfig, RefitConfig
    from de_ray.pipeline import run
    from tests.networks import branchy_problem

    evolution = EvolutionConfig(cycles=1, population=4, generations=1, criteria=["fisher", "obs", "kronecker"])
    run(branchy_problem(), Config(evolution=evolution, refit=RefitConfig(steps=1, final_steps=1), threads=1,
                                  pool=PoolConfig(kind="serial"),
                                  quantization=QuantizationConfig(trials=2, max_bits=3, refit_steps=1)))


def serve(path: str) -> None:
    """Fork on request until the input ends; returns in forks alone."""
    import gc
    import select
    import signal

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(BACKLOG)
    warm_up()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("warm", flush=True)
    while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return become(*received(connection))
        connection.close()


def warm_up() -> None:
    """Import what replicas do, and have PyTorch import what it puts off until a network is captured."""
    import torch
    from tqdm import tqdm

    from de_ray.evaluation.replica import Replica, ReplicaSetup
    from tests.networks import mlp_problem

    tqdm.monitor_interval = 0  # a thread
    with torch.random.fork_rng():
        Replica(ReplicaSetup(mlp_problem(), 64, "cpu", 1))
    assert len(os.listdir("/proc/self/task")) == 1 and "ray" not in sys.modules


def received(connection: socket.socket) -> tuple[list[int], str, dict[str, str], list[str]]:
    """Files, folder, environment and arguments of one who has asked."""
    import json

    size, files, _, _ = socket.recv_fds(connection, 4, 3)
    with connection, connection.makefile("rb") as stream:
        return files, *json.loads(stream.read(int.from_bytes(size, "little")))


def become(files: list[int], folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Be `python ARGUMENTS`."""
    import runpy

    import numpy as np

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    np.random.seed()
    sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def worker(path: str, script: str, *arguments: str) -> None:
    """What Ray's script does with these arguments. Where that is more than variables, it has to do it."""
    import json

    given = "--serialized-runtime-env-context="
    context = json.loads(next((one.removeprefix(given) for one in arguments if one.startswith(given)), "{}"))
    if context.get("command_prefix"):
        os.execv(sys.executable, [sys.executable, script, *arguments])
    os.environ.update(context.get("env_vars", {}))
    rest = [argument for argument in arguments if not argument.startswith((given, "--language="))]
    order = json.dumps([os.getcwd(), dict(os.environ), rest]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(order).to_bytes(4, "little")], [0, 1, 2])
        connection.sendall(order)


if __name__ == "__main__":
    {"serve": serve, "worker": worker, "compile": compile_kernels}[sys.argv[1]](*sys.argv[2:])
