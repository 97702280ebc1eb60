"""Sums over the k features that each row uses, and the sums over rows that each feature needs for its gradient.

sparse_decode and gather_dot read whole rows of W (one feature a row) with vector loads. sparse_outer sorts the B*k
(feature, pair) entries once, stably, and lets each feature add its own segment in ascending order: no atomics, no
zero-filling pass, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, chip, interpreted, next_power_of_2, on_device


@triton.jit(do_not_specialize=["B"])
def _sparse_decode_fwd_kernel(
    acts_ptr, indices_ptr, w_ptr, b_ptr, out_ptr, B, d, k,
    HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = rows < B
    inside = cols < d
    acc = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        pair = live[:, None] & (j < k)[None, :]
        index = tl.load(indices_ptr + rows[:, None] * k + j[None, :], mask=pair, other=0)
        act = tl.load(acts_ptr + rows[:, None] * k + j[None, :], mask=pair, other=0.0).to(tl.float32)
        w = tl.load(
            w_ptr + index[:, :, None] * d + cols[None, None, :],
            mask=pair[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        acc += act[:, :, None] * w.to(tl.float32)
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * d + cols[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["B"])
def _gather_dot_kernel(
    rows_ptr, indices_ptr, w_ptr, out_ptr, B, d, k,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = rows < B
    pair = live[:, None] & (j < k)[None, :]
    index = tl.load(indices_ptr + rows[:, None] * k + j[None, :], mask=pair, other=0)
    acc = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        inside = cols < d
        x = tl.load(rows_ptr + rows[:, None] * d + cols[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            w_ptr + index[:, :, None] * d + cols[None, None, :],
            mask=pair[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        acc += x.to(tl.float32)[:, None, :] * w.to(tl.float32)
    out = tl.sum(acc, axis=2)
    tl.store(out_ptr + rows[:, None] * k + j[None, :], out.to(out_ptr.dtype.element_ty), mask=pair)


@triton.jit
def _sparse_outer_bwd_kernel(
    coeff_ptr, pairs_ptr, offsets_ptr, row_ptr, rows_ptr, dw_ptr, db_ptr, n, d, k,
    RAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    features = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = features < n
    inside = cols < d
    first = tl.load(offsets_ptr + features, mask=live, other=0)
    last = tl.load(offsets_ptr + features + 1, mask=live, other=0)
    dw = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, tl.max(last - first, axis=0)):
        at = first + start
        some = at < last
        pair = tl.load(pairs_ptr + at, mask=some, other=0)
        c = tl.load(coeff_ptr + pair, mask=some, other=0.0).to(tl.float32)
        row = pair // k
        if RAGGED:
            row = tl.load(row_ptr + pair, mask=some, other=0)
        x = tl.load(
            rows_ptr + row[:, None] * d + cols[None, :],
            mask=some[:, None] & inside[None, :],
            other=0.0,
        )
        dw += c[:, None] * x.to(tl.float32)
        db += c
    tl.store(
        dw_ptr + features[:, None] * d + cols[None, :],
        dw.to(dw_ptr.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(db_ptr + features, db.to(db_ptr.dtype.element_ty), mask=live)


def _interpreted_bf16(kernel: object, t: torch.Tensor) -> bool:
    # The interpreter truncates where it should round to bf16: there the kernel runs in fp32 and torch rounds.
    return t.dtype == torch.bfloat16 and interpreted(kernel)


def gather_config(W: torch.Tensor, dot: bool = False) -> dict[str, int]:
    """A warp reads lines of W in 16-byte pieces, a few features at once; for dot products four warps share a row."""
    line = chip(W.device).lanes * 16 // W.element_size()
    block_d = max(16, min(next_power_of_2(W.shape[1]), line))
    return {"BLOCK_B": 1, "BLOCK_K": 16 if dot else 4, "BLOCK_D": block_d, "num_warps": 4 if dot else 1}


def outer_config(d: int, element_size: int) -> dict[str, int]:
    """One warp a feature, wide enough to read the segment's list once."""
    return {"BLOCK_N": 1, "BLOCK_D": max(16, min(next_power_of_2(d), 1024)), "num_warps": 1}


def sparse_decode(acts: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """acts (B, k), indices (B, k), W (n, d), b (d,) or None -> (B, d): sum_j acts_j W[indices_j] + b."""
    if _interpreted_bf16(_sparse_decode_fwd_kernel, W):
        return sparse_decode(acts.float(), indices, W.float(), None if b is None else b.float()).bfloat16()
    B, k = acts.shape
    d = W.shape[1]
    out = torch.empty((B, d), dtype=W.dtype, device=W.device)
    if out.numel() == 0:
        return out
    if interpreted(_sparse_decode_fwd_kernel):
        config = {"BLOCK_B": 16, "BLOCK_K": 8, "BLOCK_D": 64}
    else:
        config = gather_config(W)
    grid = (cdiv(B, config["BLOCK_B"]), cdiv(d, config["BLOCK_D"]))
    with on_device(W):
        _sparse_decode_fwd_kernel[grid](
            acts, indices, W, W if b is None else b, out, B, d, k, HAS_BIAS=b is not None, **config
        )
    return out


def gather_dot(rows: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """rows (B, d), indices (B, k), W (n, d) -> (B, k): the dot product of each row with its features' rows of W."""
    if _interpreted_bf16(_gather_dot_kernel, W):
        return gather_dot(rows.float(), indices, W.float()).bfloat16()
    B, d = rows.shape
    k = indices.shape[1]
    out = torch.empty((B, k), dtype=W.dtype, device=W.device)
    if out.numel() == 0:
        return out
    if interpreted(_gather_dot_kernel):
        config = {"BLOCK_B": 16, "BLOCK_K": 8, "BLOCK_D": 64}
    else:
        config = gather_config(W, dot=True)
    grid = (cdiv(B, config["BLOCK_B"]), cdiv(k, config["BLOCK_K"]))
    with on_device(W):
        _gather_dot_kernel[grid](rows, indices, W, out, B, d, k, **config)
    return out


def sparse_outer_out(
    coeff: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, dW: torch.Tensor, db: torch.Tensor
) -> None:
    """coeff (B, k), indices (B, k), rows (B, d) -> dW (n, d), db (n,): every element of both is written."""
    segment_sums(coeff.reshape(-1), indices.reshape(-1), None, rows, dW, db, coeff.shape[1])


def segment_sums(
    coeff: torch.Tensor, features: torch.Tensor, row_of: torch.Tensor | None, rows: torch.Tensor, dW: torch.Tensor,
    db: torch.Tensor, k: int = 1,
) -> None:  # fmt: skip
    """coeff, features and row_of (m,), rows (R, d) -> dW (n, d), db (n,). Pair p belongs to row p // k where row_of is
    None; feature n is nobody's."""
    if _interpreted_bf16(_sparse_outer_bwd_kernel, dW):
        dW32, db32 = dW.float(), db.float()
        segment_sums(coeff.float(), features, row_of, rows.float(), dW32, db32, k)
        dW.copy_(dW32)
        db.copy_(db32)
        return
    n, d = dW.shape
    if n == 0:
        return
    # Stable, so pairs of a feature keep ascending order; narrow keys take fewer radix passes.
    kind, low = (torch.int16, -(2**15)) if n < 2**16 else (torch.int32, 0)
    ordered, pairs = torch.sort((features + low).to(kind), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(low, n + 1 + low, dtype=kind, device=dW.device))
    if interpreted(_sparse_outer_bwd_kernel):
        config = {"BLOCK_N": 64, "BLOCK_D": 128}
    else:
        config = outer_config(d, dW.element_size())
    grid = (cdiv(n, config["BLOCK_N"]), max(1, cdiv(d, config["BLOCK_D"])))
    with on_device(dW):
        _sparse_outer_bwd_kernel[grid](
            coeff, pairs, offsets, pairs if row_of is None else row_of, rows, dW, db, n, d, k,
            RAGGED=row_of is not None, **config,
        )  # fmt: skip


def sparse_outer(
    coeff: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, n: int, across: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW (n, d), which lies as (d, n) if ``across``: dW[i] = sum of coeff_bj rows_b over the (b, j) with
    indices_bj = i; db (n,): sum of coeff_bj."""
    dW = torch.empty((n, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    db = torch.empty((n,), dtype=rows.dtype, device=rows.device)
    sparse_outer_out(coeff, indices, rows, dW, db)
    return (dW.t().contiguous().t() if across else dW), db
