"""Commands as users type them, each in a process of its own, which forks from one that has imported torch already.

Importing takes a command longer than most of what tests ask of it. What is imported early starts no threads that matter
to a fork; Ray and MLflow, which do, and the package itself are left to each command. Workers of Ray that a command
starts are forked likewise, unless it is told otherwise.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.warm import server

SERVER = """
import contextlib, json, os, runpy, signal, sys
import hydra, matplotlib.pyplot, optuna, scipy.stats, sklearn.datasets, torch, torch._dynamo
from tests.warm import warm_workers
assert not {"ray", "mlflow", "de_ray"} & sys.modules.keys()

def serve():
    # Returns in children alone, which end as any script does.
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        else:
            child = os.fork()
            if child == 0:
                return order
            print(child, flush=True)
    sys.exit()

order = serve()
# What a shell starts in its background ignores Ctrl-C, and so does all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["environment"])
for number, path in enumerate((os.devnull, order["out"], order["err"])):
    os.dup2(os.open(path, os.O_RDWR), number)
first, *rest = order["arguments"]
with warm_workers(order["workers"]) if order["workers"] else contextlib.nullcontext():
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")
"""


class Python:
    """Starts `python ARGUMENTS` again and again."""

    def __init__(self) -> None:
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE)

    def ask(self, **order: object) -> int:
        """The server's answer: a process id, or an exit code."""
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *arguments: object, cwd: Path, env: Mapping[str, str], own_workers: bool = False) -> "Command":
        """A command that runs; its input is empty. With `own_workers` those of Ray are started as it starts them."""
        return Command(self, list(map(str, arguments)), cwd, env, own_workers)

    def close(self) -> None:
        """End the server; commands go on."""
        self.server.communicate(timeout=60)


class Command:
    """As much of `subprocess.Popen` as tests need."""

    def __init__(self, python: Python, arguments: list[str], cwd: Path, env: Mapping[str, str],
                 own_workers: bool) -> None:
        self.returncode: int | None = None
        self._python, self._arguments = python, arguments
        self._files = [tempfile.NamedTemporaryFile(mode="r", prefix="command-") for _ in range(2)]
        out, err = (file.name for file in self._files)
        self.pid = python.ask(arguments=arguments, cwd=str(cwd), environment=dict(env), out=out, err=err,
                              workers=None if own_workers else server())
        self._ended = os.pidfd_open(self.pid)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it has printed and told of errors."""
        with select.epoll() as poll:
            poll.register(self._ended, select.EPOLLIN)
            if not poll.poll(timeout):
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self._arguments, timeout, *(file.read() for file in self._files))
        os.close(self._ended)
        self.returncode = self._python.ask(wait=self.pid)
        printed = tuple(file.read() for file in self._files)
        for file in self._files:
            file.close()
        return printed

    def send_signal(self, number: int) -> None:
        """As a shell does."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """As a cluster does."""
        self.send_signal(signal.SIGTERM)
