"""State dicts and the modules that they are loaded into."""

import logging
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from de_ray.codec.header import Entry

log = logging.getLogger(__name__)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict strictly, with a warning where the model rounds it; returns the model in eval mode.

    Raises:
        ValueError: names or shapes do not fit.
    """
    require_fit(model, state)  # before anything is written: PyTorch would fill what does fit
    _tell_of_precision(model, state)
    try:
        model.load_state_dict(versioned(model, state))
    except RuntimeError as error:  # the module's own hooks
        raise ValueError(f"the file does not fit {type(model).__name__}: {error}") from error
    return model.eval()


def require_fit(model: nn.Module, state: Mapping[str, Tensor | Entry]) -> None:
    """Raise `ValueError` for a state dict, or its description, that a module cannot be filled with."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: expected an instance of the architecture that was "
                         "compressed, a torch.nn.Module")
    if meta := [name for name, value in model.state_dict().items() if isinstance(value, Tensor) and value.is_meta]:
        raise ValueError(f"the model's {meta[0]} is on the device meta, which holds no values: expected a model on one "
                         'that does, as model.to_empty(device="cpu") makes it')
    odd = misfits(model, state)
    if odd:
        every = len(model.state_dict().keys() | state.keys())
        raise ValueError(f"the file does not fit {type(model).__name__}: {len(odd)} of their {every} tensors differ in "
                         f"name or shape ({', '.join(odd[:4])})")


def _tell_of_precision(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Warn of tensors that round what the file holds."""
    types = {name: value.dtype for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = [name for name, value in state.items() if not torch.equal(value.to(types[name]).to(value.dtype), value)]
    if names:
        log.warning("the model's %s%s hold %s, to which the file's values are rounded: load into model.float() for the "
                    "network that was measured", names[0], ", ..." if len(names) > 1 else "",
                    str(types[names[0]]).removeprefix("torch."))


def versioned(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict with the versions of a model's modules, which some of them ask for."""
    found = OrderedDict(state)
    found._metadata = getattr(model.state_dict(), "_metadata", {})
    return found


def misfits(model: nn.Module, state: Mapping[str, Tensor | Entry]) -> list[str]:
    """Keys that a module and a state dict, or its description, do not share, or hold in other shapes; the module's
    first."""
    shapes, found = ({name: getattr(value, "shape", None) for name, value in values.items()}
                     for values in (model.state_dict(), state))
    return [name for name in {**shapes, **found}
            if name not in shapes or name not in found or shapes[name] != found[name]]
