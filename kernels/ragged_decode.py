"""Sums over the features that each row uses, of which every row may use another number, and the two gradients.

The features of the first prefix of the dictionary are summed before those of the second, so that one sum goes on into
the next. The gradients take pairs of a row and a feature: a product of two rows each, and segment sums by
``sparse_outer``'s kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, on_device
from .sparse_decode import _interpreted_bf16, gather_config, segment_sums


@triton.jit(do_not_specialize=["B"])
def _ragged_decode_fwd_kernel(
    values_ptr, indices_ptr, ends_ptr, w_ptr, b_ptr, out_ptr, B, d, groups,
    HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = rows < B
    inside = cols < d
    bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if HAS_BIAS:
        bias += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), dtype=tl.float32)
    for g in range(0, groups):
        # where a group ends the next one begins
        first = tl.load(ends_ptr + rows * groups + g, mask=live, other=0)
        last = tl.load(ends_ptr + rows * groups + g + 1, mask=live, other=0)
        for start in range(0, tl.max(last - first, axis=0), BLOCK_K):
            at = first[:, None] + start + tl.arange(0, BLOCK_K)[None, :]
            pair = live[:, None] & (at < last[:, None])
            index = tl.load(indices_ptr + at, mask=pair, other=0)
            value = tl.load(values_ptr + at, mask=pair, other=0.0).to(tl.float32)
            w = tl.load(
                w_ptr + index[:, :, None] * d + cols[None, None, :],
                mask=pair[:, :, None] & inside[None, None, :],
                other=0.0,
            )
            acc += value[:, :, None] * w.to(tl.float32)
        out = tl.sum(acc, axis=1) + bias[None, :]
        tl.store(
            out_ptr + (rows + g * B)[:, None] * d + cols[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["pairs"])
def _ragged_dot_kernel(
    rows_ptr, row_ptr, indices_ptr, w_ptr, out_ptr, pairs, d,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = at < pairs
    row = tl.load(row_ptr + at, mask=live, other=-1)
    index = tl.load(indices_ptr + at, mask=live, other=0)
    there = row >= 0
    acc = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (cols < d)[None, :]
        x = tl.load(rows_ptr + row[:, None] * d + cols[None, :], mask=mask, other=0.0)
        w = tl.load(w_ptr + index[:, None] * d + cols[None, :], mask=mask, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)
    tl.store(out_ptr + at, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=live)


def _grouped(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, prefixes: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of each row by the first prefix that has their feature, and where each group begins: (B G + 1,)."""
    m, groups = indices.shape[0], len(prefixes)
    offsets = offsets.clamp(max=m)
    if groups == 1:
        return values, indices, offsets
    at = torch.arange(m, device=indices.device)
    group = torch.searchsorted(offsets[1:].contiguous(), at, right=True, out_int32=True) * groups
    for prefix in prefixes[:-1]:
        group += indices >= prefix
    group, order = torch.sort(group, stable=True)
    starts = torch.arange((offsets.shape[0] - 1) * groups + 1, device=group.device, dtype=group.dtype)
    return values[order], indices[order], torch.searchsorted(group, starts)


def ragged_decode(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None,
    prefixes: list[int] | None,
) -> torch.Tensor:  # fmt: skip
    """values and indices (m,), offsets (B + 1,), W (n, d), b (d,) or None -> (G, B, d); (B, d) without prefixes."""
    if prefixes is None:
        return ragged_decode(values, indices, offsets, W, b, [W.shape[0]])[0]
    if _interpreted_bf16(_ragged_decode_fwd_kernel, W):
        bias = None if b is None else b.float()
        return ragged_decode(values.float(), indices, offsets, W.float(), bias, prefixes).bfloat16()
    B, d, groups = offsets.shape[0] - 1, W.shape[1], len(prefixes)
    out = torch.empty((groups, B, d), dtype=W.dtype, device=W.device)
    if out.numel() == 0:
        return out
    if interpreted(_ragged_decode_fwd_kernel):
        config = {"BLOCK_B": 16, "BLOCK_K": 8, "BLOCK_D": 64}
    else:
        config = gather_config(W)
    grid = (cdiv(B, config["BLOCK_B"]), cdiv(d, config["BLOCK_D"]))
    with on_device(W):
        values, indices, ends = _grouped(values, indices, offsets, prefixes)
        _ragged_decode_fwd_kernel[grid](
            values, indices, ends, W, W if b is None else b, out, B, d, groups, HAS_BIAS=b is not None, **config
        )
    return out


def ragged_dot(rows: torch.Tensor, row_of: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """rows (R, d), row_of and indices (m,), W (n, d) -> (m,): products of row and feature, 0 where there is no row."""
    if _interpreted_bf16(_ragged_dot_kernel, W):
        return ragged_dot(rows.float(), row_of, indices, W.float()).bfloat16()
    pairs, d = indices.shape[0], W.shape[1]
    out = torch.empty(pairs, dtype=W.dtype, device=W.device)
    if pairs == 0:
        return out
    if interpreted(_ragged_dot_kernel):
        config = {"BLOCK_P": 128, "BLOCK_D": 64}
    else:
        config = {"BLOCK_P": 16, "BLOCK_D": gather_config(W, dot=True)["BLOCK_D"], "num_warps": 4}
    with on_device(W):
        _ragged_dot_kernel[(cdiv(pairs, config["BLOCK_P"]),)](rows, row_of, indices, W, out, pairs, d, **config)
    return out


def ragged_outer_out(
    coeff: torch.Tensor, indices: torch.Tensor, row_of: torch.Tensor, rows: torch.Tensor, dW: torch.Tensor,
    db: torch.Tensor,
) -> None:  # fmt: skip
    """coeff, indices, row_of (m,), rows (R, d) -> dW (n, d), db (n,): every element of both is written."""
    # a pair without a row is behind the last feature
    segment_sums(coeff, torch.where(row_of < 0, dW.shape[0], indices), row_of, rows, dW, db)


def ragged_outer(
    coeff: torch.Tensor, indices: torch.Tensor, row_of: torch.Tensor, rows: torch.Tensor, n: int,
    across: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dW (n, d), which lies as (d, n) if ``across``: dW[i] = sum of coeff_p rows[row_of_p] over the pairs with
    indices_p = i; db (n,): sum of coeff_p."""
    dW = torch.empty((n, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    db = torch.empty((n,), dtype=rows.dtype, device=rows.device)
    ragged_outer_out(coeff, indices, row_of, rows, dW, db)
    return (dW.t().contiguous().t() if across else dW), db
