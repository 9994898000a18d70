"""Sweep widths per layer with Ray Tune, or in process where the pool is."""

import logging
from pathlib import Path
from typing import Protocol

from de_ray.cluster.storage import tune_storage
from de_ray.config import QuantizationConfig
from de_ray.quantization.allocate import warm_starts
from de_ray.quantization.goal import Goal, WithinDivergence
from de_ray.quantization.pareto import Trial, make_trial
from de_ray.quantization.search import WidthSearch
from de_ray.quantization.table import Evaluator, SensitivityTable
from de_ray.tuning import quiet, signals_restored

log = logging.getLogger(__name__)

WARM_SHARE = 0.5
"""Share of the trials that may be warm starts."""
RESOURCES = {"CPU": 0, "memory": 2**20}
"""Of a trial. Replicas own the CPUs: a trial that asked for one would wait for them for ever. Tune refuses to ask for
nothing at all, hence the bytes."""


class Pool(Evaluator, Protocol):
    """What a sweep needs of a pool besides evaluation."""

    def client(self) -> Evaluator:
        """An evaluator for other processes, or the pool itself when it serves only this one."""


def tolerated(table: SensitivityTable, config: QuantizationConfig) -> WithinDivergence:
    """The goal of a sweep without a limit in bytes: the pruned student's divergence, raised by the tolerance."""
    return WithinDivergence(table.base + config.tolerance * max(table.base, config.negligible), table.base)


def fixed(table: SensitivityTable, pool: Evaluator, bits: int) -> Trial:
    """The trial of one width for every layer."""
    widths = (bits,) * len(table.layers)
    return _evaluate(table, pool, [widths])[0]


def sweep(table: SensitivityTable, pool: Pool, config: QuantizationConfig, goal: Goal, seed: int, folder: Path | str,
          concurrent: int = 1) -> list[Trial]:
    """Search for the Pareto front of (bytes, divergence) over a width for each layer.

    Warm starts come from the table, the others from `WidthSearch`. Trials evaluate on the pool's resident replicas: in
    Tune's processes through the pool's client, or in this process when the client is the pool itself. Both give the
    same list.

    Args:
        table: choices, bytes and divergences by layer and width.
        pool: replicas that hold the student of the table.
        config: trials is used.
        goal: what decides which part of the front is searched.
        seed: of the sampler.
        folder: where Tune keeps its records: a folder, or an address such as s3://...; all nodes must reach it.
        concurrent: trials that run at a time, >= 1; matters to the time alone. More than one pays where evaluating a
            candidate takes seconds and the pool has as many replicas: Tune then spends up to 15 s on ending processes
            that it started in vain.

    Returns:
        Trials in the order in which they were asked for; infinite divergence where it was not finite.

    Raises:
        KeyboardInterrupt: Tune was interrupted.
    """
    count = max(1, int(config.trials * WARM_SHARE))
    search = WidthSearch(len(table.layers), (table.widths[0], table.widths[-1]), config.trials, seed,
                         warm_starts(table, goal, count))
    client = pool.client()
    if client is pool:
        while not search.finished:
            search.tell(_evaluate(table, pool, search.ask()))
    else:
        search = _tune(search, table, client, folder, concurrent)
    failed = sum(trial.divergence == float("inf") for trial in search.trials)
    if failed:
        log.warning("%d of %d assignments of widths gave no finite divergence", failed, len(search.trials))
    return search.trials


def _evaluate(table: SensitivityTable, pool: Evaluator, assignments: list[tuple[int, ...]]) -> list[Trial]:
    fitness = pool.evaluate([table.candidate(widths) for widths in assignments], range(pool.batches))
    return [make_trial(widths, table.payload(widths), float(f)) for widths, f in zip(assignments, fitness, strict=True)]


def _tune(search: WidthSearch, table: SensitivityTable, client: Evaluator, folder: Path | str,
          concurrent: int) -> WidthSearch:
    """Run the search's trials in Tune's processes."""
    from ray import tune

    from de_ray.quantization.trial import WidthTrial
    from de_ray.quantization.tune_searcher import RoundSearcher

    searcher = RoundSearcher(search, concurrent)
    trainable = tune.with_parameters(WidthTrial, table=table, evaluator=client)  # through the object store, once
    trainable = tune.with_resources(trainable, RESOURCES)
    with quiet(), signals_restored():
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(name="sweep", **tune_storage(folder), verbose=0,
                                      failure_config=tune.FailureConfig(fail_fast=True),
                                      checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)),
        )
        results = tuner.fit()
    if results.errors:
        raise results.errors[0]
    return search
