"""What a process of Ray Tune does for one trial: send an assignment to the pool's replicas.

Imports no torch, and loads no model: processes start fast, own no CPU and cannot starve the replicas.
"""

from collections.abc import Sequence

from ray import tune

from de_ray.quantization.table import Evaluator, SensitivityTable


class WidthTrial(tune.Trainable):
    """Evaluates `config["widths"]` in a single step; its process goes on to the next trial."""

    def setup(self, config: dict, table: SensitivityTable, evaluator: Evaluator) -> None:
        """Called once a process.

        Args:
            config: holds the first trial's widths.
            table: level choices and bytes by layer and width.
            evaluator: the pool's client.
        """
        self._table, self._evaluator = table, evaluator
        self._widths: Sequence[int] = config["widths"]

    def reset_config(self, new_config: dict) -> bool:
        """Take over the next trial."""
        self._widths = new_config["widths"]
        return True

    def step(self) -> dict:
        """Bytes and divergence of the assignment."""
        candidate = self._table.candidate(self._widths)
        divergence = self._evaluator.evaluate([candidate], range(self._evaluator.batches))[0]
        return {"bytes": self._table.payload(self._widths), "divergence": float(divergence), "done": True}
