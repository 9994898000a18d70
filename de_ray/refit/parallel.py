"""Distillation by several workers, on one machine or many: Ray Train starts them, torch averages their gradients.

Each batch is drawn as a single worker would draw it, and divided; gradients of equal parts average to that of the
whole, so that the student is the single worker's up to rounding (DistributedDataParallel, Li et al.,
arXiv:2006.15704). Workers start anew for each call: between the calls evolution has the machines.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from de_ray import device as devices
from de_ray.checks import last_line, require
from de_ray.cluster.join import ensure_ray
from de_ray.config import PoolConfig, RefitConfig
from de_ray.problem.base import Problem
from de_ray.refit.distill import Distiller, diverged
from de_ray.student import Student

SETTINGS = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
"""Relative paths in the problem's inputs stay what they are."""
STARTS = 20
"""How often, at most, Ray Train looks for the workers' places anew, half a minute each time; left alone, for ever."""


class ParallelDistiller:
    """The same contract as `Distiller`, by `config.workers` processes.

    Args:
        student: changed in place; masks are held.
        problem: inputs, teacher, divergence, augmentation.
        config: `workers` besides what `Distiller` uses.
        threads: of each worker, on a CPU.
        pool: of the evaluators, which have the same GPUs.

    Raises:
        ValueError: the cluster has fewer GPUs than there are to be workers, and no autoscaler that would make some.
    """

    def __init__(self, student: Student, problem: Problem, config: RefitConfig, threads: int,
                 pool: PoolConfig) -> None:
        ensure_ray()
        self._student, self._config, self._threads, self._gpus = student, config, threads, worker_gpus(pool)
        self._device = student.weights[0].device.type
        if self._device == "cuda" and not pool.autoscale:
            require_gpus(config.workers, pool)
        self._moments: dict[str, Tensor] = {}
        # Metrics and pictures hold what workers have no use for.
        teacher = problem.teacher.to("cpu")
        self._problem = ray.put(dataclasses.replace(problem, teacher=teacher, metrics=dict, pictures=None,
                                                    calibration=problem.calibration[:0].clone(),
                                                    held_out=problem.held_out[:0].clone()))
        problem.teacher.to(student.weights[0].device)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to continue."""
        return self._moments

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; other entries of `state` are ignored."""
        self._moments = {name: value for name, value in state.items() if name.startswith("adam.")}

    def run(self, steps: int, learning_rate: Callable[[int], float], generator: torch.Generator) -> float:
        """See `Distiller.run`.

        Raises:
            FloatingPointError: the divergence became NaN or infinite.
            ConnectionError: a worker failed; the reason stands in the message.
        """
        if not steps:
            return float("nan")
        outbox = _Outbox.remote()
        job = {"problem": self._problem, "config": self._config, "threads": self._threads, "outbox": outbox,
               "state": ray.put({**self._student.state(), **self._moments}),
               "rates": [learning_rate(step) for step in range(steps)], "generator": generator.get_state()}
        resources = {"CPU": 0, "GPU": self._gpus} if self._device == "cuda" else {"CPU": 0, "memory": 2**20}
        trainer = TorchTrainer(
            _work, train_loop_config=job,
            scaling_config=train.ScalingConfig(num_workers=self._config.workers, use_gpu=self._device == "cuda",
                                               resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if self._device == "cuda" else "gloo"),
            run_config=train.RunConfig(name="refit", worker_runtime_env={"env_vars": SETTINGS},
                                       failure_config=train.FailureConfig(controller_failure_limit=STARTS)))
        try:
            trainer.fit()
        except train.TrainingFailedError as error:
            raise ConnectionError(f"a worker of refit failed ({last_line(error)}); the run continues from its last "
                                  "checkpoint with: python launch.py resume=RUN_FOLDER") from error
        found = ray.get(outbox.take.remote())
        if isinstance(found, FloatingPointError):
            raise found
        values, self._moments, state, loss = found
        self._student.set_values(values)
        generator.set_state(state)
        return loss


def worker_gpus(pool: PoolConfig) -> float:
    """Of a GPU, what a worker is given: what the evaluators leave of it, so that there is no place for two workers."""
    share = pool.gpus_beside_workers
    if not 0 < share < 1:
        return 1.0
    return round(1 - share * int(1 / share), 4) or 1.0


def require_gpus(workers: int, pool: PoolConfig) -> None:
    """Raise `ValueError` where workers would wait for ever for a GPU each, or two of them be on one, which NCCL
    refuses."""
    gpus, share = int(ray.cluster_resources().get("GPU", 0)), pool.gpus_beside_workers
    require(workers <= gpus, "refit.workers", workers, f"at most {gpus}, the number of the cluster's GPUs")
    if not share:
        return
    if worker_gpus(pool) == 1:
        taken = min(gpus, pool.actors * math.ceil(share) or gpus)
        require(workers <= gpus - taken, "refit.workers", workers, f"at most {gpus - taken}, the GPUs that evaluators "
                f"of pool.gpus={share:g} leave to them; pool.gpus=null leaves a part of each")
    else:
        full = gpus * int(1 / share)
        require(not 0 < pool.actors < full, "pool.actors", pool.actors, f"0, or at least {full}, beside refit.workers: "
                "of a GPU without evaluators two workers would take a part")


@ray.remote(num_cpus=0)
class _Outbox:
    """Holds what the first worker has to say: Ray Train itself returns files and numbers alone."""

    def __init__(self) -> None:
        self._content: Any = None

    def put(self, content: Any) -> None:
        """Keep it."""
        self._content = content

    def take(self) -> Any:
        """Give it."""
        return self._content


def _work(job: dict) -> None:
    """One worker's part."""
    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    problem, state = ray.get([job["problem"], job["state"]])
    device = train.torch.get_device()
    problem.teacher.to(device)
    student = Student(problem.teacher, problem.layers, device)
    student.load_state(state)
    distiller = Distiller(student, problem, job["config"], (rank, workers),
                          partial(DistributedDataParallel, find_unused_parameters=True))  # layers may go uncalled
    distiller.load_state(state)
    generator = torch.Generator()
    generator.set_state(job["generator"])
    rates = job["rates"]
    with devices.threads(job["threads"]):
        try:
            own = distiller.run(len(rates), rates.__getitem__, generator)
        except FloatingPointError:
            own = float("nan")  # the others, whose parts may be finite, wait for this number all the same
    loss = torch.tensor(own, device=device)
    torch.distributed.all_reduce(loss)
    if rank == 0:
        mean = float(loss) / workers
        content = ((student.values(), distiller.state(), generator.get_state(), mean) if math.isfinite(mean)
                   else diverged(mean, len(rates)))
        ray.get(job["outbox"].put.remote(content))
