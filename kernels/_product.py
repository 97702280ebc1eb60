"""Matrix products: a tile of one in a kernel, and whole ones by torch whose factors are float32 or halves of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def product_tile(
    rows_ptr, cols_ptr, m, n, M, N, D, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's tile of rows (M, D) @ cols (N, D)^T: rows m and n, by pointers or, with TMA, by descriptors."""
    S = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        for start in range(0, D, BLOCK_D):
            a = rows_ptr.load([tl.program_id(0) * BLOCK_M, start])
            b = cols_ptr.load([tl.program_id(1) * BLOCK_N, start])
            S = tl.dot(a, tl.trans(b), S, input_precision=PRECISION)
    else:
        row_ptrs = rows_ptr + m.to(tl.int64)[:, None] * D
        col_ptrs = cols_ptr + n.to(tl.int64)[None, :] * D
        for start in range(0, D, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            a = tl.load(row_ptrs + k[None, :], mask=(m < M)[:, None] & (k < D)[None, :], other=0.0)
            b = tl.load(col_ptrs + k[:, None], mask=(k < D)[:, None] & (n < N)[None, :], other=0.0)
            S = tl.dot(a, b, S, input_precision=PRECISION)
    return S


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a b in float32, by torch, perhaps in total's place; a and b are float32 or halves of it."""
    if a.dtype != torch.float32 and torch.version.hip is None:
        return torch.addmm(total, a, b, out_dtype=torch.float32)
    return total.addmm_(a.float(), b.float())  # what is in place autocast leaves alone


@triton.jit
def halved(x):
    """float32 as the sum of two bfloat16, but for 2^-16 of it."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    # an infinity is all in its first half
    return high, tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.bfloat16)
