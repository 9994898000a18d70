"""How busy one driver keeps many replicas that sleep for a candidate's time, as GPUs would compute for it.

Generations of `DirectedSearch` with racing on are cut into the pool's tasks, of which two a replica are handed out, and
which replicas take from one queue as they become idle; what is left out is Ray's own messages, which `bench_scaling.py`
measures. A replica is busy for the time that it was to sleep: what waking up late costs counts as idle. By two clocks:

- wall: replicas sleep. One thread keeps all their alarms: hundreds of threads that wait for Python's lock would measure
  that lock.
- processor: nobody sleeps. What the driver does between two tasks, and to breed each block, is counted by the processor
  time that it takes, and the schedule that follows from it is computed, for a driver of `--cores`: one for its Python,
  the others, at least one, for breeding. Other work on the machine counts as far as it slows this one's down.

The last line is one JSON object.

    python tests/benchmarks/bench_simulated.py --replicas 512 --milliseconds 50
    python tests/benchmarks/bench_simulated.py --clock processor --cores 2 --oversample 4
"""

import argparse
import gc
import heapq
import json
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import de_ray.evolution.search
from de_ray.config import EvolutionConfig
from de_ray.evaluation.chunks import tasks
from de_ray.evolution.brood import Brood
from de_ray.evolution.candidate import Candidate, blocks
from de_ray.evolution.request import Request
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import DiagonalSurrogate

BATCHES = 8
"""Calibration batches; the time of a candidate is that of all of them."""


@dataclass(eq=False)
class Job:
    """A request that is under way."""

    request: Request
    tasks: Iterator[list[int]]
    fitness: np.ndarray
    left: int
    """Candidates that are not answered."""


class Replicas(ABC):
    """The driver's side: hands out tasks as the real pool does, two a replica, those that are not for screening first.

    Args:
        replicas: how many.
        seconds: of a candidate on all batches.
        stack: candidates a task, at most.
    """

    def __init__(self, replicas: int, seconds: float, stack: int) -> None:
        self._replicas, self._seconds, self._stack = replicas, seconds, stack
        self._unread: list[Job] = []
        self._flying = 0
        self.slept = 0.0

    @property
    @abstractmethod
    def now(self) -> float:
        """Seconds since some time."""

    @abstractmethod
    def _hand_out(self, job: Job, indices: list[int], seconds: float) -> None:
        """Give a task to the replicas, which takes one of them so long."""

    @abstractmethod
    def _take(self, wait: bool) -> tuple[Job, list[int]] | None:
        """The next task that has been answered; None if there is none yet and it is not to be waited for."""

    def submit(self, request: Request) -> None:
        """See `Dispatch.submit`."""
        count = len(request.candidates)
        self._unread.append(Job(request, tasks(request.candidates, self._stack), np.empty(count), count))
        self._unread.sort(key=lambda job: job.request.screening)

    def next(self) -> tuple[Request, np.ndarray]:
        """See `Dispatch.next`."""
        while True:
            handed_out = self._flying < 2 * self._replicas and self._hand_out_one()
            answered = self._take(wait=not handed_out)
            if answered is None:
                continue
            job, indices = answered
            self._flying -= 1
            for k in indices:
                job.fitness[k] = _fitness(job.request.candidates[k])
            job.left -= len(indices)
            if not job.left:
                return job.request, job.fitness

    def _hand_out_one(self) -> bool:
        while self._unread:
            job = self._unread[0]
            indices = next(job.tasks, None)
            if indices is not None:
                seconds = self._seconds * len(job.request.batches) / BATCHES * len(indices)
                self._hand_out(job, indices, seconds)
                self._flying += 1
                self.slept += seconds
                return True
            del self._unread[0]
        return False


class SleepingReplicas(Replicas):
    """Replicas that sleep."""

    def __init__(self, replicas: int, seconds: float, stack: int) -> None:
        super().__init__(replicas, seconds, stack)
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._sleep, daemon=True).start()

    @property
    def now(self) -> float:
        """See `Replicas.now`."""
        return time.perf_counter()

    def _hand_out(self, job: Job, indices: list[int], seconds: float) -> None:
        self._tasks.put((seconds, job, indices))

    def _take(self, wait: bool) -> tuple[Job, list[int]] | None:
        try:
            return self._answers.get(block=wait)
        except queue.Empty:
            return None

    def _sleep(self) -> None:
        """Start tasks as long as replicas are idle, and answer those whose time has come."""
        alarms: list[tuple[float, int, tuple[Job, list[int]]]] = []
        idle, started = self._replicas, 0
        while True:
            now = time.perf_counter()
            while alarms and alarms[0][0] <= now:
                self._answers.put(heapq.heappop(alarms)[2])
                idle += 1
            left = max(0.0, alarms[0][0] - now) if alarms else None
            if not idle:
                time.sleep(left)
                continue
            try:
                seconds, *task = self._tasks.get(timeout=left)
            except queue.Empty:
                continue
            heapq.heappush(alarms, (time.perf_counter() + seconds, started, tuple(task)))
            started += 1
            idle -= 1


class ScheduledReplicas(Replicas):
    """Replicas of whom it is computed when they would sleep.

    Args:
        replicas: how many.
        seconds: of a candidate on all batches.
        stack: candidates a task, at most.
        cores: of the driver, >= 2.
    """

    def __init__(self, replicas: int, seconds: float, stack: int, cores: int) -> None:
        super().__init__(replicas, seconds, stack)
        self.cores = cores
        self._time, self._looked = 0.0, time.thread_time()
        self._idle = [0.0] * replicas
        self._alarms: list[tuple[float, int, tuple[Job, list[int]]]] = []
        self._started = 0

    @property
    def now(self) -> float:
        """See `Replicas.now`; of the driver's Python."""
        looked = time.thread_time()
        self._time, self._looked = self._time + looked - self._looked, looked
        return self._time

    def wait(self, until: float) -> None:
        """Let the driver's Python wait."""
        self._time = max(self.now, until)

    def _hand_out(self, job: Job, indices: list[int], seconds: float) -> None:
        end = max(self.now, self._idle[0]) + seconds
        heapq.heapreplace(self._idle, end)
        heapq.heappush(self._alarms, (end, self._started, (job, indices)))
        self._started += 1

    def _take(self, wait: bool) -> tuple[Job, list[int]] | None:
        if not wait and (not self._alarms or self._alarms[0][0] > self.now):
            return None
        end, _, task = heapq.heappop(self._alarms)
        self.wait(end)
        return task


def timed_brood(pool: ScheduledReplicas) -> type[Brood]:
    """Broods whose blocks are ready when a driver's other cores, the idle one first, would have bred them."""
    class TimedBrood(Brood):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._took: dict[int, float] = {}

        def _block(self, part: range) -> tuple:
            started = time.thread_time()
            found = super()._block(part)
            self._took[part.start] = time.thread_time() - started
            return found

        def _breed(self) -> Iterator[tuple]:
            cores = [pool.now] * (pool.cores - 1)
            for part, found in zip(blocks(len(self)), super()._breed(), strict=True):
                ready = cores[0] + self._took[part.start]
                heapq.heapreplace(cores, ready)
                pool.wait(ready)
                yield found
    return TimedBrood


def _fitness(candidate: Candidate) -> float:
    """The median position that is zeroed, whose rank the estimate below can tell in part."""
    zero = candidate[0].zero
    return float(zero[len(zero) // 2])


def busy(arguments: argparse.Namespace, pool: Replicas, population: int) -> dict:
    """Share of the replicas' time that they are busy, over a few generations."""
    rng = np.random.default_rng(0)
    sizes = [arguments.weights * 7 // 8, arguments.weights // 8]
    masks = [rng.random(size) < 0.1 for size in sizes]
    saliency = {name: [rng.random(size).astype(np.float32) for size in sizes] for name in ("fisher", "magnitude")}
    survivors = sum(int(mask.sum()) for mask in masks)
    budget = Budget(np.zeros(2, bool), np.zeros(2, np.int64), survivors // 20)
    config = EvolutionConfig(population=population, generations=3, oversample=arguments.oversample)
    estimate = None
    if arguments.oversample > 1:
        estimate = DiagonalSurrogate([np.arange(size, dtype=np.float32) / size for size in sizes])
    search = DirectedSearch(SearchSpace(saliency, masks, budget, config.regrow), config, BATCHES, rng, estimate)
    started, slept, evaluated, processor = pool.now, pool.slept, 0, time.process_time()
    while not search.over:
        for request in iter(search.ask, None):
            pool.submit(request)
        request, fitness = pool.next()
        search.tell(request, fitness)
        evaluated += len(fitness)
    seconds = pool.now - started
    return {"population": population, "busy": round((pool.slept - slept) / (arguments.replicas * seconds), 4),
            "seconds": round(seconds, 3), "candidates": evaluated, "correlation": search.correlation,
            "processor_microseconds_a_candidate": round(1e6 * (time.process_time() - processor) / evaluated, 1)}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=512)
    parser.add_argument("--milliseconds", type=float, default=50.0)
    parser.add_argument("--stack", type=int, default=8)
    parser.add_argument("--weights", type=int, default=100_000)
    parser.add_argument("--populations", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--oversample", type=int, default=1, help="children bred for each that is evaluated")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--cores", type=int, default=2, help="of the driver, by the processor's clock; at least 2")
    arguments = parser.parse_args()
    size = arguments.replicas, arguments.milliseconds / 1000, arguments.stack
    if arguments.clock == "wall":
        pool = SleepingReplicas(*size)
    else:
        pool = ScheduledReplicas(*size, arguments.cores)
        de_ray.evolution.search.Brood = timed_brood(pool)
    busy(arguments, pool, 512)  # compiles
    gc.freeze()  # as evolve() does
    found = [busy(arguments, pool, population) for population in arguments.populations]
    print(json.dumps({**vars(arguments), "runs": found}))


if __name__ == "__main__":
    main()
