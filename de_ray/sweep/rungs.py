"""Asynchronous successive halving (ASHA; Li et al., arXiv:1810.05934) on divergence at equal sparsity.

The time of a compression is how often its density has been halved: log2(1 / (1 - sparsity)). Its schedule decides at
which sparsities it has cycles; at a rung between two of them its divergence is interpolated, so that all trials are
compared at the very same sparsity.
"""

import math
from collections.abc import Iterator, Sequence

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from de_ray.config import SweepConfig

HALVINGS, DIVERGENCE = "halvings", "divergence"
MOST_HALVINGS = 20.0
"""Beyond all rungs: a sparsity of 99.9999 %."""


def halvings(sparsity: float) -> float:
    """How often the density of 1 was halved to get there."""
    return -math.log2(1 - sparsity) if sparsity < 1 else MOST_HALVINGS


def rungs(config: SweepConfig) -> list[float]:
    """Halvings at which trials are compared, ascending."""
    first = halvings(config.first_rung)
    count = 1 + int(max(0.0, math.log(MOST_HALVINGS / first)) / math.log(config.reduction))
    return [first * config.reduction**k for k in range(count)]


def crossings(given: Sequence[float], before: tuple[float, float],
              after: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """(halvings, divergence) of the rungs between two cycles, interpolated; in the logarithm of the divergence, which
    climbs by about a factor a halving, where both are above 0.

    Args:
        given: rungs.
        before, after: (halvings, divergence) of the two cycles.
    """
    for rung in given:
        if before[0] < rung <= after[0]:
            share = (rung - before[0]) / (after[0] - before[0])
            if before[1] > 0 and after[1] > 0:
                yield rung, before[1] ** (1 - share) * after[1]**share
            else:
                yield rung, (1 - share) * before[1] + share * after[1]


class EqualSparsity(FIFOScheduler):
    """ASHA among trials that aim at the same sparsity, where the space lists a few of them.

    Towards 95 % a trial takes larger steps than one towards 80 % and is worse on the way; were they rivals, only the
    largest files would be left.

    Args:
        config: first rung and reduction.
        aims: the sparsity that each trial aims at, by number; None where trials of all aims are rivals.
    """

    def __init__(self, config: SweepConfig, aims: Sequence[float | None]) -> None:
        super().__init__()
        self._config, self._aims = config, aims
        self._by_aim: dict[float | None, AsyncHyperBandScheduler] = {}

    def _of(self, trial: Trial) -> AsyncHyperBandScheduler:
        aim = self._aims[trial.config["number"]]
        if aim not in self._by_aim:
            first = halvings(self._config.first_rung)
            self._by_aim[aim] = AsyncHyperBandScheduler(
                HALVINGS, DIVERGENCE, "min", max_t=max(MOST_HALVINGS, first), grace_period=first,
                reduction_factor=self._config.reduction, stop_last_trials=False)
        return self._by_aim[aim]

    def on_trial_add(self, tune_controller: object, trial: Trial) -> None:
        """See `TrialScheduler`, here and below."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: object, trial: Trial) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: object, trial: Trial, result: dict) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: object, trial: Trial, result: dict) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: object, trial: Trial) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return f"ASHA on divergence at equal sparsity, {len(self._by_aim)} groups of rivals"
