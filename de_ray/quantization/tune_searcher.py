"""Hands a `WidthSearch` to Ray Tune, which asks for one trial at a time."""

from ray.tune.search import Searcher

from de_ray.quantization.pareto import Trial, make_trial
from de_ray.quantization.search import Widths, WidthSearch


class RoundSearcher(Searcher):
    """Passes rounds on trial by trial, and tells each as a whole and in the order asked.

    Tune's own `ConcurrencyLimiter(batch=True)` closes a batch as soon as all its *running* trials are done, so that
    what a sampler has seen depends on how fast trials finish; here it does not.

    Args:
        search: decides which widths are tried.
        concurrent: trials that may run at a time, >= 1; the result does not depend on it.
    """

    def __init__(self, search: WidthSearch, concurrent: int) -> None:
        super().__init__(metric=["bytes", "divergence"], mode=["min", "min"])
        self.search = search
        self._concurrent = concurrent
        self._round: list[Widths] = []
        self._index: dict[str, int] = {}  # of each trial started in the round
        self._results: dict[int, Trial] = {}

    def suggest(self, trial_id: str) -> dict | str | None:
        """The next trial's configuration; None while it has to wait, FINISHED after the last one."""
        if self.search.finished:
            return Searcher.FINISHED
        if not self._round:
            self._round = self.search.ask()
        if len(self._index) == len(self._round) or len(self._index) - len(self._results) >= self._concurrent:
            return None
        index = len(self._index)
        self._index[trial_id] = index
        return {"widths": self._round[index]}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Keep a trial's result until its round is complete. Trials that raised end the sweep elsewhere."""
        if error or not result:
            return
        index = self._index[trial_id]
        self._results[index] = make_trial(self._round[index], result["bytes"], result["divergence"])
        if len(self._results) == len(self._round):
            self.search.tell([self._results[i] for i in range(len(self._round))])
            self._round, self._index, self._results = [], {}, {}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Trials have one result, their last."""

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Concurrency is this searcher's own business."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept of a searcher: a resumed run sweeps again, which takes seconds, and gives the same."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
        raise NotImplementedError("the sweep of bit-widths is made again, not restored")
