"""Images channels last, in which CPUs convolve faster: forwards in general, backwards where channels are few."""

import torch
from torch import Tensor, nn

from de_ray.problem.hooks import drop_pre_hooks
from de_ray.problem.outputs import flatten
from de_ray.problem.probing import differ


def _channels_last(_: nn.Module, given: tuple[Tensor]) -> Tensor:
    (images,) = given
    return images.to(memory_format=torch.channels_last) if images.device.type == "cpu" else images


@torch.no_grad()
def take_channels_last(model: nn.Module, images: Tensor) -> None:
    """Have a network of convolutions lay its inputs out channels last from now on, where it takes images like these so
    and answers the same: what takes a `.view` of activations, for one, does not.

    Args:
        model: changed in place, by a hook in front of it; on a GPU its inputs stay as they are.
        images: [N, C, H, W]; a model of other inputs is left alone.
    """
    if images.ndim != 4 or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    expected = flatten(model(images))
    hook = model.register_forward_pre_hook(_channels_last, prepend=True)
    try:
        found = flatten(model(images))
        agrees = not any(differ(one, other) for one, other in zip(expected, found, strict=True))
    except Exception:  # noqa: BLE001 - the user's code on what it was not written for
        agrees = False
    if not agrees:
        hook.remove()


def take_any_layout(model: nn.Module) -> nn.Module:
    """Undo `take_channels_last`, where it was done; returns the model."""
    return drop_pre_hooks(model, lambda hook: hook is _channels_last)
