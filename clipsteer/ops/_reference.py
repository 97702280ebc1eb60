"""What the definitions in plain torch share: halves are computed in float32 and rounded once, and
rows are taken by index so that their gradient is a sum of the same kind."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import HALVES

Result = TypeVar("Result")


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value, or the tuple of values, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def rounded_once(definition: Callable[..., Result]) -> Callable[..., Result]:
    """The definition for halves too: it computes in float32, and what it returns is rounded to
    the first tensor's dtype.

    In their own type torch rounds every intermediate, on a CPU even the partial sums of a gradient
    by index. Autocast, which would take the products back to halves, is off inside.
    """

    def widened(t: Tensor) -> Tensor:
        return t.float() if t.dtype in HALVES else t

    @functools.wraps(definition)
    def defined(*args: Any, **named: Any) -> Result:
        first = next((t for t in (*args, *named.values()) if isinstance(t, Tensor)), None)
        if first is None or first.dtype not in HALVES:
            return definition(*args, **named)
        dtype = first.dtype
        kind = first.device.type
        casting = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if casting else contextlib.nullcontext():
            wide = {name: _each(value, widened) for name, value in named.items()}
            result = definition(*_each(args, widened), **wide)
        return _each(result, lambda t: t.to(dtype) if t.is_floating_point() else t)

    return defined


def rows_of(
    t: Tensor,  # (n, ...)
    index: Tensor,  # (...) int64 in [0, n)
) -> Tensor:
    """``t[index]``, whose gradient is summed in one order, halves in float32; that of ``t[index]``
    is not on a CPU with several threads."""
    wide = t.float() if t.dtype in HALVES else t
    table = wide.flatten(1) if t.dim() > 1 else wide.unsqueeze(1)
    rows = F.embedding(index, table).to(t.dtype)
    return rows.reshape((*index.shape, *t.shape[1:]))
