"""Gaussian sums over rows for every prototype: two products a chunk of rows, with its log-weights between them.

A sum of d numbers for each of many prototypes does not fit on chip, so a chunk's log-weights (BUFFER_BYTES of them)
pass through a buffer that the second-level cache holds, and are never more. The second product is split over rows when
there are few prototypes; its parts are added in a fixed order, so that results repeat bit for bit. Halves take the
tensor cores with weights and movements as sums of two bfloat16 each, which loses 2^-16 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, copied_by_tma, interpreted, on_device, tiles
from ._precision import tf32_allowed

BUFFER_BYTES = 32 << 20
MAX_PARTS = 16


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
def _drift_log_weights_kernel(
    old_ptr, means_ptr, old_square_ptr, mean_square_ptr, scale_ptr, log_w_ptr, highest_ptr, N, C, d,
    SCALED: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log-weights of a tile, and the highest of each of its columns."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = rows < N
    dot = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    if TMA:  # old and means are descriptors
        for start in range(0, d, BLOCK_D):
            x = old_ptr.load([tl.program_id(0) * BLOCK_N, start])
            mean = means_ptr.load([tl.program_id(1) * BLOCK_C, start])
            dot = tl.dot(x, tl.trans(mean), dot, input_precision=PRECISION)
    else:
        old_ptrs = old_ptr + rows.to(tl.int64)[:, None] * d
        mean_ptrs = means_ptr + cols.to(tl.int64)[None, :] * d
        for start in range(0, d, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            inside = j < d
            x = tl.load(old_ptrs + j[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            mean = tl.load(mean_ptrs + j[:, None], mask=inside[:, None] & (cols < C)[None, :], other=0.0)
            dot = tl.dot(x, mean, dot, input_precision=PRECISION)
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
    at = log_w_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(at, log_w, mask=live[:, None] & (cols < C)[None, :])
    highest = tl.max(tl.where(live[:, None], log_w, float("-inf")), axis=0)
    tl.store(highest_ptr + tl.program_id(0).to(tl.int64) * C + cols, highest, mask=cols < C)


@triton.jit
def _halved(x):
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    # an infinity is all in its first half
    return high, tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.bfloat16)


@triton.jit(do_not_specialize=["N", "rows_of_part"])
def _drift_moved_kernel(
    old_ptr, new_ptr, log_w_ptr, peak_ptr, scale_ptr, total_ptr, moved_ptr, N, C, d, rows_of_part,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(2)
    inside = (cols < C)[:, None] & (j < d)[None, :]
    peak = tl.load(peak_ptr + cols, mask=cols < C, other=0.0)
    floor = tl.exp(tl.load(scale_ptr + 2).to(tl.float32) - peak)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    moved = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    first = part * rows_of_part
    last = tl.minimum(first + rows_of_part, N)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        live = rows < last
        at = log_w_ptr + rows.to(tl.int64)[None, :] * C + cols[:, None]
        log_w = tl.load(at, mask=live[None, :] & (cols < C)[:, None], other=float("-inf"))
        w = tl.where(live[None, :], tl.exp(log_w - peak[:, None]) + floor[:, None], 0.0)  # (BLOCK_C, BLOCK_N)
        total += tl.sum(w, axis=1)
        place = rows.to(tl.int64)[:, None] * d + j[None, :]
        mask = live[:, None] & (j < d)[None, :]
        change = tl.load(new_ptr + place, mask=mask, other=0.0).to(tl.float32)
        change -= tl.load(old_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if SPLIT:
            w_high, w_low = _halved(w)
            high, low = _halved(change)
            moved = tl.dot(w_high, high, tl.dot(w_low, high, tl.dot(w_high, low, moved)))
        else:
            moved = tl.dot(w, change, moved, input_precision=PRECISION)
    tl.store(moved_ptr + part.to(tl.int64) * C * d + cols.to(tl.int64)[:, None] * d + j[None, :], moved, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(total_ptr + part * C + cols, total, mask=cols < C)


@triton.jit(do_not_specialize=["parts"])
def _drift_merge_kernel(
    before_ptr, peak_ptr, part_total_ptr, part_moved_ptr, total_ptr, moved_ptr, C, d, parts,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total, moved = shrunk to the new peak, and a chunk's parts added in order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (cols < C)[:, None] & (j < d)[None, :]
    before = tl.load(before_ptr + cols, mask=cols < C, other=0.0)
    shrink = tl.exp(before - tl.load(peak_ptr + cols, mask=cols < C, other=0.0))
    at = cols.to(tl.int64)[:, None] * d + j[None, :]
    total = tl.load(part_total_ptr + cols, mask=cols < C, other=0.0)
    moved = tl.load(part_moved_ptr + at, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(part_total_ptr + part * C + cols, mask=cols < C, other=0.0)
        moved += tl.load(part_moved_ptr + tl.cast(part, tl.int64) * C * d + at, mask=inside, other=0.0)
    moved += tl.load(moved_ptr + at, mask=inside, other=0.0) * shrink[:, None]
    tl.store(moved_ptr + at, moved, mask=inside)
    if tl.program_id(1) == 0:
        total += tl.load(total_ptr + cols, mask=cols < C, other=0.0) * shrink
        tl.store(total_ptr + cols, total, mask=cols < C)


def log_weights_config(dtype: torch.dtype) -> dict[str, int]:
    if interpreted(_drift_log_weights_kernel):
        return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_D": 128}
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    hip = torch.version.hip is not None
    return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_D": 32 if hip else 64, "num_warps": 8, "num_stages": 2 if hip else 3}


def moved_config(dtype: torch.dtype) -> dict[str, int]:
    """Tiles are halved in registers, which bounds them; fp32 runs on plain FMAs, in smaller steps."""
    if interpreted(_drift_moved_kernel):
        return {"BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_D": 256}
    if dtype == torch.float32:
        return {"BLOCK_N": 16, "BLOCK_C": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


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
    if old.dtype != torch.float32 and interpreted(_drift_moved_kernel):
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
    first, second = log_weights_config(old.dtype), moved_config(old.dtype)
    grid = (cdiv(C, second["BLOCK_C"]), cdiv(d, second["BLOCK_D"]))
    chunk = min(N, max(512, BUFFER_BYTES // (4 * C) // 128 * 128))
    log_w = torch.empty(chunk, C, **options)
    highest = torch.empty(cdiv(chunk, first["BLOCK_N"]), C, **options)
    tma = copied_by_tma(old, means)
    with on_device(old):
        own, squares = _squares(prototypes, scale, far), _squares(old, scale, far)
        for start in range(0, N, chunk):
            some = slice(start, min(start + chunk, N))
            a, n = old[some], some.stop - start
            blocks = cdiv(n, first["BLOCK_N"])
            _drift_log_weights_kernel[(blocks, cdiv(C, first["BLOCK_C"]))](
                tiles(a, first["BLOCK_N"], first["BLOCK_D"]) if tma else a,
                tiles(means, first["BLOCK_C"], first["BLOCK_D"]) if tma else means,
                squares[some], own, scale, log_w, highest, n, C, d,
                SCALED=scaled, FAR=far, TMA=tma, PRECISION=precision, **first,
            )  # fmt: skip
            before, peak = peak, torch.maximum(peak, highest[:blocks].amax(0))
            # enough parts to fill a chip of some 128 processors, each of whole blocks
            steps = cdiv(n, second["BLOCK_N"])
            each = cdiv(steps, min(MAX_PARTS, max(1, 128 // (grid[0] * grid[1])), steps)) * second["BLOCK_N"]
            parts = cdiv(n, each)
            part_total, part_moved = torch.empty(parts, C, **options), torch.empty(parts, C, d, **options)
            _drift_moved_kernel[(*grid, parts)](
                a, new[some], log_w, peak, scale, part_total, part_moved, n, C, d, each,
                SPLIT=old.dtype != torch.float32, PRECISION=precision, **second,
            )  # fmt: skip
            _drift_merge_kernel[(cdiv(C, 16), cdiv(d, 128))](
                before, peak, part_total, part_moved, total, moved, C, d, parts,
                BLOCK_C=16, BLOCK_D=128,
            )  # fmt: skip
    return peak, total, moved
