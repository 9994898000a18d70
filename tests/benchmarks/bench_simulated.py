"""How busy one driver keeps many replicas: threads that sleep for a candidate's time stand in for GPUs.

Generations of `DirectedSearch` with racing on are cut into the pool's tasks, which replicas take from one queue as they
become idle; what is left out is Ray's own messages, which `bench_scaling.py` measures. A replica is busy while it
sleeps. The last line is one JSON object.

    python tests/benchmarks/bench_simulated.py --replicas 512 --milliseconds 50
"""

import argparse
import json
import queue
import threading
import time
from collections.abc import Sequence

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evaluation.chunks import cut
from de_ray.evolution.candidate import Candidate
from de_ray.evolution.search import DirectedSearch
from de_ray.evolution.space import Budget, SearchSpace

BATCHES = 8
"""Calibration batches; the time of a candidate is that of all of them."""


class SleepingPool:
    """Replicas that sleep.

    Args:
        replicas: threads.
        seconds: of a candidate on all batches.
        stack: candidates a task, at most.
    """

    def __init__(self, replicas: int, seconds: float, stack: int) -> None:
        self._seconds, self._stack = seconds, stack
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self.slept = 0.0
        threading.stack_size(256 * 1024)
        for _ in range(replicas):
            threading.Thread(target=self._replica, daemon=True).start()

    def _replica(self) -> None:
        while True:
            indices, seconds = self._tasks.get()
            time.sleep(seconds)
            self._answers.put((indices, seconds))

    def evaluate(self, candidates: Sequence[Candidate], batches: Sequence[int], screening: bool) -> np.ndarray:
        """Some fitness that differs from candidate to candidate."""
        fitness = np.empty(len(candidates))
        share = len(batches) / BATCHES
        tasks = cut(candidates, self._stack)
        for indices in tasks:
            self._tasks.put((indices, self._seconds * share * len(indices)))
        for _ in tasks:
            indices, seconds = self._answers.get()
            self.slept += seconds
            for index in indices:
                fitness[index] = float(candidates[index][0].zero[:16].sum() % 1000)
        return fitness


def busy(arguments: argparse.Namespace, population: int) -> dict:
    """Share of the replicas' time that they are busy, over a few generations."""
    rng = np.random.default_rng(0)
    sizes = [arguments.weights * 7 // 8, arguments.weights // 8]
    masks = [rng.random(size) < 0.1 for size in sizes]
    saliency = {name: [rng.random(size).astype(np.float32) for size in sizes] for name in ("fisher", "magnitude")}
    survivors = sum(int(mask.sum()) for mask in masks)
    budget = Budget(np.zeros(2, bool), np.zeros(2, np.int64), survivors // 20)
    config = EvolutionConfig(population=population, generations=3)
    pool = SleepingPool(arguments.replicas, arguments.milliseconds / 1000, arguments.stack)
    search = DirectedSearch(SearchSpace(saliency, masks, budget, config.regrow), config, BATCHES, rng)
    started, waited, evaluated = time.perf_counter(), 0.0, 0
    while (request := search.ask()) is not None:
        before = time.perf_counter()
        fitness = pool.evaluate(request.candidates, request.batches, request.screening)
        waited += time.perf_counter() - before
        evaluated += len(request.candidates)
        search.tell(fitness)
    total = time.perf_counter() - started
    return {"population": population, "busy": pool.slept / (arguments.replicas * total),
            "busy_while_evaluating": pool.slept / (arguments.replicas * waited), "bred_s": total - waited,
            "evaluated_s": waited, "candidates": evaluated,
            "microseconds_a_child": 1e6 * (total - waited) / evaluated}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=512)
    parser.add_argument("--milliseconds", type=float, default=50.0)
    parser.add_argument("--stack", type=int, default=8)
    parser.add_argument("--weights", type=int, default=100_000)
    parser.add_argument("--populations", type=int, nargs="+", default=[4096, 16384])
    arguments = parser.parse_args()
    found = [busy(arguments, population) for population in arguments.populations]
    print(json.dumps({"replicas": arguments.replicas, "milliseconds": arguments.milliseconds, "stack": arguments.stack,
                      "weights": arguments.weights, "runs": found}))


if __name__ == "__main__":
    main()
