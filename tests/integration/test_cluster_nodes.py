"""Several nodes for real: in one process tree, and started apart and joined by address; jobs sent from outside.

`test_faults.py` holds what faults do to a pool; here whole runs are held to the serial run's file.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from de_ray.cluster.submit import Connection, follow, submit
from de_ray.config import ClusterConfig, Config, PoolConfig
from de_ray.evaluation.ray_pool import RayPool
from de_ray.pipeline import run
from de_ray.problem.build import build_problem
from de_ray.schema import compose
from tests.clusters import head_alone

REPOSITORY = Path(__file__).parents[2]
QUICK = ["evolution.cycles=4", "evolution.population=4", "evolution.generations=1", "evolution.saliency_inputs=256",
         "refit.steps=10", "refit.final_steps=20", "quantization.trials=3", "quantization.max_bits=4",
         "quantization.refit_steps=10", "problem.calibration_size=256", "problem.teacher.epochs=5",
         "problem.teacher.learning_rate=0.002", "tracking.enabled=false"]
START_SECONDS = 180
"""More than Ray takes to start on a busy machine."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def cached(work):
    """The environment of processes, with a cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DE_RAY_CACHE", str(work / "cache"))
        yield


@pytest.fixture(scope="module")
def expected(cached):
    """The serial run's file."""
    config = compose(["pool=serial", *QUICK])
    return run(build_problem(config.problem, config.seed), config).data


# Nodes in one process tree.

@pytest.fixture
def cluster():
    """A head without work, not even Tune's trials; tests add nodes."""
    ray.shutdown()
    with head_alone(memory=1) as nodes:
        yield nodes


def places(pool):
    """Node ids of a pool's actors."""
    return [ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()),
                    timeout=START_SECONDS) for actor in pool.actors]


def test_a_run_that_waits_for_its_three_nodes_loses_one_and_gains_one_ends_in_the_serial_runs_file(
        cluster, expected, tmp_path, monkeypatch):
    added, pools, seen = [], [], []

    class Watched(RayPool):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(self)
            added.extend(cluster.add_node(num_cpus=1) for _ in range(3))  # what an autoscaler would do

    def gather(count):
        deadline = time.monotonic() + START_SECONDS
        # Until the pool has noticed who left, too: each actor has to be asked something.
        while len(pools[0].actors) != count and time.monotonic() < deadline:
            pools[0].evaluate([()] * 3 * config.pool.stack, [0])
            time.sleep(0.3)  # what starts needs the processor
        seen.append(set(places(pools[0])))

    def on_record(record, total):
        if record.cycle == 1:
            gather(3)
            cluster.remove_node(added[0], allow_graceful=False)
        elif record.cycle == 2:
            gather(2)
            added.append(cluster.add_node(num_cpus=1))
        elif record.cycle == 3:
            gather(3)

    # Where the pool's class is looked up; what the run does with it is untouched.
    monkeypatch.setattr("de_ray.evaluation.ray_pool.RayPool", Watched)
    config = compose([*QUICK, "pool.autoscale=true", "pool.gpus=0", "pool.actors=3",
                      f"cluster.storage={tmp_path / 'shared'}"])
    result = run(build_problem(config.problem, config.seed), config, tmp_path, on_record)
    assert result.data == expected
    ids = [node.node_id for node in added]
    assert seen == [set(ids[:3]), set(ids[1:3]), set(ids[1:4])], "one actor a node"
    trials = list((tmp_path / "shared").glob("*/*/sweep/WidthTrial*"))
    assert len(trials) == 3, "Tune's records, of trials that the head has no memory for"


# Nodes started apart.

class Apart:
    """A head without work and two nodes of four CPUs, each started by `ray start` with folders of its own.

    Ray fills half of a node's CPUs before it turns to the next one, unless it is told to spread.
    """

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        home = folder / "home"
        (home / ".ray").mkdir(parents=True)
        (home / ".ray/auth_token").write_text(secrets.token_hex(32))
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "HOME": str(home), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        self.processes = []

    def start(self, name, *arguments):
        cwd = self.folder / name
        cwd.mkdir()
        # Sockets' paths are short; pytest's folders are not.
        temporary = Path("/tmp") / f"de-ray-{secrets.token_hex(4)}"
        log = open(self.folder / f"{name}.log", "w")  # noqa: SIM115, the process's until its end
        # Jobs go through each node's agent: on the usual port another cluster's may listen.
        agent, metrics = free_ports(2)
        arguments = [*arguments, f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        self.processes.append((subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--block", f"--temp-dir={temporary}", *arguments], cwd=cwd,
            env=self.environment, stdout=log, stderr=log, start_new_session=True), temporary))

    def stop(self):
        import shutil

        for process, _ in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process, temporary in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(temporary, ignore_errors=True)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def apart(work, cached, python):
    """The cluster with its address and dashboard; its environment is the user's, who has the token but no more."""
    nodes = Apart(work, python)
    port, dashboard = free_ports(2)
    nodes.address, nodes.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    try:
        nodes.start("head", "--head", f"--port={port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={dashboard}")
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.2)
        for name in ("first", "second"):
            nodes.start(name, f"--address=127.0.0.1:{port}", "--num-cpus=4")
        del nodes.environment["RAY_AUTH_MODE"]
        yield nodes
    finally:
        nodes.stop()


def command(nodes, *arguments, cwd, expect, **environment):
    """What `python ARGUMENTS` printed, which is to end with a code."""
    process = nodes.python.start(*arguments, cwd=cwd, env=nodes.environment | environment)
    told = "".join(process.communicate(timeout=300))
    assert process.returncode == expect, told
    return told


def launch(nodes, *overrides, expect=0, **environment):
    return command(nodes, REPOSITORY / "launch.py", *overrides, *QUICK, cwd=nodes.folder, expect=expect, **environment)


SPREAD = """
import sys, time, numpy as np, ray
from de_ray.cluster.join import ensure_ray
from de_ray.config import PoolConfig
from de_ray.evaluation.ray_pool import RayPool
from de_ray.evaluation.replica import ReplicaSetup
from de_ray.student import Student
from tests.networks import mlp_problem
ensure_ray(sys.argv[1])
while len([node for node in ray.nodes() if node["Alive"]]) < 3:
    time.sleep(0.2)
problem = mlp_problem()
with RayPool(ReplicaSetup(problem, 64, "cpu", 1), PoolConfig(actors=2), Student(problem.teacher, problem.layers)) as p:
    while len(p.actors) < 2:
        p.evaluate([()], [0])
    print(len({ray.get(a.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) for a in p.actors}))
"""


def test_actors_are_spread_over_nodes_that_could_each_hold_them_all(apart):
    told = command(apart, "-c", SPREAD, apart.address, cwd=REPOSITORY, expect=0)
    assert told.splitlines()[-1] == "2", told


def test_a_folder_that_one_node_does_not_share_is_named_before_the_run_starts(apart):
    # /proc/self/cwd is another folder in each of the cluster's processes: a disk that is mounted on one node alone.
    told = launch(apart, f"cluster.address={apart.address}", "cluster.storage=/proc/self/cwd/disk", expect=1)
    assert re.search(r"error: node \S+ \(\w{8}\): /proc/self/cwd/disk/\S+ is not the driver's folder there", told)
    assert len(re.findall(r"node \S+ \(", told)) == 3 and "Traceback" not in told and "evolve" not in told


def test_a_run_that_joined_by_address_with_a_token_ends_in_the_serial_runs_file(apart, expected):
    launch(apart, f"cluster.storage={apart.folder / 'shared'}", "pool.actors=2", "hydra.run.dir=runs/joined",
           RAY_ADDRESS=apart.address)
    assert (apart.folder / "runs/joined/student.der").read_bytes() == expected
    mirror = apart.folder / "shared/runs/joined"
    assert (mirror / "student.der").read_bytes() == expected
    assert {path.name for path in (mirror / "checkpoint").iterdir()} == {"step-0004.safetensors",
                                                                        "step-0005.safetensors"}


def test_joining_without_the_token_is_one_clear_error(apart, tmp_path):
    told = launch(apart, f"cluster.address={apart.address}", expect=1, RAY_AUTH_MODE="token", HOME=str(tmp_path))
    assert f"error: cluster.address={apart.address}: Ray's token authentication refused" in told
    assert "RAY_AUTH_TOKEN_PATH" in told and "Traceback" not in told


# Jobs.

def later(seconds, action, *arguments):
    """Do something in a while, unless the process has ended by then."""
    timer = threading.Timer(seconds, action, arguments)
    timer.daemon = True
    timer.start()


class Line:
    """A way to a port that can be cut."""

    def __init__(self, target):
        self.target = target
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.dead, self.sockets = False, []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                try:
                    far = None if self.dead else socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # the target is not up yet
                    far = None
                if far is None:
                    near.close()
                    continue
                self.sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self, seconds):
        self.dead = True
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        later(seconds, setattr, self, "dead", False)


@pytest.fixture
def line(apart):
    one = Line(int(apart.dashboard.rpartition(":")[2]))
    yield one
    one.cut(0)
    one.server.close()


@pytest.fixture
def token(apart, monkeypatch):
    """This process shows the cluster's token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", (apart.folder / "home/.ray/auth_token").read_text())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # Ray would rather believe this than what it is told
    from ray._raylet import AuthenticationTokenLoader
    from ray._raylet import Config as RayConfig

    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    yield
    monkeypatch.undo()
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def test_a_cut_line_costs_neither_a_line_of_the_log_nor_the_exit_code(line, token, tmp_path, capsys):
    (tmp_path / "count.py").write_text(
        "import ray, sys, time\nfrom de_ray.cluster.join import ensure_ray\nensure_ray('auto')\n"
        "while len(ray.nodes()) < 3:\n    time.sleep(0.2)\n"
        "print('line', len(ray.nodes()), 'nodes', flush=True)\n"
        "for i in range(12):\n    print('line', i, flush=True)\n    time.sleep(0.4)\nsys.exit(7)\n")
    connection = Connection(ClusterConfig(dashboard=f"http://127.0.0.1:{line.port}", submit=True))
    job = submit(connection, "python count.py", tmp_path)

    def cut():
        while "line 4" not in connection.client().get_job_logs(job):
            time.sleep(0.2)
        line.cut(2)

    threading.Thread(target=cut).start()
    assert follow(connection, job) == 7
    shown = [text for text in capsys.readouterr().out.splitlines() if text.startswith("line")]
    assert shown == ["line 3 nodes", *(f"line {i}" for i in range(12))]


def test_a_dashboard_that_stays_away_is_one_error_that_says_how_to_attach_again(line, token, tmp_path):
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(3600)\n")
    connection = Connection(ClusterConfig(dashboard=f"http://127.0.0.1:{line.port}", submit=True, patience=1.5))
    job = submit(connection, "python wait.py", tmp_path)
    later(2, line.cut, 1000)
    try:
        with pytest.raises(ConnectionError, match=rf"patience=1.5 s; attach again .*cluster.attach={job}"):
            follow(connection, job)
    finally:
        line.dead = False
        connection.client().stop_job(job)


def test_a_submitted_run_streams_its_log_ends_with_its_exit_code_and_can_be_attached_to(apart, expected, tmp_path):
    # The run's own folder lies where the head's job has it.
    def send(*overrides, expect, cwd):
        return command(apart, REPOSITORY / "launch.py", *overrides, cwd=cwd, expect=expect)

    off = [f"cluster.dashboard={apart.dashboard}", f"hydra.run.dir={apart.folder / 'runs/submitted'}"]
    # From a user's folder: the nodes have de_ray installed.
    told = send("+cluster=aws", "cluster.submit=true", f"cluster.storage={apart.folder / 'shared'}", "pool=serial",
                *off, *QUICK, expect=0, cwd=tmp_path)
    assert (apart.folder / "shared/runs/submitted/student.der").read_bytes() == expected
    assert "equals the student, bit for bit" in told and "/data/" not in told
    job = re.search(r"de-ray-\d{8}-\d{6}-[0-9a-f]{6}", told)[0]
    again = send(f"cluster.attach={job}", *off, expect=0, cwd=tmp_path)
    assert "equals the student, bit for bit" in again
    # From the repository, whose own package is sent along.
    failed = send("cluster.submit=true", *off, "problem=custom", "problem.model=nowhere:build",
                  "problem.calibration=inputs.npy", expect=1, cwd=REPOSITORY)
    assert "error: " in failed and "nowhere" in failed


def test_ray_that_a_run_starts_listens_on_loopback_for_people_asks_for_a_token_and_has_actors_of_full_priority():
    code = ("import os, ray\nfrom de_ray.cluster.join import ensure_ray\nensure_ray()\n"
            "node = ray._private.worker._global_node\n"
            "print(os.environ['RAY_AUTH_MODE'], node.webui_url or '-', node._ray_params.ray_client_server_port,\n"
            "      ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, text=True,
                           capture_output=True, timeout=120)
    assert ended.stdout.split() == ["token", "-", "None", "0"], ended.stderr


def test_the_clusters_configurations_are_what_the_schema_allows():
    for name in ("local", "aws", "kuberay", "slurm"):
        config = compose([f"+cluster={name}"])
        assert isinstance(config, Config) and config.cluster.address == ("local" if name == "local" else "auto")
    assert config.pool.autoscale == (name in ("aws", "kuberay"))
    assert compose([]).cluster == ClusterConfig() and compose([]).pool == PoolConfig()
