"""What a function that hooks into a model works on: the module behind what ``load`` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# what torch.compile and DistributedDataParallel call the module that they wrap
WRAPPED = ("_orig_mod", "module")


def module_of(model: Any) -> nn.Module:
    """The torch module of a model: of what ``clipsteer.load`` returns, or a module as it is.

    Raises TypeError for anything else.
    """
    from torch import nn  # not above: lists of options are read without torch

    if isinstance(model, nn.Module):
        return model
    inside = getattr(model, "model", None)
    if isinstance(inside, nn.Module):
        return inside
    raise TypeError(
        f"expected a model of clipsteer.load or a torch.nn.Module, got {type(model).__name__}"
    )
