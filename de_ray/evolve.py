"""The first stage: cycles of propose, evaluate, breed, commit, refit, checkpoint, then the final refit."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from de_ray import checkpoint
from de_ray.backoff import Backoff
from de_ray.config import Config, EvolutionConfig
from de_ray.evaluation.pool import Pool, students_divergence
from de_ray.evolution.curvature import SaliencyInputs
from de_ray.evolution.cycle import breed
from de_ray.evolution.rate import RateModel
from de_ray.evolution.schedule import Targets, next_progress, progress_at
from de_ray.evolution.space import Budget
from de_ray.problem.base import Problem
from de_ray.problem.sampling import draw_sample
from de_ray.rate import aimed_sparsity, measure_rate, require_room, room_for_layers
from de_ray.refit.build import Refit, build_refit
from de_ray.refit.regrow import regrow
from de_ray.seeds import numpy_generator, torch_generator
from de_ray.student import Student
from de_ray.units import NO_UNITS, Units

log = logging.getLogger(__name__)

FINAL_CHUNK = 2000
"""Steps of the final refit between two checkpoints."""
LEAST_RISE = 1e-12
"""Keeps ratios of divergence rises finite."""


@dataclass
class Record:
    """What a cycle, or a chunk of the final refit, did; one row of the report's history."""

    cycle: int
    """Counts cycles from 1, and chunks of the final refit on from there."""
    sparsity: float
    divergence: float
    """Mean over all calibration batches, after the refit."""
    candidate_divergence: float | None
    """Of the committed set, before the refit; None for a baseline's cycles and for the final refit."""
    evaluations: int
    """Candidates evaluated so far."""
    saved_evaluations: int
    """Evaluations on all batches that racing spared in this cycle."""
    surrogate_correlation: float | None
    """Of the surrogate's ranks with those by evaluation in this cycle; None where there was no surrogate."""
    seconds: float
    """Since the start of the stage, earlier sittings included."""
    densities: list[float]
    """By layer."""

    def __str__(self) -> str:
        """What people watch."""
        return f"sparsity {self.sparsity:.2%}, divergence {self.divergence:.4g}"


@dataclass
class Progress:
    """Where the stage is: what a checkpoint holds beside tensors."""

    done: int = 0
    """Cycles and chunks finished."""
    progress: float = 0.0
    """Share of the way to the sparsity target."""
    rises: list[float] = field(default_factory=list)
    """Of the divergence by zeroing alone, by cycle."""
    history: list[dict] = field(default_factory=list)
    """Records."""


OnRecord = Callable[[Record, int], None]
"""(record, number of records that the stage will have)."""


@contextlib.contextmanager
def _older_objects_spared() -> Iterator[None]:
    """Large generations would have Python look through all that was imported for garbage, again and again.

    For the time being alone: what is garbage by the end would stay for good.
    """
    if gc.get_freeze_count():  # the application's doing, which is not ours to undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        # What was frozen counts as old: left to itself, Python might look for garbage among it in hours. At the end, so
        # that a run which is killed again and again gets on.
        gc.collect()


@_older_objects_spared()
def evolve(problem: Problem, config: Config, student: Student, pool: Pool, folder: Path | None,
           fingerprint: dict, on_record: OnRecord, limit: int | None = None,
           units: Callable[[], Units] = lambda: NO_UNITS) -> list[dict]:
    """Evolve a student in place to its sparsity.

    Args:
        problem: what is compressed.
        config: the whole configuration.
        student: a copy of the teacher, or an earlier student.
        pool: replicas of the student.
        folder: of the run, for checkpoints; one found there is continued. None: no checkpoints.
        fingerprint: what must be equal for a checkpoint to be continued.
        on_record: told of each record.
        limit: bytes that the file may have, which decide the sparsity; None: `evolution.sparsity` does.
        units: tells the network's hidden units, which the file is to have in order; called where bytes matter.

    Returns:
        The history: records as dicts.
    """
    refit = build_refit(student, problem, config.refit, config.threads, config.pool)
    backoff = Backoff(refit, student, pool, config.quantization.negligible)
    state = _restore(folder, fingerprint, student, (refit, backoff), pool)
    evolution = settled(config)
    targets = Targets(evolution, problem.layers)
    chunks = range(0, config.refit.final_steps if config.refit.method == "distill" else 0, FINAL_CHUNK)
    total = config.evolution.cycles + len(chunks)
    started = time.perf_counter() - (state.history[-1]["seconds"] if state.history else 0.0)
    divergence = state.history[-1]["divergence"] if state.history else 0.0
    while state.done < total:
        step = state.done
        found = None
        generator = torch_generator(config.seed, "refit", step)
        if step < config.evolution.cycles:
            rate = _rate(config, student, limit, units)
            if limit is not None:
                room = room_for_layers(problem, limit, units().unread_values(student))
                if step == 0:
                    require_room(rate, room, targets)
                sparsity = aimed_sparsity(rate, room, targets.follows_sparsity, targets.survivors)
                targets = Targets(replace(evolution, sparsity=sparsity), problem.layers)
            if step == 0 and student.sparsity:  # it starts from a file
                if _regrow(problem, config, student, pool, targets.missing(student.counts)):
                    rate = _rate(config, student, limit, units)
                state.progress = progress_at(evolution.schedule, 1 - student.sparsity, targets.density)
                if evolution.schedule == "adaptive":
                    divergence = students_divergence(pool)
            state.progress = next_progress(evolution, step, state.progress, state.rises)
            budget = targets.budget(state.progress, student.counts)
            given = saliency_inputs(problem, config, student, step)
            with pool.dispatch() as dispatch:
                found = breed(given, budget, evolution, dispatch, pool.batches,
                              numpy_generator(config.seed, "search", step), rate)
            student.commit(found.candidate)
            pool.commit(found.candidate)
            after = found.divergence
            if evolution.schedule == "adaptive":
                after = after if np.isfinite(after) else students_divergence(pool)
                state.rises.append(max(after - divergence, LEAST_RISE))
            divergence = backoff.after_cycle(generator)
        else:
            start = chunks[step - config.evolution.cycles]
            stop = min(start + FINAL_CHUNK, config.refit.final_steps)
            divergence = backoff.final(start, stop, stop == config.refit.final_steps, divergence, generator)
        if not np.isfinite(divergence):
            raise FloatingPointError(f"the student's divergence is {divergence} after cycle {step + 1}; lower "
                                     "refit.learning_rate or evolution.sparsity, or take more cycles")
        record = Record(step + 1, student.sparsity, divergence,
                        None if found is None or np.isnan(found.divergence) else found.divergence, pool.evaluations,
                        found.saved_evaluations if found else 0, found.correlation if found else None,
                        time.perf_counter() - started,
                        [float(mask.float().mean()) for mask in student.masks])
        state.history.append(asdict(record))
        state.done += 1
        if folder is not None:
            checkpoint.save_checkpoint(folder, state.done, {**student.state(), **refit.state(), **backoff.state()},
                            {**asdict(state), "fingerprint": fingerprint})
        on_record(record, total)
    return state.history


def settled(config: Config) -> EvolutionConfig:
    """The evolution's configuration with what depends on the refit filled in.

    Distillation takes the gradient away that taylor follows, and has its own use for the time.
    """
    evolution, distilled = config.evolution, config.refit.method == "distill" and config.refit.steps > 0
    criteria = ["fisher", "magnitude"] + ([] if distilled else ["taylor"])
    return replace(evolution, criteria=evolution.criteria or criteria,
                   schedule=evolution.schedule or ("exponential" if distilled else "cubic"))


def _rate(config: Config, student: Student, limit: int | None, units: Callable[[], Units]) -> RateModel | None:
    """What the student's file takes; None where bytes do not matter."""
    weighed = config.evolution.rate_weight > 0
    return measure_rate(student, config.quantization, units(), priced=weighed) if weighed or limit is not None else None


def _regrow(problem: Problem, config: Config, student: Student, pool: Pool, missing: Budget) -> bool:
    """Bring back the survivors that a student which was started from lacks; False where there is nothing to do."""
    refit = config.refit
    idle = refit.method == "none" or (refit.method == "distill" and not refit.steps + refit.final_steps)
    if idle or not missing.total:  # without a refit nothing would give them values
        return False
    log.info("%d weights come back: the student is sparser than asked for", missing.total)
    regrow(student, problem, config.refit, missing, torch_generator(config.seed, "regrow"))
    pool.load(student)
    return True


def saliency_inputs(problem: Problem, config: Config, student: Student, step: int) -> SaliencyInputs:
    """Inputs of a cycle's saliencies: a fresh sample of the problem's, augmented as refit's are."""
    generator = torch_generator(config.seed, "saliency", step)
    indices = draw_sample(len(problem.inputs), problem.chances, config.evolution.saliency_inputs, generator)
    inputs = problem.inputs[indices]
    if problem.augment is not None:
        inputs = problem.augment(inputs, generator)
    return SaliencyInputs(student, problem, inputs, config.evolution.saliency_batch, generator, config.refit.memory_mb)


def _restore(folder: Path | None, fingerprint: dict, student: Student, others: tuple[Refit, Backoff],
             pool: Pool) -> Progress:
    """Continue from the newest checkpoint of a folder, or start afresh where there is none."""
    found = checkpoint.latest(folder) if folder is not None else None
    if found is None:
        return Progress()
    checkpoint.require_same(found.meta, fingerprint)
    student.load_state(found.tensors)
    for other in others:
        other.load_state(found.tensors)
    pool.load(student)
    state = Progress(**{key: found.meta[key] for key in ("done", "progress", "rises", "history")})
    pool.evaluations = state.history[-1]["evaluations"]
    log.info("continuing after cycle %d", state.done)
    return state
