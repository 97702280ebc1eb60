"""The DRRho loss: a tile of similarities is computed where it is needed, for both sides at once, and never stored.

Each program of the first sweep leaves the log-sums of its tile's rows and columns, which torch merges. The second sweep
writes weights, which _weights.py multiplies. No atomics, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, chip, interpreted, on_device, operands, similarities
from ._product import parts_of, product_tile, store_weights, tile_numbers
from ._weights import masked, products_of_weights, wide_in_interpreter

SUM_ROWS = 2**14


@triton.jit
def _log_sum(S, own, scale, others, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """log of the sum of exp((S - own) scale) along an axis, of the others; an infinite maximum is not subtracted, as
    what it leaves would be no number."""
    t = (S - tl.expand_dims(own, AXIS)) * scale
    if MASKED:
        t = tl.where(others, t, float("-inf"))
    highest = tl.max(t, axis=AXIS)
    peak = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    return tl.log(tl.sum(tl.exp(t - tl.expand_dims(peak, AXIS)), axis=AXIS)) + peak


@triton.jit
def _store_log_sums(
    S, m, n, part, tile_m, scale, diag_ptr, row_lse_ptr, col_lse_ptr, M, N, offset, MASKED: tl.constexpr
):
    others = S
    if MASKED:
        others = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] + offset != n[None, :])
    own = tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)
    tl.store(row_lse_ptr + part.to(tl.int64) * M + m, _log_sum(S, own, scale, others, 1, MASKED), mask=m < M)
    own = tl.load(diag_ptr + n, mask=n < N, other=0.0)
    tl.store(col_lse_ptr + tile_m.to(tl.int64) * N + n, _log_sum(S, own, scale, others, 0, MASKED), mask=n < N)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _drrho_sums_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, row_lse_ptr, col_lse_ptr, M, N, D, offset,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_numbers(M, N, BLOCK_M, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    S = product_tile(
        rows_ptr, cols_ptr, tile_m, tile_n, M, N, D, TMA, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    parts = parts_of(S, 2)
    if masked(tile_m, tile_n, M, N, offset, BLOCK_M, BLOCK_N):
        for part in tl.static_range(2):
            _store_log_sums(
                parts[part], m, n + part * (BLOCK_N // 2), 2 * tile_n + part, tile_m, scale, diag_ptr, row_lse_ptr,
                col_lse_ptr, M, N, offset, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(2):
            _store_log_sums(
                parts[part], m, n + part * (BLOCK_N // 2), 2 * tile_n + part, tile_m, scale, diag_ptr, row_lse_ptr,
                col_lse_ptr, M, N, offset, False,
            )  # fmt: skip


@triton.jit
def _weights(
    S, row, col, scale, moment, diag_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, M, N, stride, offset,
    SPLIT: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes the weights of a part of a tile, which begins at ``row`` and ``col``; returns ``moment`` (by rows) with
    what they make of t."""
    m = row + tl.arange(0, S.shape[0])
    n = col + tl.arange(0, S.shape[1])
    t = (S - tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)[:, None]) * scale
    w = tl.exp(t - tl.load(row_u_ptr + m, mask=m < M, other=0.0)[:, None])
    product = w * t
    t = (S - tl.load(diag_ptr + n, mask=n < N, other=0.0)[None, :]) * scale
    other = tl.exp(t - tl.load(col_u_ptr + n, mask=n < N, other=0.0)[None, :])
    w += other
    product += other * t
    inside = None
    if MASKED:
        partner = m[:, None] + offset == n[None, :]
        product = tl.where((m < M)[:, None] & (n < N)[None, :] & (partner == 0), product, 0.0)
        w = tl.where(partner, tl.load(own_ptr + m, mask=m < M, other=0.0)[:, None], w)
        # what lies between N and the stride nobody reads
        inside = (m < M)[:, None] & (n < stride)[None, :]
    store_weights(w, weight_ptr, rest_ptr, row, col, stride, inside, SPLIT, TMA)
    return moment + tl.sum(product, axis=1)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _drrho_weights_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, moment_ptr,
    M, N, D, stride, offset,
    SPLIT: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_numbers(M, N, BLOCK_M, BLOCK_N)
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    S = product_tile(
        rows_ptr, cols_ptr, tile_m, tile_n, M, N, D, TMA, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    parts = parts_of(S, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    moment = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if masked(tile_m, tile_n, M, N, offset, BLOCK_M, BLOCK_N):
        for part in tl.static_range(PARTS):
            moment = _weights(
                parts[part], row, col + part * WIDTH, scale, moment, diag_ptr, row_u_ptr, col_u_ptr, own_ptr,
                weight_ptr, rest_ptr, M, N, stride, offset, SPLIT, TMA, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(PARTS):
            moment = _weights(
                parts[part], row, col + part * WIDTH, scale, moment, diag_ptr, row_u_ptr, col_u_ptr, own_ptr,
                weight_ptr, rest_ptr, M, N, stride, offset, SPLIT, TMA, False,
            )  # fmt: skip
    tl.store(moment_ptr + tl.program_id(0), tl.sum(moment, axis=0))


def _factors(rows: torch.Tensor, cols: torch.Tensor, tma: bool, config: dict) -> tuple[object, object]:
    return operands(rows, cols, tma, config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"])


def drrho_sums(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, offset: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows (M, D), cols (N, D), diag (N,) and scale () in float32 -> row_lse (M,), col_lse (N,), nothing kept."""
    rows, cols = wide_in_interpreter(_drrho_sums_kernel, rows, cols)
    (M, D), N = rows.shape, cols.shape[0]
    options, config = similarities(rows, cols, interpreted(_drrho_sums_kernel))
    row_lse, col_lse = diag.new_empty(M), diag.new_full((N,), -torch.inf)
    with on_device(rows):
        for start in range(0, M, SUM_ROWS):
            some = rows[start : start + SUM_ROWS]
            m = some.shape[0]
            down, along = cdiv(m, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
            by_row, by_col = diag.new_empty(2 * along, m), diag.new_empty(down, N)
            _drrho_sums_kernel[(down * along,)](
                *_factors(some, cols, options["TMA"], config), diag, scale, by_row, by_col, m, N, D, offset + start,
                **options, **config,
            )  # fmt: skip
            torch.logsumexp(by_row, 0, out=row_lse[start : start + m])
            col_lse = torch.logaddexp(col_lse, by_col.logsumexp(0))
    # nothing is kept, in the shape that says so
    return row_lse, col_lse, diag.new_empty(0, (N + 63) // 64 * 64 + 16)


def drrho_grad(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, offset: int,
    row_u: torch.Tensor, col_u: torch.Tensor, own: torch.Tensor, kept: torch.Tensor, width: int,
    need_rows: bool, need_cols: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> weights times cols (M, width), their transpose times rows (N, width), the sum of weights times t ()."""
    rows, cols = wide_in_interpreter(_drrho_sums_kernel, rows, cols)
    D, N = rows.shape[1], cols.shape[0]
    moments = [diag.new_zeros(1, dtype=torch.float64)]
    options, config = similarities(rows, cols, interpreted(_drrho_sums_kernel))
    # less fits into half of the registers if it is four bytes wide, and into all of them beside sums that come at once
    few = rows.dtype == torch.float32 if "maxnreg" in config else chip(rows.device).sums_apart
    config["PARTS"] = 8 if few else 4

    def launch(at: slice, m: int, stride: int, places: tuple) -> None:
        grid = (cdiv(m, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),)
        moment = diag.new_empty(grid)
        _drrho_weights_kernel[grid](
            *_factors(rows[at], cols, options["TMA"], config), diag, scale, row_u[at], col_u, own[at], *places,
            moment, m, N, D, stride, offset + at.start, SPLIT=rows.dtype != torch.float32, **options, **config,
        )  # fmt: skip
        moments.append(moment.double().sum().reshape(1))

    d_rows, d_cols = products_of_weights(rows, cols, width, need_rows, need_cols, options["TMA"], config, launch)
    return d_rows, d_cols, torch.cat(moments).sum().float()
