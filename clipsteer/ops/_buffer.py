"""A kept buffer for a gradient (``grad_buffer=``), and whether it is free to be written."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipsteer.ops._calls import transformed


def claimed(buffer: Tensor) -> Tensor | None:
    """A tensor that stands for ``buffer``, to be written and handed out; None while anything else
    can see what is in it, and under transforms.

    What can see it holds its storage: a gradient of an earlier backward pass or of an earlier use
    in this one, whatever views it went through, who keeps it, and the tensor that ``buffer`` is a
    view of. Or it holds ``buffer`` itself, as an attribute ``grad``.
    """
    if torch.compiler.is_compiling() or transformed():
        return None
    # taken first, so that of two threads that come together neither finds itself alone
    taken = buffer.detach()
    return taken if _holders(buffer) == _holders_of_one() else None


def _holders(t: Tensor) -> tuple[int, int]:
    """How many hold the storage of a tensor, and the tensor."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata), t._use_count()  # type: ignore[attr-defined]


@functools.cache
def _holders_of_one() -> tuple[int, int]:
    """The same of a tensor that has just been claimed: what torch and Python hold of themselves
    changes with their release."""
    buffer = torch.empty(0, device="cpu")
    taken = buffer.detach()
    found = _holders(buffer)
    del taken
    return found
