"""The DRRho loss: a tile of similarities is computed where it is needed, for both sides at once, and never stored.

Each program of the first sweep leaves the log-sums of its tile's rows and columns, which torch merges. The second sweep
writes the weights of a chunk of rows (at most CHUNK numbers, or 128 rows), by which torch multiplies the features. No
atomics, so that results repeat bit for bit. Halves take the tensor cores with weights as sums of two bfloat16 each,
which loses 2^-16 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, copied_by_tma, interpreted, on_device, operands
from ._precision import tf32_allowed
from ._product import add_product, halved, product_tile

CHUNK = 2**25
SUM_ROWS = 2**14


@triton.jit
def _log_sum(t, AXIS: tl.constexpr):
    """Along an axis; an infinite maximum is not subtracted, as what it leaves would be no number."""
    highest = tl.max(t, axis=AXIS)
    peak = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    return tl.log(tl.sum(tl.exp(t - tl.expand_dims(peak, AXIS)), axis=AXIS)) + peak


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _drrho_sums_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, row_lse_ptr, col_lse_ptr, M, N, D, offset,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    S = product_tile(rows_ptr, cols_ptr, m, n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(scale_ptr)
    others = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] + offset != n[None, :])
    own = tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)
    lse = _log_sum(tl.where(others, (S - own[:, None]) * scale, float("-inf")), 1)
    tl.store(row_lse_ptr + tl.program_id(1).to(tl.int64) * M + m, lse, mask=m < M)
    own = tl.load(diag_ptr + n, mask=n < N, other=0.0)
    lse = _log_sum(tl.where(others, (S - own[None, :]) * scale, float("-inf")), 0)
    tl.store(col_lse_ptr + tl.program_id(0).to(tl.int64) * N + n, lse, mask=n < N)


@triton.jit
def _weights(
    S, m, n, scale, diag_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, M, N, stride, offset,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes the weights of a part of a tile; returns what they make of t."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    partner = m[:, None] + offset == n[None, :]
    t = (S - tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)[:, None]) * scale
    w = tl.exp(t - tl.load(row_u_ptr + m, mask=m < M, other=0.0)[:, None])
    moment = w * t
    t = (S - tl.load(diag_ptr + n, mask=n < N, other=0.0)[None, :]) * scale
    other = tl.exp(t - tl.load(col_u_ptr + n, mask=n < N, other=0.0)[None, :])
    w += other
    moment = tl.where(inside & (partner == 0), moment + other * t, 0.0)
    w = tl.where(partner, tl.load(own_ptr + m, mask=m < M, other=0.0)[:, None], w)
    place = m.to(tl.int64)[:, None] * stride + n[None, :]
    if SPLIT:
        w, rest = halved(w)
        tl.store(rest_ptr + place, rest, mask=inside)
    tl.store(weight_ptr + place, w, mask=inside)
    return tl.sum(tl.sum(moment, axis=1), axis=0)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _drrho_weights_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, moment_ptr,
    M, N, D, stride, offset,
    SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    S = product_tile(rows_ptr, cols_ptr, m, n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(scale_ptr)
    # one half of the columns after the other, as the registers do not hold all that both need
    low, high = tl.split(tl.permute(tl.reshape(S, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    moment = _weights(
        low, m, n, scale, diag_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, M, N, stride, offset, SPLIT
    )
    n += BLOCK_N // 2
    moment += _weights(
        high, m, n, scale, diag_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, rest_ptr, M, N, stride, offset, SPLIT
    )
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(moment_ptr + at, moment)


def tile_config(dtype: torch.dtype, weights: bool = False) -> dict[str, int]:
    """Of similarities, whose tile is reduced both ways or made into weights in registers."""
    if interpreted(_drrho_sums_kernel):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    hip = torch.version.hip is not None
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32 if hip else 64, "num_warps": 8, "num_stages": 2 if hip else 3}


def _options(rows: torch.Tensor, cols: torch.Tensor) -> dict[str, object]:
    tma = copied_by_tma(rows, cols)
    return {"TMA": tma, "PRECISION": "tf32" if tf32_allowed() else "ieee", **tile_config(rows.dtype)}


def _factors(rows: torch.Tensor, cols: torch.Tensor, config: dict) -> tuple[object, object]:
    return operands(rows, cols, config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"], config["TMA"])


def _wide_in_interpreter(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # the interpreter multiplies bf16, which every half's weights take, as raw bits
    wide = interpreted(_drrho_sums_kernel)
    return tuple(t.float() if wide else t for t in tensors)


def drrho_sums(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, offset: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows (M, D), cols (N, D), diag (N,) and scale () in float32 -> row_lse (M,), col_lse (N,), nothing kept."""
    rows, cols = _wide_in_interpreter(rows, cols)
    (M, D), N = rows.shape, cols.shape[0]
    config = _options(rows, cols)
    row_lse, col_lse = diag.new_empty(M), diag.new_full((N,), -torch.inf)
    with on_device(rows):
        for start in range(0, M, SUM_ROWS):
            some = rows[start : start + SUM_ROWS]
            m = some.shape[0]
            grid = (cdiv(m, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]))
            by_row, by_col = diag.new_empty(grid[1], m), diag.new_empty(grid[0], N)
            _drrho_sums_kernel[grid](
                *_factors(some, cols, config), diag, scale, by_row, by_col, m, N, D, offset + start, **config
            )
            torch.logsumexp(by_row, 0, out=row_lse[start : start + m])
            col_lse = torch.logaddexp(col_lse, by_col.logsumexp(0))
    # nothing is kept, in the shape that says so
    return row_lse, col_lse, diag.new_empty(0, (N + 63) // 64 * 64 + 16)


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What multiplies weights that are bfloat16 or float32: float16 becomes a sum of two bfloat16."""
    if x.dtype != torch.float16:
        return (x,)
    high = x.bfloat16()
    return high, torch.where(high.isinf(), 0.0, x.float() - high.float()).bfloat16()


def _products(total: torch.Tensor, weights: tuple[torch.Tensor, ...], x: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """total + weights x, both sums of parts, the smallest first and the smallest of all left out."""
    for i, j in ((0, 1), (1, 0), (0, 0)):
        if i < len(weights) and j < len(x):
            total = add_product(total, weights[i], x[j])
    return total


def drrho_grad(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, offset: int,
    row_u: torch.Tensor, col_u: torch.Tensor, own: torch.Tensor, kept: torch.Tensor, width: int,
    need_rows: bool, need_cols: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> weights times cols (M, width), their transpose times rows (N, width), the sum of weights times t ()."""
    rows, cols = _wide_in_interpreter(rows, cols)
    (M, D), N = rows.shape, cols.shape[0]
    d_rows = diag.new_zeros(M if need_rows else 0, width)
    d_cols = diag.new_zeros(N if need_cols else 0, width)
    moments = [diag.new_zeros(1, dtype=torch.float64)]
    split, config = rows.dtype != torch.float32, _options(rows, cols)
    chunk = max(128, CHUNK // N // 128 * 128)
    stride = cdiv(N, 16) * 16  # whole lines
    kind = torch.bfloat16 if split else torch.float32
    weights = tuple(rows.new_empty(min(M, chunk), stride, dtype=kind) for _ in range(1 + split))
    x, y = _parts(cols[:, :width]), _parts(rows[:, :width])
    with on_device(rows):
        for start in range(0, M, chunk):
            at = slice(start, min(start + chunk, M))
            m = at.stop - start
            grid = (cdiv(m, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]))
            moment = diag.new_empty(grid)
            _drrho_weights_kernel[grid](
                *_factors(rows[at], cols, config), diag, scale, row_u[at], col_u, own[at], weights[0], weights[-1],
                moment, m, N, D, stride, offset + start, SPLIT=split, **config,
            )  # fmt: skip
            moments.append(moment.double().sum().reshape(1))
            some = tuple(w[:m, :N] for w in weights)
            if need_rows:
                d_rows[at] = _products(d_rows[at], some, x)
            if need_cols:
                d_cols = _products(d_cols, tuple(w.T for w in some), tuple(part[at] for part in y))
    return d_rows, d_cols, torch.cat(moments).sum().float()
