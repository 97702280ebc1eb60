"""Small steps (``_calls.step``) that many ops have: layouts, dtypes, shapes, numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipsteer.ops._calls import step, transformed


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype)


def _full(sizes: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(sizes, value, dtype=dtype, device=device)


def contiguous(t: Tensor) -> Tensor:
    """``t.contiguous()``."""
    return t if t.is_contiguous() else step(_contiguous, t)


def contiguous_if(t: Tensor | None) -> Tensor | None:
    """The same of what may not be there."""
    return None if t is None else contiguous(t)


def cast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``."""
    return t if t.dtype == dtype else step(_to, t, dtype)


def as_rows(
    t: Tensor,  # (..., d)
) -> Tensor:
    """(B, d)."""
    if t.dim() == 2:
        return t
    # math.prod keeps a symbolic batch, which Size.numel() makes a number of
    return step(torch.reshape, t, (math.prod(t.shape[:-1]), t.shape[-1]))


def as_given(
    t: Tensor,  # (B, d)
    leading: torch.Size,
) -> Tensor:
    """(..., d) again."""
    return t if len(leading) == 1 else step(torch.reshape, t, (*leading, t.shape[-1]))


def detached(t: Tensor) -> Tensor:
    """``t.detach()``."""
    # of a tensor inside a transform ``requires_grad`` says nothing of the others around it
    plain = not (t.requires_grad or torch.compiler.is_compiling() or transformed())
    return t if plain and forward_ad._current_level < 0 else step(torch.detach, t)


def full(
    value: float | torch.SymFloat,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...] = (),
) -> Tensor:
    """A tensor of a number."""
    return step(_full, sizes, value, dtype, device)
