"""Search over widths as ask/tell, with Optuna; who evaluates is somebody else's business."""

import math
from collections.abc import Sequence

import numpy as np
import optuna

from de_ray.quantization.pareto import Trial

ROUND = 4
"""Assignments a round after the first. Part of the result, so that the number of evaluators is not."""
NEAREST = 3
"""Warm starts that span the neighbourhood in which Optuna samples."""
ATTEMPTS = 20
"""Suggestions in a row that may repeat earlier ones before a neighbour is taken instead."""

Widths = tuple[int, ...]


class WidthSearch:
    """Multi-objective (bytes, divergence) search in rounds, which a seed determines whatever the order of arrival.

    A round is asked as a whole and told as a whole. The first one is the warm starts. Later ones come from Optuna's TPE
    sampler (Bergstra et al. 2011), each layer's width between those that the `NEAREST` warm starts give it. A repeated
    suggestion becomes a step to an assignment that was not asked yet, anywhere in the range of widths.

    Args:
        layers: number of layers.
        widths: the least and the greatest width.
        trials: assignments in all, >= 1; no more than there are.
        seed: of the sampler.
        warm_starts: distinct assignments of the first round, at least one, the most promising first.
    """

    def __init__(self, layers: int, widths: tuple[int, int], trials: int, seed: int,
                 warm_starts: Sequence[Widths]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.trials: list[Trial] = []
        self._low, self._high = widths
        self._budget = int(min(trials, (self._high - self._low + 1) ** layers))
        self._warm_starts = list(warm_starts[:self._budget])
        names = [f"layer_{l:04d}" for l in range(layers)]
        self._everywhere = {name: optuna.distributions.IntDistribution(*widths) for name in names}
        near = np.array(self._warm_starts[:NEAREST])  # [<= NEAREST, layers]
        self._nearby = {name: optuna.distributions.IntDistribution(int(low), int(high))
                        for name, low, high in zip(names, near.min(0), near.max(0), strict=True)}
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(self._warm_starts))
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._generator = np.random.default_rng(seed)
        self._known: set[Widths] = set()
        self._round: list[tuple[optuna.Trial, Widths]] = []

    @property
    def finished(self) -> bool:
        """Every assignment of the budget was told."""
        return len(self.trials) == self._budget

    def ask(self) -> list[Widths]:
        """The next round; empty when finished."""
        assert not self._round, "a round is told before the next one is asked"
        if self._warm_starts:
            self._round = [self._exactly(widths) for widths in self._warm_starts]
            self._warm_starts = []
        else:
            self._round = [self._suggest() for _ in range(min(ROUND, self._budget - len(self.trials)))]
        return [widths for _, widths in self._round]

    def tell(self, results: Sequence[Trial]) -> None:
        """Results of the round, in the order in which it was asked; failed ones teach the sampler nothing."""
        assert [trial.widths for trial in results] == [widths for _, widths in self._round]
        for (asked, _), result in zip(self._round, results, strict=True):
            if math.isfinite(result.divergence):
                self._study.tell(asked, [result.bytes, result.divergence])
            else:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        self.trials.extend(results)
        self._round = []

    def _suggest(self) -> tuple[optuna.Trial, Widths]:
        """An assignment that was not asked before: the sampler's, or a random walk's from the sampler's."""
        for _ in range(ATTEMPTS):
            asked = self._study.ask(self._nearby)
            widths = tuple(asked.params.values())
            if widths not in self._known:
                self._known.add(widths)
                return asked, widths
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        while widths in self._known:
            layer = int(self._generator.integers(len(widths)))
            width = widths[layer] + int(self._generator.choice((-1, 1)))
            widths = (*widths[:layer], min(max(width, self._low), self._high), *widths[layer + 1:])
        return self._exactly(widths)

    def _exactly(self, widths: Widths) -> tuple[optuna.Trial, Widths]:
        """A trial of the study with these widths."""
        self._study.enqueue_trial(dict(zip(self._everywhere, widths, strict=True)))
        self._known.add(widths)
        return self._study.ask(self._everywhere), widths
