"""How busy one driver keeps many replicas that sleep for a candidate's time, as GPUs would compute for it.

Generations of `DirectedSearch` with racing on are cut into the pool's tasks, which replicas take from one queue as they
become idle; what is left out is Ray's own messages, which `bench_scaling.py` measures. A replica is busy for the time
that it was to sleep: what waking up late costs counts as idle. By two clocks:

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
import bisect
import gc
import heapq
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evaluation.chunks import tasks
from de_ray.evolution.brood import Brood
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace
from de_ray.evolution.surrogate import DiagonalSurrogate

BATCHES = 8
"""Calibration batches; the time of a candidate is that of all of them."""


class SleepingPool:
    """Replicas that sleep.

    Args:
        replicas: how many.
        seconds: of a candidate on all batches.
        stack: candidates a task, at most.
    """

    def __init__(self, replicas: int, seconds: float, stack: int) -> None:
        self._seconds, self._stack = seconds, stack
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self.slept = 0.0
        threading.Thread(target=self._sleep, args=[replicas], daemon=True).start()

    @property
    def now(self) -> float:
        """Seconds since some time."""
        return time.perf_counter()

    def _sleep(self, idle: int) -> None:
        """Start tasks as long as replicas are idle, and answer those whose time has come."""
        alarms: list[tuple[float, int, list[int]]] = []
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
                indices, seconds = self._tasks.get(timeout=left)
            except queue.Empty:
                continue
            heapq.heappush(alarms, (time.perf_counter() + seconds, indices[0], indices))
            idle -= 1

    def evaluate(self, candidates: Sequence[Candidate], batches: Sequence[int]) -> np.ndarray:
        """Some fitness that differs from candidate to candidate."""
        fitness, handed_out = np.empty(len(candidates)), 0
        seconds = self._seconds * len(batches) / BATCHES
        for indices in tasks(candidates, self._stack):
            self._tasks.put((indices, seconds * len(indices)))
            handed_out += 1
        for _ in range(handed_out):
            for k in self._answers.get():
                fitness[k] = _fitness(candidates[k])
        self.slept += seconds * len(candidates)
        return fitness


class ScheduledPool:
    """Replicas of whom it is computed when they would sleep.

    Args:
        replicas: how many.
        seconds: of a candidate on all batches.
        stack: candidates a task, at most.
        cores: of the driver, >= 2.
    """

    def __init__(self, replicas: int, seconds: float, stack: int, cores: int) -> None:
        self._replicas, self._seconds, self._stack, self._cores = replicas, seconds, stack, cores
        self._looked = time.thread_time()
        self.now = self.slept = 0.0

    def _look(self) -> float:
        """Processor time of the driver's Python since the last look."""
        before, self._looked = self._looked, time.thread_time()
        return self._looked - before

    def evaluate(self, candidates: Sequence[Candidate], batches: Sequence[int]) -> np.ndarray:
        """See `SleepingPool.evaluate`."""
        bred: dict[int, float] = {}  # processor seconds of blocks, by their first candidate
        if isinstance(candidates, Brood):
            candidates._block = _timed(candidates._block, bred)
        self.now += self._look()
        handed_out = [(indices, self._look()) for indices in tasks(candidates, self._stack)]
        fitness = np.array([_fitness(candidate) for candidate in candidates])
        answering = self._look() / max(1, len(candidates))
        self._schedule(handed_out, bred, self._seconds * len(batches) / BATCHES, answering)
        self._look()
        return fitness

    def _schedule(self, handed_out: list[tuple[list[int], float]], bred: dict[int, float], seconds: float,
                  answering: float) -> None:
        """Advance to when the driver has the last answer.

        Args:
            handed_out: tasks, and what the driver's Python took for each.
            bred: see `evaluate`.
            seconds: of a candidate.
            answering: seconds of the driver's Python for a candidate's answer.
        """
        # Blocks are bred in order, each by the core that is idle first.
        cores, ready, firsts = [self.now] * (self._cores - 1), [], sorted(bred)
        for first in firsts:
            ready.append(cores[0] + bred[first])
            heapq.heapreplace(cores, ready[-1])
        idle, ends = [self.now] * self._replicas, []
        for indices, took in handed_out:
            if ready:
                self.now = max(self.now, ready[max(0, bisect.bisect_right(firsts, indices[0]) - 1)])
            self.now += took
            self.slept += seconds * len(indices)
            ends.append((max(self.now, idle[0]) + seconds * len(indices), len(indices)))
            heapq.heapreplace(idle, ends[-1][0])
        # All tasks are handed out before the first answer is taken.
        for end, count in sorted(ends):
            self.now = max(self.now, end) + answering * count


def _timed(block: Callable, bred: dict[int, float]) -> Callable:
    """The same, with a note of the processor time that it takes."""
    def noting(part: range) -> tuple:
        started = time.thread_time()
        found = block(part)
        bred[part.start] = time.thread_time() - started
        return found
    return noting


def _fitness(candidate: Candidate) -> float:
    """The median position that is zeroed, whose rank the estimate below can tell in part."""
    zero = candidate[0].zero
    return float(zero[len(zero) // 2])


def busy(arguments: argparse.Namespace, pool: SleepingPool | ScheduledPool, population: int) -> dict:
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
    while (request := search.ask()) is not None:
        search.tell(pool.evaluate(request.candidates, request.batches))
        evaluated += len(request.candidates)
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
    if arguments.clock == "wall":
        pool = SleepingPool(arguments.replicas, arguments.milliseconds / 1000, arguments.stack)
    else:
        pool = ScheduledPool(arguments.replicas, arguments.milliseconds / 1000, arguments.stack, arguments.cores)
    busy(arguments, pool, 512)  # compiles
    gc.freeze()  # as evolve() does
    found = [busy(arguments, pool, population) for population in arguments.populations]
    print(json.dumps({**vars(arguments), "runs": found}))


if __name__ == "__main__":
    main()
