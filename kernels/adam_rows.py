"""Adam on the rows of a dictionary in one pass over memory: w, m, v and the gradient are read once, w, m, v written.

A program holds whole rows in registers, so that rows that keep norm 1 lose the gradient's part along them before and
are normalised after without a second read. What depends on the step alone takes a program of its own.
"""

from __future__ import annotations

import math
import sys

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, next_power_of_2, on_device

MAX_COLUMNS = 8192  # more do not fit a program's registers


@triton.jit
def _adam_scales_kernel(
    step_ptr, factor_ptr, scales_ptr, lr, HAS_FACTOR: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr
):
    # 1 - beta^t loses what beta^t is rounded by: 6e-5 of 1 - 0.999 in float32. Float arguments of a kernel are float32,
    # constants are not.
    t = tl.load(step_ptr).to(tl.float64)
    correction1 = 1.0 - tl.exp2(t * tl.full((), LOG2_BETA1, tl.float64))
    correction2 = 1.0 - tl.exp2(t * tl.full((), LOG2_BETA2, tl.float64))
    tl.store(scales_ptr, (lr / correction1).to(tl.float32))
    tl.store(scales_ptr + 1, tl.sqrt(correction2).to(tl.float32))
    factor = tl.full((), 1.0, tl.float32)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr).to(tl.float32)
    tl.store(scales_ptr + 2, factor)


@triton.jit(do_not_specialize=["n"])
def _adam_rows_kernel(
    w_ptr, m_ptr, v_ptr, grad_ptr, scales_ptr, n, d, rate1, beta2, rate2, eps,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    at = rows[:, None] * d + cols[None, :]
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(scales_ptr + 2)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=1.0)  # outside 0 / (1 + eps) is added, even where eps is 0
    lr = tl.load(scales_ptr)
    scale = tl.load(scales_ptr + 1)
    if UNIT:
        # a row of zeros has no direction and loses nothing
        unit = w * (1.0 / tl.maximum(tl.sqrt_rn(tl.sum(w * w, axis=1)), 2.0**-126))[:, None]
        g -= tl.sum(unit * g, axis=1)[:, None] * unit
    m += rate1 * (g - m)
    v = beta2 * v + rate2 * g * g
    w -= lr * (m / (tl.sqrt(v) / scale + eps))
    if UNIT:
        w *= (1.0 / tl.maximum(tl.sqrt_rn(tl.sum(w * w, axis=1)), 2.0**-126))[:, None]
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(w_ptr + at, w, mask=inside)


def rows_config(d: int) -> dict[str, int]:
    """A thousand weights a program or one row, read in one or two 16-byte pieces a lane while 16 warps suffice."""
    block_d = max(16, next_power_of_2(d))
    block_n = max(1, 1024 // block_d)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": min(block_n * block_d // 256, 16)}


def adam_rows(
    w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, unit: bool, lr: float,
    beta1: float, beta2: float, eps: float, factor: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Step number ``step`` (a float32 scalar, counted up before) of Adam on w, m, v (n, d) with grad (n, d) times
    ``factor`` (a scalar), in place.

    ``unit``: grad loses its component along each row of w before (grad itself stays), rows are scaled to norm 1 after.
    """
    if any(t.shape != w.shape or t.dtype != torch.float32 or not t.is_contiguous() for t in (w, m, v, grad)):
        raise ValueError("adam_rows: expected contiguous float32 tensors of one shape")
    n, d = w.shape
    if w.numel() == 0:
        return
    if interpreted(_adam_rows_kernel):
        config = {"BLOCK_N": 64, "BLOCK_D": max(16, next_power_of_2(d))}
    else:
        config = rows_config(d)
    scales = torch.empty(3, dtype=torch.float32, device=w.device)
    logs = {f"LOG2_BETA{i}": math.log2(max(b, sys.float_info.min)) for i, b in ((1, beta1), (2, beta2))}
    with on_device(w):
        given = step if factor is None else factor
        _adam_scales_kernel[(1,)](step, given, scales, float(lr), HAS_FACTOR=factor is not None, **logs, num_warps=1)
        _adam_rows_kernel[(cdiv(n, config["BLOCK_N"]),)](
            w, m, v, grad, scales, n, d, 1 - beta1, beta2, 1 - beta2, float(eps), UNIT=unit, **config
        )
