"""How an evaluation is cut into tasks: by layers, so that the candidates of a task share the passes below them.

The cut depends on the candidates and the configuration alone, never on how many evaluators there are: which candidates
are stacked together decides how their sums round, and results must not depend on the pool.
"""

from collections.abc import Iterator, Sequence

from de_ray.evaluation.edits import Edit
from de_ray.evolution.candidate import blocks

SHARES = 8
"""Tasks of the same layers that there are at least, as far as there are candidates."""


def tasks(candidates: Sequence[tuple[Edit, ...]], stack: int) -> Iterator[list[int]]:
    """Indices of candidates, by task. A block of candidates is read no sooner than one of its tasks is asked for.

    Args:
        candidates: K candidates, which may be bred as they are read.
        stack: the most candidates of a task, >= 1.
    """
    parts = list(blocks(len(candidates)))
    for part in parts:
        for task in cut(candidates[part.start:part.stop], stack, -(-SHARES // len(parts))):
            yield [part.start + index for index in task]


def cut(candidates: Sequence[tuple[Edit, ...]], stack: int, shares: int = SHARES) -> list[list[int]]:
    """Indices of candidates, by task.

    Args:
        candidates: K candidates.
        stack: the most candidates of a task, >= 1.
        shares: tasks of the same layers that there are at least, as far as there are candidates.

    Returns:
        Lists of at most `stack` ascending indices, each of candidates that change the same layers; every index of
        range(K) once. Fewer than `shares` full tasks are cut into as many, so that small generations
        occupy several evaluators too. Tasks of the earliest layers, the dearest, come first.
    """
    found = []
    for group in by_layers(candidates):
        size = min(stack, -(-len(group) // shares))
        found += [group[start:start + size] for start in range(0, len(group), size)]
    return found


def by_layers(candidates: Sequence[tuple[Edit, ...]]) -> list[list[int]]:
    """Ascending indices of candidates that change the same layers, the earliest layers first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, candidate in enumerate(candidates):
        groups.setdefault(tuple([edit.layer for edit in candidate]), []).append(k)
    return [group for _, group in sorted(groups.items())]
