"""How many weights survive after each cycle."""

from collections.abc import Sequence
from fnmatch import filter as matching

import numpy as np

from de_ray.config import EvolutionConfig
from de_ray.evolution.space import Budget
from de_ray.problem.base import Layer

STEP_RANGE = (0.5, 1.5)
"""How far an adaptive step may differ from the even one, as a factor."""


def next_progress(config: EvolutionConfig, cycle: int, progress: float, rises: Sequence[float]) -> float:
    """Share of the way to the target that is done after a cycle, in (0, 1]; the last cycle always reaches 1.

    Args:
        config: schedule and number of cycles.
        cycle: in [0, config.cycles).
        progress: before the cycle, in [0, 1).
        rises: of the divergence in earlier cycles, by zeroing alone, each > 0; steers the adaptive schedule.
    """
    left = config.cycles - cycle
    if left == 1:
        return 1.0
    step = (1 - progress) / left
    if config.schedule == "adaptive" and rises:
        step *= float(np.clip(np.median(rises) / rises[-1], *STEP_RANGE))
    return progress + step


def density_at(schedule: str, progress: float, target: float) -> float:
    """Density in [target, 1] after a share of the way from 1 to `target`."""
    if schedule == "linear":
        return 1 - progress * (1 - target)
    if schedule == "cubic":  # Zhu & Gupta, arXiv:1710.01878
        return target + (1 - target) * (1 - progress) ** 3
    return target ** progress


def progress_at(schedule: str, density: float, target: float) -> float:
    """Share of the way at which a density has been reached, in [0, 1); as near to 1 as is worth it below `target`."""
    low, high = 0.0, 1.0
    for _ in range(50):  # halves the interval below float64's resolution
        middle = (low + high) / 2
        low, high = (middle, high) if density_at(schedule, middle, target) > density else (low, middle)
    return min(low, 1 - 1e-9)


class Targets:
    """Survivors that a configuration asks for: a number for each bound layer, one number for all other layers.

    Args:
        config: sparsity, allocation and targets by glob.
        layers: of the problem.

    Raises:
        ValueError: a glob matches no layer.
    """

    def __init__(self, config: EvolutionConfig, layers: Sequence[Layer]) -> None:
        names = [layer.name for layer in layers]
        self._schedule = config.schedule
        self._sizes = np.array([layer.size for layer in layers], np.int64)
        self._bound = np.full(len(layers), config.allocation == "uniform")
        self._densities = np.full(len(layers), 1 - config.sparsity)
        self.follows_sparsity = np.ones(len(layers), bool)
        """bool [L], False for layers that have a target of their own."""
        for pattern, sparsity in config.targets.items():
            found = [names.index(name) for name in matching(names, pattern)]
            if not found:
                raise ValueError(f"evolution.targets.{pattern}: no layer has such a name; the layers are "
                                 + ", ".join(names))
            self._bound[found], self._densities[found] = True, 1 - sparsity
            self.follows_sparsity[found] = False
        self._free_density = 1 - config.sparsity

    @property
    def density(self) -> float:
        """Of all layers, in the end."""
        return float(self._sizes @ self._densities / self._sizes.sum())

    @property
    def survivors(self) -> np.ndarray:
        """int64 [L], in the end; of use for layers that have a target of their own."""
        return self._due(1.0)

    def budget(self, progress: float, survivors: Sequence[int]) -> Budget:
        """Zeros to add to come from the present survivors to the numbers due at `progress`.

        Args:
            progress: share of the way that is to be done, in (0, 1].
            survivors: int [L], present survivors.
        """
        return self._beyond(progress, survivors, 1)

    def missing(self, survivors: Sequence[int]) -> Budget:
        """Survivors to add where there are fewer than the target has; see `budget`."""
        return self._beyond(1.0, survivors, -1)

    def _due(self, progress: float) -> np.ndarray:
        """Survivors of each layer by itself, int64 [L], at least 1: without any, all layers before and behind it would
        be of no use."""
        return np.array([max(1, round(size * density_at(self._schedule, progress, density))) for size, density in
                         zip(self._sizes.tolist(), self._densities.tolist(), strict=True)], np.int64)

    def _beyond(self, progress: float, survivors: Sequence[int], sign: int) -> Budget:
        now = np.array(survivors, np.int64)
        due = self._due(progress)
        fixed = np.where(self._bound, np.maximum(sign * (now - due), 0), 0)
        free = ~self._bound
        free_due = round(int(self._sizes[free].sum()) * density_at(self._schedule, progress, self._free_density))
        return Budget(self._bound, fixed, max(0, sign * (int(now[free].sum()) - free_due)))
