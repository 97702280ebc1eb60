"""The average of two tensors, whose every value lies between its ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# elements of half precision that are widened at a time
_BLOCK = 1 << 17
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def blend(
    a: Tensor,  # (n,) floating
    b: Tensor,  # (n,) of the same dtype
    alpha: float,
) -> Tensor:
    """(1-alpha)·a + alpha·b for 0 < alpha < 1, in a's dtype on a's device.

    Computed in float32 at least. Where the ends agree in every bit, so does the result.
    """
    b = b.to(a.device)
    # torch.lerp's form in single operations: torch.lerp fuses a multiply-add in its vector loop but
    # not at the loop's ends, so that its last bits depend on how the tensor is cut up. Subtracting
    # last keeps -0 where both ends have it.
    near, far, share = (a, b, alpha) if alpha < 0.5 else (b, a, 1 - alpha)
    wide = torch.promote_types(a.dtype, torch.float32)
    out = torch.empty_like(a)
    if wide == a.dtype:
        torch.sub(near, far, out=out)
        torch.sub(near, out.mul_(share), out=out)
        return out if math.isfinite(out.sum()) else _mend(a, b, alpha, out)
    # block by block through the same two buffers: fresh ones of this size cost more in page faults
    # than the arithmetic
    size = len(a)
    if a.device.type == "cpu":
        size = min(size, _BLOCK)
    buffers = [torch.empty(size, dtype=wide, device=a.device) for _ in range(2)]
    blocks = (tensor.split(max(size, 1)) for tensor in (near, far, out))
    for n, f, result in zip(*blocks):
        x, y = (buffer[: len(n)] for buffer in buffers)
        x.copy_(n)
        torch.sub(x, y.copy_(f), out=y)
        torch.sub(x, y.mul_(share), out=y)
        result.copy_(y)
        if not math.isfinite(y.sum()):
            result.copy_(_mend(n, f, share, result))
    return out


def _mend(
    a: Tensor,  # (n,)
    b: Tensor,  # (n,)
    alpha: float,
    mixed: Tensor,  # (n,)
) -> Tensor:
    """`mixed` where it is finite; bits that both ends share (infinities, NaN payloads); an average
    whose difference overflowed, by the form that cannot."""
    wide = torch.promote_types(a.dtype, torch.float32)
    apart = a.isfinite() & b.isfinite() & ~mixed.isfinite()
    safe = (1 - alpha) * a.to(wide) + alpha * b.to(wide)
    mixed = torch.where(apart, safe.to(a.dtype), mixed)
    bits = _BITS[a.dtype.itemsize]
    same = a.view(bits) == b.view(bits)
    return torch.where(same, a.view(bits), mixed.view(bits)).view(a.dtype)
