"""Gaussian sums over rows for every prototype: tiles of log-weights twice, for their peaks and for the weights.

A sum of d numbers for each of many prototypes does not fit on chip, so a chunk's weights and its movements pass through
buffers (of BUFFER_BYTES each, or SUM_ROWS rows), which torch multiplies. Halves take the tensor cores with weights and
movements as sums of two bfloat16 each, which loses 2^-16 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, copied_by_tma, interpreted, on_device, operands
from ._precision import tf32_allowed
from ._product import add_product, halved, product_tile

BUFFER_BYTES = 64 << 20
SUM_ROWS = 512  # no sum adds more numbers one after the other


@triton.jit(do_not_specialize=["N"])
def _drift_square_kernel(
    x_ptr, scale_ptr, out_ptr, N, d, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """|row|^2 in units, where FAR stands for anything beyond it."""
    unit = tl.load(scale_ptr).to(tl.float32)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        j = start + tl.arange(0, BLOCK_D)
        mask = (rows < N)[:, None] & (j < d)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * d + j[None, :], mask=mask, other=0.0).to(tl.float32) * unit
        total += tl.sum(x * x, axis=1)
    tl.store(out_ptr + rows, tl.where(total > FAR, FAR, total), mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def _drift_tile_kernel(
    old_ptr, means_ptr, old_square_ptr, mean_square_ptr, scale_ptr, peak_ptr, column_ptr, w_ptr, rest_ptr,
    N, C, d, stride,
    WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log-weights of a tile: the highest of each column or, with the peaks known, its weights and their sums."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < N
    dot = product_tile(old_ptr, means_ptr, rows, cols, N, C, d, TMA, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D)
    unit = tl.load(scale_ptr).to(tl.float32)
    dot *= unit
    if not SCALED:
        dot *= unit
    own = tl.load(mean_square_ptr + cols, mask=cols < C, other=0.0)[None, :]
    square = tl.load(old_square_ptr + rows, mask=live, other=0.0)[:, None]
    # a row at FAR may have products of any kind
    distance = tl.where((own == FAR) | (square == FAR), 0.0 * (own + square) + FAR, (square + own) - 2.0 * dot)
    distance = tl.where(distance < 0.0, 0.0, tl.where(distance > FAR, FAR, distance))
    log_w = -tl.load(scale_ptr + 1).to(tl.float32) * distance
    if WEIGHTS:
        peak = tl.load(peak_ptr + cols, mask=cols < C, other=0.0)
        floor = tl.exp(tl.load(scale_ptr + 2).to(tl.float32) - peak)
        w = tl.where(live[:, None], tl.exp(log_w - peak[None, :]) + floor[None, :], 0.0)
        at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        inside = live[:, None] & (cols < C)[None, :]
        column = tl.sum(w, axis=0)
        if SPLIT:
            w, rest = halved(w)
            tl.store(rest_ptr + at, rest, mask=inside)
        tl.store(w_ptr + at, w, mask=inside)
    else:
        column = tl.max(tl.where(live[:, None], log_w, float("-inf")), axis=0)
    tl.store(column_ptr + tl.program_id(0).to(tl.int64) * C + cols, column, mask=cols < C)


@triton.jit
def _drift_change_kernel(old_ptr, new_ptr, change_ptr, rest_ptr, total, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    change = tl.load(new_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    change -= tl.load(old_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    if SPLIT:
        change, rest = halved(change)
        # an infinity is all in the half that meets weights alone: what a weight's first half left is 0 or of any sign
        infinite = tl.abs(change.to(tl.float32)) == float("inf")
        rest = tl.where(infinite, change, rest)
        change = tl.where(infinite, tl.zeros_like(change), change)
        tl.store(rest_ptr + at, rest, mask=at < total)
    tl.store(change_ptr + at, change, mask=at < total)


def tile_config(dtype: torch.dtype) -> dict[str, int]:
    if interpreted(_drift_tile_kernel):
        return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_D": 128}
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    hip = torch.version.hip is not None
    return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_D": 32 if hip else 64, "num_warps": 8, "num_stages": 2 if hip else 3}


def chunk_rows(C: int, d: int) -> int:
    """Rows whose weights and whose movements, four bytes a number, fill no buffer."""
    return max(SUM_ROWS, BUFFER_BYTES // (4 * max(C, d)) // SUM_ROWS * SUM_ROWS)


def _squares(x: torch.Tensor, scale: torch.Tensor, far: float) -> torch.Tensor:
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = 128 if interpreted(_drift_square_kernel) else 16
    _drift_square_kernel[(cdiv(x.shape[0], block),)](
        x, scale, out, *x.shape, FAR=far, BLOCK_N=block, BLOCK_D=128, **({} if block == 128 else {"num_warps": 4})
    )
    return out


def drift_sums(
    old: torch.Tensor, new: torch.Tensor, prototypes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """old, new (N, d), prototypes (C, d), scale (3,) float64 -> peak (C,), total (C,), moved (C, d), float32."""
    if old.dtype != torch.float32 and interpreted(_drift_tile_kernel):
        # the interpreter multiplies bf16, which every half's sums take, as raw bits
        return drift_sums(old.float(), new.float(), prototypes.float(), scale)
    (N, d), C = old.shape, prototypes.shape[0]
    options = {"dtype": torch.float32, "device": old.device}
    peak = scale[2].float().expand(C).contiguous()
    total, moved = torch.zeros(C, **options), torch.zeros(C, d, **options)
    if 0 in (N, C, d):
        return peak, total, moved
    far = torch.finfo(torch.float32).max / 16
    precision = "tf32" if tf32_allowed() else "ieee"
    # float16 has no room to scale, and needs none: its products do not overflow
    scaled = old.dtype != torch.float16
    means = (prototypes.float() * scale[0].float()).to(old.dtype) if scaled else prototypes
    split, tma, config = old.dtype != torch.float32, copied_by_tma(old, means), tile_config(old.dtype)
    chunk = min(N, chunk_rows(C, d))
    kind = torch.bfloat16 if split else torch.float32
    step = SUM_ROWS * (16 if split else 1)  # tensor cores add 16 products at a time
    stride = cdiv(C, 16) * 16  # whole lines
    w, rest = (torch.empty(chunk if used else 0, stride, dtype=kind, device=old.device) for used in (True, split))
    change, change_rest = (torch.empty(len(b), d, dtype=kind, device=old.device) for b in (w, rest))

    def by_tile(rows: torch.Tensor, squares: torch.Tensor, weights: bool) -> torch.Tensor:
        """What the tiles of these rows say of each column: (tiles, C)."""
        grid = (cdiv(len(rows), config["BLOCK_N"]), cdiv(C, config["BLOCK_C"]))
        found = torch.empty(grid[0], C, **options)
        _drift_tile_kernel[grid](
            *operands(rows, means, config["BLOCK_N"], config["BLOCK_C"], config["BLOCK_D"], tma),
            squares, own, scale, peak, found, w, rest, len(rows), C, d, stride,
            WEIGHTS=weights, SPLIT=split, SCALED=scaled, FAR=far, TMA=tma, PRECISION=precision, **config,
        )  # fmt: skip
        return found

    with on_device(old):
        own, squares = _squares(prototypes, scale, far), _squares(old, scale, far)
        peak = torch.maximum(peak, by_tile(old, squares, False).amax(0))
        for start in range(0, N, chunk):
            some = slice(start, min(start + chunk, N))
            n = some.stop - start
            total += by_tile(old[some], squares[some], True).sum(0)
            _drift_change_kernel[(cdiv(n * d, 4096),)](
                old[some], new[some], change, change_rest, n * d, SPLIT=split, BLOCK=4096
            )
            for at in range(0, n, step):
                part = slice(at, min(at + step, n))
                for a, b in ((w, change_rest), (rest, change), (w, change)) if split else ((w, change),):
                    moved = add_product(moved, a[part, :C].T, b[part])
    return peak, total, moved
