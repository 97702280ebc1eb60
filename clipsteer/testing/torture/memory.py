"""Ways to catch a kernel that reads or writes where it should not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["far_apart", "fenced", "poisoned", "same_bits", "strided", "transposed"]


def fenced(t: Tensor, poison: float = math.nan) -> Tensor:
    """The same values in the middle of a larger buffer of ``poison`` (floating) or of the largest
    integer: a kernel that reads outside its input is found out."""
    poison = poison if t.is_floating_point() else torch.iinfo(t.dtype).max
    store = torch.full((t.numel() + 128,), poison, dtype=t.dtype, device=t.device)
    inner = store[64 : 64 + t.numel()].view(t.shape)
    return inner.copy_(t)


def strided(t: Tensor) -> Tensor:
    """The same values, not contiguous: every other column of a poisoned buffer, transposed in
    memory."""
    if t.dim() == 0:
        return fenced(t)
    poison = math.nan if t.is_floating_point() else -1
    twice = (*t.shape[:-1], 2 * t.shape[-1])
    wide = torch.full(twice, poison, dtype=t.dtype, device=t.device)
    view = wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values, laid out with the last two dimensions exchanged, as the weight of a linear
    layer is when it is given as a dictionary."""
    return fenced(t.mT).mT if t.dim() > 1 else fenced(t)


def far_apart(t: Tensor) -> Tensor | None:
    """The same values, the last of them more than 2^31 elements behind the first: an offset of 32
    bits is found out. On a CPU only what is written takes memory. None where there is no room, or
    the tensor has one row."""
    if t.dim() != 2 or len(t) < 2:
        return None
    rows, columns = t.shape
    apart = 2**31 // (rows - 1) + columns + 1
    try:
        store = torch.empty((rows - 1) * apart + columns, dtype=t.dtype, device=t.device)
    except RuntimeError:
        return None
    return store.as_strided(t.shape, (apart, 1)).copy_(t)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN: an output element that is never written is found out."""
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    # as use_deterministic_algorithms(True, warn_only=True), which loads torch's compiler
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())
