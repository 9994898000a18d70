"""How an evaluation is cut into tasks: by layers, so that the candidates of a task share the passes below them.

The cut depends on the candidates and the configuration alone, never on how many evaluators there are: which candidates
are stacked together decides how their sums round, and results must not depend on the pool.
"""

from collections.abc import Sequence

from de_ray.evaluation.edits import Edit


def cut(candidates: Sequence[tuple[Edit, ...]], stack: int) -> list[list[int]]:
    """Indices of candidates, by task.

    Args:
        candidates: K candidates.
        stack: the most candidates of a task, >= 1.

    Returns:
        Lists of at most `stack` ascending indices, each of candidates that change the same layers; every index of
        range(K) once. Tasks of the earliest layers, the dearest, come first.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, candidate in enumerate(candidates):
        groups.setdefault(tuple(edit.layer for edit in candidate), []).append(k)
    return [group[start:start + stack] for _, group in sorted(groups.items())
            for start in range(0, len(group), stack)]
