"""Distillation: a student's tile of similarities where it is computed, beside its teacher's, multiplied by torch.

The teacher's similarities are there a chunk of rows at a time, as two tiles of products do not fit the registers. Each
program of the first sweep leaves what it knows of its tile's rows and columns: log-sums of both, and means of the
student's logits under either, which torch merges. The second sweep writes weights, which _weights.py multiplies. No
atomics, so that results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._launch import cdiv, chip, interpreted, on_device, operands, similarities
from ._product import multiply, parts_of, product_tile, store_weights, tile_numbers
from ._weights import chunk_rows, line, masked, products_of_weights, wide_in_interpreter


@triton.jit
def _store_mean(x, t, out_ptr, place, step, k, inside, AXIS: tl.constexpr):
    """log of the sum of exp x along an axis, and the mean of t under these weights, which is 0 where there are none; an
    infinite maximum is not subtracted, as what it leaves would be no number."""
    highest = tl.max(x, axis=AXIS)
    peak = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    e = tl.exp(x - tl.expand_dims(peak, AXIS))
    total = tl.sum(e, axis=AXIS)
    mean = tl.sum(tl.where(e == 0, 0.0, e * t), axis=AXIS) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + k * step + place, tl.log(total) + peak, mask=inside)
    tl.store(out_ptr + (k + 2) * step + place, mean, mask=inside)


@triton.jit
def _store_sums(
    S, row, col, part, parts, tile_m, tiles_m, scale, teacher_scale, diag_ptr, teacher_diag_ptr, teacher_ptr,
    by_row_ptr, by_col_ptr, M, N, stride, offset, MASKED: tl.constexpr,
):  # fmt: skip
    m = row + tl.arange(0, S.shape[0])
    n = col + tl.arange(0, S.shape[1])
    place = m.to(tl.int64)[:, None] * stride + n[None, :]
    others = None
    if MASKED:
        others = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] + offset != n[None, :])
        R = tl.load(teacher_ptr + place, mask=(m < M)[:, None] & (n < stride)[None, :], other=0.0)
    else:
        R = tl.load(teacher_ptr + place)
    for axis in tl.static_range(2):
        if axis == 0:
            at = n
            inside = n < N
        else:
            at = offset + m
            inside = m < M
        own = tl.expand_dims(tl.load(diag_ptr + at, mask=inside, other=0.0), axis)
        theirs = tl.expand_dims(tl.load(teacher_diag_ptr + at, mask=inside, other=0.0), axis)
        t = (S - own) * scale
        r = (R - theirs) * teacher_scale
        x = t
        if MASKED:
            x = tl.where(others, t, float("-inf"))
            r = tl.where(others, r, float("-inf"))
        if axis == 0:
            step = tiles_m.to(tl.int64) * N
            target = tile_m.to(tl.int64) * N + n
            _store_mean(x, t, by_col_ptr, target, step, 0, inside, 0)
            _store_mean(r, t, by_col_ptr, target, step, 1, inside, 0)
        else:
            step = parts.to(tl.int64) * M
            target = part.to(tl.int64) * M + m
            _store_mean(x, t, by_row_ptr, target, step, 0, inside, 1)
            _store_mean(r, t, by_row_ptr, target, step, 1, inside, 1)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _distill_sums_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, teacher_ptr, teacher_diag_ptr, teacher_scale_ptr, by_row_ptr, by_col_ptr,
    M, N, D, stride, offset,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_numbers(M, N, BLOCK_M, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    S = product_tile(
        rows_ptr, cols_ptr, tile_m, tile_n, M, N, D, TMA, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    teacher_scale = tl.load(teacher_scale_ptr)
    parts = parts_of(S, 4)
    by_cols = tl.cdiv(N, BLOCK_N) * 4
    # columns come a part at a time, so that each one's sums of a tile are whole
    if masked(tile_m, tile_n, M, N, offset, BLOCK_M, BLOCK_N):
        for part in tl.static_range(4):
            _store_sums(
                parts[part], row, col + part * (BLOCK_N // 4), 4 * tile_n + part, by_cols, tile_m, tiles_m, scale,
                teacher_scale, diag_ptr, teacher_diag_ptr, teacher_ptr, by_row_ptr, by_col_ptr, M, N, stride, offset,
                True,
            )  # fmt: skip
    else:
        for part in tl.static_range(4):
            _store_sums(
                parts[part], row, col + part * (BLOCK_N // 4), 4 * tile_n + part, by_cols, tile_m, tiles_m, scale,
                teacher_scale, diag_ptr, teacher_diag_ptr, teacher_ptr, by_row_ptr, by_col_ptr, M, N, stride, offset,
                False,
            )  # fmt: skip


@triton.jit
def _softmaxes(S, m, n, scale, diag_ptr, row_u_ptr, col_u_ptr, M, N, offset):
    """exp(t - u) of both sides."""
    t = (S - tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)[:, None]) * scale
    w = tl.exp(t - tl.load(row_u_ptr + m, mask=m < M, other=0.0)[:, None])
    t = (S - tl.load(diag_ptr + n, mask=n < N, other=0.0)[None, :]) * scale
    return w + tl.exp(t - tl.load(col_u_ptr + n, mask=n < N, other=0.0)[None, :])


@triton.jit
def _weights(
    S, row, col, scale, teacher_scale, f, g, diag_ptr, teacher_diag_ptr, teacher_ptr, row_u_ptr, col_u_ptr,
    teacher_row_u_ptr, teacher_col_u_ptr, own_ptr, weight_ptr, rest_ptr, M, N, stride, offset,
    SPLIT: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    m = row + tl.arange(0, S.shape[0])
    n = col + tl.arange(0, S.shape[1])
    place = m.to(tl.int64)[:, None] * stride + n[None, :]
    inside = None
    if MASKED:
        # what lies between N and the stride nobody reads
        inside = (m < M)[:, None] & (n < stride)[None, :]
        R = tl.load(teacher_ptr + place, mask=inside, other=0.0)
    else:
        R = tl.load(teacher_ptr + place)
    w = f * _softmaxes(S, m, n, scale, diag_ptr, row_u_ptr, col_u_ptr, M, N, offset)
    w -= g * _softmaxes(
        R, m, n, teacher_scale, teacher_diag_ptr, teacher_row_u_ptr, teacher_col_u_ptr, M, N, offset
    )  # fmt: skip
    if MASKED:
        partner = m[:, None] + offset == n[None, :]
        w = tl.where(partner, tl.load(own_ptr + m, mask=m < M, other=0.0)[:, None], w)
    store_weights(w, weight_ptr, rest_ptr, row, col, stride, inside, SPLIT, TMA)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _distill_weights_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, teacher_ptr, teacher_diag_ptr, teacher_scale_ptr, row_u_ptr, col_u_ptr,
    teacher_row_u_ptr, teacher_col_u_ptr, own_ptr, factors_ptr, weight_ptr, rest_ptr, M, N, D, stride, offset,
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
    teacher_scale = tl.load(teacher_scale_ptr)
    f = tl.load(factors_ptr)
    g = tl.load(factors_ptr + 1)
    parts = parts_of(S, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if masked(tile_m, tile_n, M, N, offset, BLOCK_M, BLOCK_N):
        for part in tl.static_range(PARTS):
            _weights(
                parts[part], row, col + part * WIDTH, scale, teacher_scale, f, g, diag_ptr, teacher_diag_ptr,
                teacher_ptr, row_u_ptr, col_u_ptr, teacher_row_u_ptr, teacher_col_u_ptr, own_ptr, weight_ptr, rest_ptr,
                M, N, stride, offset, SPLIT, TMA, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(PARTS):
            _weights(
                parts[part], row, col + part * WIDTH, scale, teacher_scale, f, g, diag_ptr, teacher_diag_ptr,
                teacher_ptr, row_u_ptr, col_u_ptr, teacher_row_u_ptr, teacher_col_u_ptr, own_ptr, weight_ptr, rest_ptr,
                M, N, stride, offset, SPLIT, TMA, False,
            )  # fmt: skip


def _teacher(rows: torch.Tensor, cols: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    """What gives the similarities (m, stride) of some rows, in float32."""
    N = cols.shape[0]
    padded = torch.nn.functional.pad(cols, (0, 0, 0, line(N) - N))
    return lambda at: multiply(rows[at], padded.T)


def _merged(parts: torch.Tensor) -> torch.Tensor:
    """(4, tiles, n): two log-sums, and the means under their weights -> (4, n)."""
    lse = parts[:2].logsumexp(1)
    shares = (parts[:2] - lse.unsqueeze(1)).exp().nan_to_num(0.0)  # a NaN where there is nothing
    return torch.cat([lse, torch.where(shares == 0, 0.0, shares * parts[2:]).sum(1)])


def distill_sums(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, teacher_rows: torch.Tensor,
    teacher_cols: torch.Tensor, teacher_diag: torch.Tensor, teacher_scale: torch.Tensor, offset: int, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """rows (M, D), cols (N, D), the teacher's (M, E), (N, E); diag (N,) and scale () of both in float32 -> of rows
    (4, M) and of columns (4, N) log-sums of both, means of the student's t under both; nothing kept, twice."""
    kernel = _distill_sums_kernel
    rows, cols, teacher_rows, teacher_cols = wide_in_interpreter(kernel, rows, cols, teacher_rows, teacher_cols)
    (M, D), N = rows.shape, cols.shape[0]
    options, config = similarities(rows, cols, interpreted(kernel))
    config.pop("maxnreg", None)  # half of the registers do not hold the sums of both models
    if chip(rows.device).sums_apart:
        config["BLOCK_N"] = 64
    similar, chunk, stride = _teacher(teacher_rows, teacher_cols), chunk_rows(N), line(N)
    row_sums, columns = diag.new_empty(4, M), []
    with on_device(rows):
        for start in range(0, M, chunk):
            at = slice(start, min(start + chunk, M))
            m = at.stop - start
            down, along = cdiv(m, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
            by_row, by_col = diag.new_empty(4, 4 * along, m), diag.new_empty(4, down, N)
            factors = operands(rows[at], cols, options["TMA"], *(config[f"BLOCK_{x}"] for x in "MND"))
            kernel[(down * along,)](
                *factors, diag, scale, similar(at), teacher_diag, teacher_scale, by_row, by_col, m, N, D, stride,
                offset + start, **options, **config,
            )  # fmt: skip
            row_sums[:, at] = _merged(by_row)
            columns.append(_merged(by_col))
    none = diag.new_empty(0, (N + 63) // 64 * 64 + 16)  # nothing is kept, in the shape that says so
    nowhere = diag.new_zeros(4, N)
    nowhere[:2] = -torch.inf
    return row_sums, _merged(torch.stack(columns or [nowhere], 1)), none, none.clone()


def distill_grad(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, teacher_rows: torch.Tensor,
    teacher_cols: torch.Tensor, teacher_diag: torch.Tensor, teacher_scale: torch.Tensor, offset: int,
    row_u: torch.Tensor, col_u: torch.Tensor, own: torch.Tensor, factors: torch.Tensor, kept: torch.Tensor,
    teacher_kept: torch.Tensor, need_rows: bool, need_cols: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> weights times cols (M, D), their transpose times rows (N, D)."""
    kernel = _distill_weights_kernel
    rows, cols, teacher_rows, teacher_cols = wide_in_interpreter(kernel, rows, cols, teacher_rows, teacher_cols)
    D, N = rows.shape[1], cols.shape[0]
    options, config = similarities(rows, cols, interpreted(kernel))
    config["PARTS"] = 8 if "maxnreg" in config else 4  # half of the registers hold less beside the teacher's
    similar = _teacher(teacher_rows, teacher_cols)

    def launch(at: slice, m: int, stride: int, places: tuple) -> None:
        both = operands(rows[at], cols, options["TMA"], *(config[f"BLOCK_{x}"] for x in "MND"))
        kernel[(cdiv(m, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),)](
            *both, diag, scale, similar(at), teacher_diag, teacher_scale, row_u[0, at], col_u[0], row_u[1, at],
            col_u[1], own[at], factors, *places, m, N, D, stride, offset + at.start,
            SPLIT=rows.dtype != torch.float32, **options, **config,
        )  # fmt: skip

    return products_of_weights(rows, cols, D, need_rows, need_cols, options["TMA"], config, launch)
