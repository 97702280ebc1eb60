"""Gaussian sums over rows for every prototype: tiles of log-weights twice, for their peaks and for the weights.

A sum of d numbers for each of many prototypes does not fit on chip, so a chunk's weights and its movements pass through
buffers (of BUFFER_BYTES each, or SUM_ROWS rows), which torch multiplies. Halves take the tensor cores with weights and
movements as sums of two bfloat16 each, which loses 2^-16 of them: the two movements of a row are side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, on_device, operands, similarities, tiles
from ._product import halved, multiply, parts_of, product_tile, store_weights, tile_numbers

BUFFER_BYTES = 128 << 20
SUM_ROWS = 512  # no sum adds more numbers one after the other
SUMS = 8  # at a time, as far as they fit a buffer


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


@triton.jit
def _log_weights_of_part(
    dot, tile, col, old_square_ptr, mean_square_ptr, scale_ptr, peak_ptr, column_ptr, w_ptr, rest_ptr, N, C, stride,
    WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    row = tile * dot.shape[0]
    rows = row + tl.arange(0, dot.shape[0])
    cols = col + tl.arange(0, dot.shape[1])
    live = rows < N
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
        column = tl.sum(w, axis=0)
        # rows are there for whole tiles, and what lies between C and the stride nobody reads
        store_weights(w, w_ptr, rest_ptr, row, col, stride, (cols < stride)[None, :], SPLIT, TMA)
    else:
        column = tl.max(tl.where(live[:, None], log_w, float("-inf")), axis=0)
    tl.store(column_ptr + tile.to(tl.int64) * C + cols, column, mask=cols < C)


@triton.jit(do_not_specialize=["N", "room"])
def _drift_tile_kernel(
    old_ptr, means_ptr, old_square_ptr, mean_square_ptr, scale_ptr, peak_ptr, column_ptr, w_ptr, rest_ptr,
    N, room, C, d, stride,
    WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log-weights of a tile: the highest of each column or, with the peaks known, its weights (0 for the ``room``
    behind N) and their sums."""
    tile, tile_c = tile_numbers(room, C, BLOCK_M, BLOCK_N)
    dot = product_tile(
        old_ptr, means_ptr, tile, tile_c, N, C, d, TMA, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )  # fmt: skip
    parts = parts_of(dot, 2)
    for part in tl.static_range(2):
        _log_weights_of_part(
            parts[part], tile, tile_c * BLOCK_N + part * (BLOCK_N // 2), old_square_ptr, mean_square_ptr, scale_ptr,
            peak_ptr, column_ptr, w_ptr, rest_ptr, N, C, stride, WEIGHTS, SPLIT, SCALED, FAR, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _drift_change_kernel(
    old_ptr, new_ptr, change_ptr, N, room, d, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """new - old, and behind it what its first half leaves; 0 in the ``room`` behind N."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * d + j[None, :]
    live = (rows < N)[:, None] & (j < d)[None, :]
    change = tl.load(new_ptr + at, mask=live, other=0.0).to(tl.float32)
    change -= tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
    at += rows.to(tl.int64)[:, None] * (d if SPLIT else 0)
    inside = (rows < room)[:, None] & (j < d)[None, :]
    if SPLIT:
        change, rest = halved(change)
        # an infinity is all in the half that meets weights alone: what a weight's first half left is 0 or of any sign
        infinite = tl.abs(change.to(tl.float32)) == float("inf")
        rest = tl.where(infinite, change, rest)
        change = tl.where(infinite, tl.zeros_like(change), change)
        tl.store(change_ptr + at + d, rest, mask=inside)
    tl.store(change_ptr + at, change, mask=inside)


def chunks(N: int, C: int, d: int, step: int) -> tuple[int, int, int]:
    """How the rows are cut: of so many at a time, whose weights and whose movements, four bytes a number, fill no
    buffer, into so many sums of at most ``step`` each."""
    most = max(SUM_ROWS, BUFFER_BYTES // (4 * max(C, d)) // SUM_ROWS * SUM_ROWS)
    rows = cdiv(N, cdiv(N, most))
    sums = cdiv(rows, step)
    return rows, sums, cdiv(cdiv(rows, sums), 128) * 128


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
    wide = {"dtype": torch.float32, "device": old.device}
    peak = scale[2].float().expand(C).contiguous()
    total, moved = torch.zeros(C, **wide), torch.zeros(C, d, **wide)
    if 0 in (N, C, d):
        return peak, total, moved
    far = torch.finfo(torch.float32).max / 16
    # float16 has no room to scale, and needs none: its products do not overflow
    scaled = old.dtype != torch.float16
    means = (prototypes.float() * scale[0].float()).to(old.dtype) if scaled else prototypes
    split = old.dtype != torch.float32
    options, config = similarities(old, means, interpreted(_drift_tile_kernel))
    chunk, sums, step = chunks(N, C, d, SUM_ROWS * (16 if split else 1))  # tensor cores add 16 products at a time
    kind, parts, stride = torch.bfloat16 if split else torch.float32, 1 + split, cdiv(C, 16) * 16  # whole lines
    w = torch.empty(parts, sums * step, stride, dtype=kind, device=old.device)
    change = torch.empty(sums * step, parts * d, dtype=kind, device=old.device)
    together = max(1, min(SUMS, BUFFER_BYTES // (4 * C * parts * d)))

    part = config["BLOCK_M"], config["BLOCK_N"] // 2
    places = (tiles(w[0], *part), tiles(w[-1], *part)) if options["TMA"] else (w[0], w[-1])

    def by_tile(rows: torch.Tensor, squares: torch.Tensor, room: int, weights: bool) -> torch.Tensor:
        """What the tiles of these rows say of each column: (tiles, C)."""
        down = cdiv(room, config["BLOCK_M"])
        found = torch.empty(down, C, **wide)
        _drift_tile_kernel[(down * cdiv(C, config["BLOCK_N"]),)](
            *operands(rows, means, options["TMA"], config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"]),
            squares, own, scale, peak, found, *places, len(rows), room, C, d, stride,
            WEIGHTS=weights, SPLIT=split, SCALED=scaled, FAR=far, **options, **config,
        )  # fmt: skip
        return found

    with on_device(old):
        own, squares = _squares(prototypes, scale, far), _squares(old, scale, far)
        peak = torch.maximum(peak, by_tile(old, squares, N, False).amax(0))
        for start in range(0, N, chunk):
            some = slice(start, min(start + chunk, N))
            room = sums * step
            total += by_tile(old[some], squares[some], room, True).sum(0)
            block = {"BLOCK_N": 16, "BLOCK_D": 256}
            _drift_change_kernel[(cdiv(room, 16), cdiv(d, 256))](
                old[some], new[some], change, some.stop - start, room, d, SPLIT=split, **block
            )
            for at in range(0, sums, together):
                a = w.view(parts, sums, step, stride)[:, at : at + together, :, :C].transpose(2, 3)
                b = change.view(sums, step, parts * d)[at : at + together]
                found = multiply(a[0], b).sum(0)
                if split:
                    found = found[:, d:] + multiply(a[1], b[..., :d]).sum(0) + found[:, :d]
                moved += found
    return peak, total, moved
