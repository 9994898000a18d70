"""A schedule that takes a number of minutes, by what its parts take on this machine.

Where time is short, many small batches bring survivors closer to the teacher than few large ones, steps closer than
candidates, and cycles closer than either (docs/RESULTS.md): the search has a share of the time, in as many cycles as it
can, and steps have what is left.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from de_ray.checkpoint import FOLDER
from de_ray.checks import first_line
from de_ray.config import Config, EvolutionConfig
from de_ray.costs import Costs, measured, steps
from de_ray.files import write_atomically
from de_ray.fingerprint import fingerprint
from de_ray.problem.base import Problem
from de_ray.rate import size_limit

log = logging.getLogger(__name__)

FILE = "minutes.json"
"""Of a run's folder: the schedule that was chosen there, and for what."""
SCHEDULE = {"evolution": ("cycles", "generations", "population", "elite", "tournament", "saliency_inputs"),
            "refit": ("batch", "steps", "final_steps"), "quantization": ("refit_steps",)}
"""What a schedule is."""

SEARCH_SHARE = 0.2
"""Of the time, for saliencies and candidates; the rest where refit takes no steps, for closed forms too."""
MOST_SEARCH = 0.6
"""What a search may take in the end that keeps what a search keeps; one that would take more goes without."""
SHARES = [0.9**step for step in range(1, 24)]
"""Of candidates, generations and inputs of saliencies, and then of cycles, that are tried in a search that takes too
long."""
LEAST_GENERATIONS, LEAST_POPULATION, LEAST_SALIENCY_INPUTS, LEAST_CYCLES = 1, 4, 512, 6
"""What a search keeps, of what it has, as long as that fits."""
FEWEST_SALIENCY_INPUTS, FEWEST_CYCLES = 32, 2
"""What it keeps in any case; candidates are what it does without."""
BATCHES = (32, 16, 8, 4)
"""Inputs a step of a refit that has not the time for all of its larger ones: the most that leave LEAST_STEPS."""
LEAST_STEPS = 0.05
"""Share of the configured steps that is left in any case."""
LATE = 1.1
"""How many times the minutes a schedule may take before it is warned of."""


def with_minutes(problem: Problem, config: Config, folder: Path | None = None) -> Config:
    """The configuration with a schedule that takes about `config.minutes` in their place, which are None then.

    What takes less stays as it is. The file is that of the schedule, wherever it is run again.

    Args:
        problem: what will be compressed.
        config: with its `threads`.
        folder: which keeps what was chosen when the compression began; None: whoever calls this does.
    """
    if config.minutes is None:
        return config
    size_limit(problem, config)  # what cannot be had is refused before anything is timed
    asked = None if folder is None else json.loads(json.dumps({
        "minutes": config.minutes, "quantization": asdict(config.quantization), **fingerprint(problem, config)}))
    chosen = None if folder is None else _kept(folder, asked)
    if chosen is None:
        chosen = schedule(_chosen(problem, config))
        if folder is not None and not (folder / FOLDER).exists():
            write_atomically(folder / FILE, json.dumps({"asked": asked, "chosen": chosen}, indent=2).encode())
    groups = {group: replace(getattr(config, group), **values) for group, values in chosen.items()}
    return replace(config, minutes=None, **groups)


def schedule(config: Config) -> dict[str, dict[str, int]]:
    """What decides how long a compression takes, by group and name."""
    return {group: {name: getattr(getattr(config, group), name) for name in names}
            for group, names in SCHEDULE.items()}


def _kept(folder: Path, asked: dict) -> dict[str, dict[str, int]] | None:
    """What was chosen in a folder for what is asked now; None where nothing was, or for something else."""
    try:
        found = json.loads((folder / FILE).read_text())
        return found["chosen"] if found["asked"] == asked else None
    except (OSError, ValueError, LookupError):  # what is measured now is held to the checkpoints, if there are any
        return None


def _chosen(problem: Problem, config: Config) -> Config:
    """The configuration with a schedule that fits, by what is measured now."""
    started = time.perf_counter()
    try:
        costs = measured(problem, config)
    except RuntimeError as error:  # a network without gradients, say, which the run itself refuses
        log.warning("minutes=%g: steps could not be timed, and the schedule stays as it is: %s", config.minutes,
                    first_line(error))
        return config
    timing = time.perf_counter() - started
    seconds = 60 * config.minutes - timing
    fitted = _fitted(config, costs, seconds)
    taken = costs.total(fitted)
    if taken <= LATE * max(0.0, seconds):
        log.info("minutes=%g: %.2g by %s", config.minutes, (timing + taken) / 60, _told(fitted))
    else:
        log.warning("minutes=%g: the shortest schedule takes about %.2g minutes: %.2g for %s; %.2g for levels and for "
                    "passes of %d calibration and %d held-out inputs, of which fewer take less; and %.2g to time them",
                    config.minutes, (timing + taken) / 60, (taken - costs.other) / 60, _told(fitted), costs.other / 60,
                    len(problem.calibration), len(problem.held_out), timing / 60)
    return fitted


def _told(config: Config) -> str:
    """A schedule in words."""
    evolution, refit, levels = config.evolution, config.refit, config.quantization.refit_steps
    search = f"{evolution.cycles} cycles of {evolution.generations} x {evolution.population} candidates"
    if refit.method != "distill":
        return f"{search} and {levels} steps for levels, {refit.batch} inputs each"
    return (f"{search} and {refit.steps} steps, {refit.final_steps} steps after them and {levels} for levels, "
            f"{refit.batch} inputs each")


def _fitted(config: Config, costs: Costs, seconds: float) -> Config:
    """The configuration with as long a schedule as fits into some seconds."""
    if costs.total(config) <= seconds:
        return config
    share = SEARCH_SHARE if config.refit.method == "distill" else 1 - SEARCH_SHARE
    room = seconds - costs.other
    lean = _searching(config, _shorter(config.evolution), costs, share * room)
    if costs.search(lean) > max(share, MOST_SEARCH) * room:
        lean = _searching(config, _least(lean.evolution), costs, share * room)
    left = room - costs.search(lean)
    refit, levels, cycles = config.refit, config.quantization.refit_steps, lean.evolution.cycles
    times = config.evolution.cycles / cycles  # as many steps for fewer cycles
    wanted = replace(lean, refit=replace(refit, steps=round(times * refit.steps)))
    if steps(wanted) * costs.step(refit.batch / refit.workers) <= left:
        return wanted
    batches = [batch for batch in BATCHES if batch < refit.batch and batch % refit.workers == 0]
    if refit.batch <= BATCHES[0] or not batches:
        batches.insert(0, refit.batch)
    shares = {batch: left / (max(1, steps(wanted)) * costs.step(batch / refit.workers)) for batch in batches}
    batch = next((batch for batch in batches if shares[batch] >= LEAST_STEPS), batches[-1])
    share = min(max(shares[batch], LEAST_STEPS), refit.batch / batch)  # no more inputs than were asked for
    return replace(lean, refit=replace(refit, batch=batch, steps=_part(refit.steps, share * times),
                                       final_steps=_part(refit.final_steps, share)),
                   quantization=replace(config.quantization, refit_steps=_part(levels, share)))


def _searching(config: Config, searches: Iterable[EvolutionConfig], costs: Costs, seconds: float) -> Config:
    """The configuration with the first of some searches that takes no more than some seconds, or with the last."""
    for evolution in searches:
        lean = replace(config, evolution=evolution)
        if costs.search(lean) <= seconds:
            break
    return lean


def _part(full: int, share: float) -> int:
    """Some of a refit's steps, which has one as long as it had any: without them it would be another method."""
    return max(min(full, 1), round(share * full))


def _fewer(value: int, share: float, least: int) -> int:
    """A share of a value, at least some, and no more than the value."""
    return min(value, max(least, round(share * value)))


def _shorter(full: EvolutionConfig) -> Iterator[EvolutionConfig]:
    """A search as it is, and shorter and shorter ones."""
    yield full
    for share in SHARES:
        population = _fewer(full.population, share, LEAST_POPULATION)
        lean = replace(full, population=population, generations=_fewer(full.generations, share, LEAST_GENERATIONS),
                       elite=min(full.elite, population), tournament=min(full.tournament, population),
                       saliency_inputs=_fewer(full.saliency_inputs, share, LEAST_SALIENCY_INPUTS))
        yield lean
    for share in SHARES:
        yield replace(lean, cycles=_fewer(full.cycles, share, LEAST_CYCLES))


def _least(lean: EvolutionConfig) -> Iterator[EvolutionConfig]:
    """Cuts by the first criterion alone, for shorter and shorter searches."""
    for share in SHARES:
        yield replace(lean, generations=0, cycles=_fewer(lean.cycles, share, FEWEST_CYCLES),
                      saliency_inputs=_fewer(lean.saliency_inputs, share, FEWEST_SALIENCY_INPUTS))
