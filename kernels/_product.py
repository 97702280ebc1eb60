"""Matrix products: a tile of one in a kernel, and whole ones by torch whose factors are float32 or halves of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = tl.constexpr(32)


@triton.jit
def tile_numbers(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of an (M, N) product: neighbouring programs share columns, and GROUP tiles of rows that they
    come back to stay in the second-level cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    rest = pid % (GROUP * tiles_n)
    return group * GROUP + rest % size, rest // size


@triton.jit
def product_tile(
    rows_ptr, cols_ptr, tile_m, tile_n, M, N, D, TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    chosen_ptr=None, across=None, ACROSS: tl.constexpr = False,
):  # fmt: skip
    """A tile of rows (M, D) @ cols (N, D)^T, by pointers or, with TMA, by descriptors. What lies past the ends of M and
    N has some product. If ``chosen_ptr`` says which rows of ``cols`` are meant, these are gathered; ACROSS: they lie as
    (D, across)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        for start in range(0, D, BLOCK_D):
            a = rows_ptr.load([tile_m * BLOCK_M, start])
            if ACROSS:
                acc = tl.dot(a, cols_ptr.load([start, tile_n * BLOCK_N]), acc, input_precision=PRECISION)
            else:
                b = cols_ptr.load([tile_n * BLOCK_N, start])
                acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    else:
        offs = tl.arange(0, BLOCK_D)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # rows past the end repeat the last one, so that only D needs a mask
        row_ptrs = rows_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * D + offs[None, :]
        at = tl.minimum(n, N - 1).to(tl.int64)
        if chosen_ptr is not None:
            at = tl.load(chosen_ptr + at)
        if ACROSS:
            col_ptrs = cols_ptr + offs.to(tl.int64)[:, None] * across + at[None, :]
        else:
            col_ptrs = cols_ptr + at[:, None] * D + offs[None, :]
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                a = tl.load(row_ptrs)
                b = tl.load(col_ptrs)
            else:
                a = tl.load(row_ptrs, mask=(start + offs < D)[None, :], other=0.0)
                if ACROSS:
                    b = tl.load(col_ptrs, mask=(start + offs < D)[:, None], other=0.0)
                else:
                    b = tl.load(col_ptrs, mask=(start + offs < D)[None, :], other=0.0)
            row_ptrs += BLOCK_D
            if ACROSS:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
                col_ptrs += BLOCK_D * across
            else:
                acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
                col_ptrs += BLOCK_D
    return acc


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32, by torch; a and b are matrices, or batches of them, of float32 or bfloat16."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype != torch.float32 and torch.version.hip is None:
        return product(a, b, out_dtype=torch.float32)
    # what has a place to go autocast leaves alone
    return product(a.float(), b.float(), out=a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32))


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a b in float32, by torch; a and b are matrices of float32 or bfloat16."""
    if a.dtype == torch.float32 or torch.version.hip is not None:
        return total.addmm_(a.float(), b.float())
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@triton.jit
def store_weights(w, weight_ptr, rest_ptr, row, col, stride, mask, SPLIT: tl.constexpr, TMA: tl.constexpr):
    """A part of a matrix of weights, from (row, col) on: whole or, with SPLIT, as two halves in two places."""
    high, rest = halved(w) if SPLIT else (w, w)
    if TMA:
        weight_ptr.store([row, col], high)
        if SPLIT:
            rest_ptr.store([row, col], rest)
    else:
        rows = row + tl.arange(0, w.shape[0])
        place = rows.to(tl.int64)[:, None] * stride + (col + tl.arange(0, w.shape[1]))[None, :]
        tl.store(weight_ptr + place, high, mask=mask)
        if SPLIT:
            tl.store(rest_ptr + place, rest, mask=mask)


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """A tile's columns in PARTS, from left to right: what follows on a product is done a part at a time, as registers
    do not hold it all."""
    if PARTS == 1:
        parts = (tile,)
    else:
        pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        parts = parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)
    return parts


@triton.jit
def halved(x):
    """float32 as the sum of two bfloat16, but for 2^-16 of it."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    # an infinity is all in its first half
    return high, tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.bfloat16)
