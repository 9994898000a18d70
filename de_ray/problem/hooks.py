"""Hooks in front of modules that the package put there, taken away again."""

from collections.abc import Callable

from torch import nn


def drop_pre_hooks(module: nn.Module, ours: Callable[[object], bool]) -> nn.Module:
    """Remove the forward pre-hooks that `ours` tells, in place; copies of a module have no handles of theirs."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if ours(hook)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return module
