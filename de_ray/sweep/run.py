"""A sweep: whole compressions over a space, as trials of Ray Tune, and what is best among them."""

import logging
from dataclasses import replace
from pathlib import Path

import ray
from ray import tune

from de_ray.checks import require_choice
from de_ray.cluster.join import ensure_ray
from de_ray.config import Config, TrackingConfig
from de_ray.device import resolve_device
from de_ray.problem.base import Problem
from de_ray.results import read_report
from de_ray.sweep.conclude import SweepResult, conclude, trial_row
from de_ray.sweep.live import Watch
from de_ray.sweep.rungs import EqualSparsity
from de_ray.sweep.space import SPARSITY, Point, listed_sparsities, points
from de_ray.sweep.trial import bundles, compress_trial, own_config, place
from de_ray.tracking import Tracker
from de_ray.tuning import quiet, signals_restored

log = logging.getLogger(__name__)

TUNE_FOLDER = "tune"


def run_sweep(problem: Problem, config: Config, folder: Path, tracker: Tracker) -> SweepResult:
    """Compress at every point, in Tune's processes, and report the Pareto front of ratio against metric.

    Args:
        problem: its teacher is trained already.
        config: with a sweep.
        folder: of the sweep, reachable from all nodes; where one was interrupted, it is continued.
        tracker: of the sweep's run; trials become runs nested under it.

    Raises:
        ValueError: a point is not allowed, the problem has no such metric, or the cluster has no room for a trial.
        EvaluationError: no trial has finished.
        KeyboardInterrupt: Tune was interrupted.
    """
    sweep, folder = config.sweep, folder.resolve()
    base = replace(config, tracking=TrackingConfig(enabled=False))  # its address may hold a password
    found = points(sweep.space, sweep.samples, config.seed)
    for point in found:
        own_config(base, sweep, point)  # a mistake need not wait for Ray
    if sweep.metric not in (None, "divergence"):
        require_choice("sweep.metric", sweep.metric, ("divergence", *problem.metrics(problem.teacher)))
    if not sweep.gpus and resolve_device(config.device).type == "cuda":
        log.warning("trials compute on CPUs; sweep.gpus=0.25, say, has four of them share a GPU")
    log.info("%d compressions: trials 0 to %d", len(found), len(found) - 1)
    ensure_ray()
    _require_room(bundles(base, sweep))
    with Watch(folder, tracker, found, lambda point: own_config(base, sweep, point)) as watch:
        _tune(problem, base, folder, found, watch)
        for number in range(len(found)):  # what an earlier sitting has finished
            if number not in watch.ended and read_report(place(folder, number)) is not None:
                watch.finish(number)
        if not all(watch.has_ended(number) for number in range(len(found))):
            # Tune answers Ctrl-C with the trials so far.
            raise KeyboardInterrupt
    rows = [trial_row(folder, number, point, watch.failed.get(number)) for number, point in enumerate(found)]
    return conclude(problem, config, folder, tracker, rows)


def _tune(problem: Problem, base: Config, folder: Path, found: list[Point], watch: Watch) -> None:
    sweep = base.sweep
    trainable = tune.with_parameters(compress_trial, problem=problem, base=base, sweep=sweep, points=found,
                                     folder=str(folder))
    trainable = tune.with_resources(trainable, tune.PlacementGroupFactory(bundles(base, sweep)))
    listed = listed_sparsities(sweep.space)
    aims = [point[SPARSITY] if listed else None for point in found]
    records = folder / TUNE_FOLDER
    with quiet(), signals_restored():
        if any(records.glob("experiment_state*")):
            tuner = tune.Tuner.restore(str(records), trainable, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"number": tune.grid_search(list(range(len(found))))},
                tune_config=tune.TuneConfig(
                    scheduler=EqualSparsity(sweep, aims) if sweep.asha else None,
                    max_concurrent_trials=sweep.concurrent or None),
                run_config=tune.RunConfig(name=TUNE_FOLDER, storage_path=str(folder), verbose=0, callbacks=[watch]),
            )
        tuner.fit()


def _require_room(needed: list[dict[str, float]]) -> None:
    """Raise where a trial would wait for ever for what the cluster does not have."""
    for resource in ("CPU", "GPU"):
        asked = sum(bundle.get(resource, 0) for bundle in needed)
        there = ray.cluster_resources().get(resource, 0)
        if asked > there:
            raise ValueError(f"sweep.actors={len(needed) - 1}: a trial needs {asked:g} {resource}s with threads, "
                             f"pool.threads, pool.gpus and sweep.gpus as they are; expected at most the cluster's "
                             f"{there:g}")
