"""Compress again and again while an actor is killed every few seconds: nothing may be lost, and nothing may pile up.

Each round compresses the digits through two Ray actors of one session and must end in the file that a serial pool makes
without disturbance. A thread kills a random actor (SIGKILL) at a steady pace. Resident memory is read after each round:
that of this process, and that of Ray's processes beside the actors. The last line is one JSON object.

    python tests/benchmarks/soak.py --minutes 60 --kill-seconds 20
"""

import argparse
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import ray
import torch

from de_ray.cluster.join import ensure_ray
from de_ray.pipeline import run
from de_ray.problem.build import build_problem
from de_ray.schema import compose

SMALL = ["problem=digits", "evolution.cycles=8", "refit.steps=40", "refit.final_steps=200", "quantization.trials=8",
         "quantization.refit_steps=100", "tracking.enabled=false"]
MEGABYTE = 2**20
WARM_SHARE = 0.25
"""Of the rounds, those before memory is compared."""


def descendants() -> Iterator[psutil.Process]:
    """Processes that this one, or Ray for it, has started."""
    yield from psutil.Process().children(recursive=True)


def replicas() -> list[psutil.Process]:
    """The pool's actors."""
    found = []
    for process in descendants():
        try:
            if "ray::Replica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def kill_actors(seconds: float, stop: threading.Event, kills: list[float]) -> None:
    """Kill one of the actors every so often."""
    chance = random.Random(0)
    while not stop.wait(seconds):
        while not (victims := replicas()) and not stop.wait(1):
            pass  # between two pools
        if victims:
            os.kill(chance.choice(victims).pid, signal.SIGKILL)
            kills.append(time.monotonic())


def resident_mb() -> dict[str, float]:
    """Of the driver, and of each of its replicas on average."""
    actors = []
    for process in replicas():
        try:
            actors.append(process.memory_info().rss / MEGABYTE)
        except psutil.Error:
            continue
    return {"driver": psutil.Process().memory_info().rss / MEGABYTE, "actor": sum(actors) / max(1, len(actors))}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kill-seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = compose([*SMALL, "pool.actors=2"])
    problem = build_problem(config.problem, config.seed)
    expected = run(problem, compose([*SMALL, "pool=serial"]))
    digest, evaluations = hashlib.sha256(expected.data).hexdigest(), expected.report["evaluations"]
    ensure_ray()
    stop, kills = threading.Event(), []
    killer = threading.Thread(target=kill_actors, args=(arguments.kill_seconds, stop, kills))
    killer.start()
    rounds, memory, different, started = 0, [], 0, time.monotonic()
    try:
        while time.monotonic() - started < 60 * arguments.minutes:
            memory.append({})

            def watch(record: object, total: int) -> None:
                memory[-1] = resident_mb()  # while the pool is at work  # noqa: B023

            result = run(problem, config, on_record=watch)
            rounds += 1
            different += hashlib.sha256(result.data).hexdigest() != digest
            assert result.report["evaluations"] == evaluations, "a candidate was lost or counted twice"
            print(f"{time.monotonic() - started:.0f} s: round {rounds}, {len(kills)} actors killed, {different} files "
                  f"differ, MB {({k: round(v) for k, v in memory[-1].items()})}", flush=True)
    finally:
        stop.set()
        killer.join()
        ray.shutdown()
    warm = memory[int(WARM_SHARE * len(memory)):]
    growth = {who: warm[-1][who] / warm[0][who] - 1 for who in ("driver", "actor") if len(warm) > 1 and warm[0][who]}
    print(json.dumps({"minutes": (time.monotonic() - started) / 60, "rounds": rounds, "killed": len(kills),
                      "files_that_differ": different, "evaluations_a_round": evaluations, "memory_mb": memory[-1],
                      "growth_after_warm_up": growth, "largest_mb": {
                          who: max(one[who] for one in warm) for who in ("driver", "actor")}}))


if __name__ == "__main__":
    main()
