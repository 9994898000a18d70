"""What a process of Ray Tune does for one trial: a whole compression, in a folder of its own."""

from dataclasses import asdict, replace
from pathlib import Path

from ray import tune

from de_ray import checkpoint
from de_ray.checks import require
from de_ray.config import Config, SweepConfig, TrackingConfig
from de_ray.evolve import Record
from de_ray.pipeline import run
from de_ray.problem.base import Problem
from de_ray.problem.build import build_problem
from de_ray.results import read_report, save_config, write_result
from de_ray.sweep.rungs import DIVERGENCE, HALVINGS, crossings, halvings, rungs
from de_ray.sweep.space import Point, configure

CYCLE, DONE = "cycle", "finished"


def own_config(base: Config, sweep: SweepConfig, point: Point) -> Config:
    """The configuration of a trial: of one compression, tracked by the driver alone.

    Replicas in a trial's own process need no actors, and cannot wait for CPUs that other trials hold.

    Raises:
        ValueError, OmegaConfBaseException: a value of the point is not allowed.
    """
    # Of GPUs they have what `bundles` reserves, which is none unless the configuration says so; Ray shows them all to
    # those that have none, and by other numbers to those that have some.
    require(base.device.partition(":")[0] != "cuda" or sweep.gpus > 0, "device", base.device,
            "auto or cpu, or sweep.gpus, what each trial has of a GPU, above 0")
    device = "cuda" if sweep.gpus and base.device != "cpu" else "cpu"
    pool = replace(base.pool, kind="ray" if sweep.actors else "serial", actors=sweep.actors, gpus=base.pool.gpus or 0.0)
    single = replace(base, device=device, threads=_threads(base), sweep=None, resume=None, pool=pool,
                     tracking=TrackingConfig(enabled=False))
    return configure(single, point)


def bundles(base: Config, sweep: SweepConfig) -> list[dict[str, float]]:
    """What a trial and its actors reserve, all at once: a trial that waited for its actors' CPUs while other trials
    hold them, and wait too, would wait for ever."""
    own = {"CPU": float(_threads(base)), "GPU": sweep.gpus}
    gpus = 0.0 if base.pool.gpus is None else base.pool.gpus
    actor = {"GPU": gpus} if gpus else {"CPU": float(base.pool.threads)}
    return [{key: value for key, value in bundle.items() if value} for bundle in [own, *[actor] * sweep.actors]]


def _threads(base: Config) -> int:
    """Of a trial: where nothing says so one, since trials have the cores between them."""
    return base.threads or 1


def place(folder: str | Path, number: int) -> Path:
    """A trial's own folder in the sweep's."""
    return Path(folder) / "trials" / f"{number:03}"


def compress_trial(config: dict, problem: Problem, base: Config, sweep: SweepConfig, points: list[Point],
                   folder: str) -> None:
    """Compress at a point of the space, and report each cycle and each rung; continues what a killed process began.

    Args:
        config: {"number": of the trial}.
        problem: the driver's.
        base: the driver's configuration, without credentials.
        sweep: of it.
        points: by number.
        folder: of the sweep; the same on all nodes.
    """
    mine = own_config(base, sweep, points[config["number"]])
    here = place(folder, config["number"])
    if read_report(here) is not None:  # it was killed between its last word and Tune's record of it
        tune.report({DONE: True})
        return
    if mine.seed != base.seed:
        problem = build_problem(mine.problem, mine.seed, mine.device)  # which draws calibration inputs of its own
    here.mkdir(parents=True, exist_ok=True)
    save_config(mine, here)
    # At its own sparsity a trial has its longest refit still to come: no time to judge it.
    stops, before = [rung for rung in rungs(sweep) if rung < halvings(mine.evolution.sparsity)], (0.0, 0.0)
    earlier = checkpoint.latest(here)
    if earlier is not None:
        last = earlier.meta["history"][-1]
        before = halvings(last["sparsity"]), last["divergence"]

    def on_record(record: Record, total: int) -> None:
        nonlocal before
        after = halvings(record.sparsity), record.divergence
        for rung, divergence in crossings(stops, before, after):
            tune.report({HALVINGS: rung, DIVERGENCE: divergence})
        tune.report({key: value for key, value in asdict(record).items() if isinstance(value, int | float)})
        before = after

    result = run(problem, mine, here, on_record)
    write_result(result, problem, here)
    tune.report({DONE: True})
