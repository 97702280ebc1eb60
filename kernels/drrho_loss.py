"""The DRRho loss: a tile of similarities is computed where it is needed, for both sides at once, and never stored.

Each program of the first sweep leaves the log-sums of its tile's rows and columns, N / BLOCK numbers for each row,
merged in a fixed order. The second sweep writes the weights of a chunk of rows (at most CHUNK numbers, or 128 rows),
whose two products follow: no atomics, so that results repeat bit for bit. Halves take the tensor cores with weights as
sums of two bfloat16 each, which loses 2^-16 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, copied_by_tma, interpreted, on_device, tiles
from ._precision import tf32_allowed
from .semantic_drift import _halved

CHUNK = 2**24


@triton.jit
def _similarities(
    rows_ptr, cols_ptr, m, n, M, N, D, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    S = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:  # rows and cols are descriptors
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
    S = _similarities(rows_ptr, cols_ptr, m, n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(scale_ptr)
    others = (m < M)[:, None] & (n < N)[None, :] & (m[:, None] + offset != n[None, :])
    own = tl.load(diag_ptr + offset + m, mask=m < M, other=0.0)
    lse = _log_sum(tl.where(others, (S - own[:, None]) * scale, float("-inf")), 1)
    tl.store(row_lse_ptr + tl.program_id(1).to(tl.int64) * M + m, lse, mask=m < M)
    own = tl.load(diag_ptr + n, mask=n < N, other=0.0)
    lse = _log_sum(tl.where(others, (S - own[None, :]) * scale, float("-inf")), 0)
    tl.store(col_lse_ptr + tl.program_id(0).to(tl.int64) * N + n, lse, mask=n < N)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _drrho_weights_kernel(
    rows_ptr, cols_ptr, diag_ptr, scale_ptr, row_u_ptr, col_u_ptr, own_ptr, weight_ptr, moment_ptr,
    M, N, D, stride, offset,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    S = _similarities(rows_ptr, cols_ptr, m, n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D)
    scale = tl.load(scale_ptr)
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
    tl.store(weight_ptr + m.to(tl.int64)[:, None] * stride + n[None, :], w, mask=inside)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(moment_ptr + at, tl.sum(tl.sum(moment, axis=1), axis=0))


@triton.jit(do_not_specialize=["M", "K"])
def _drrho_product_kernel(
    weight_ptr, x_ptr, out_ptr, M, K, width, x_row, weight_row, weight_col,
    ADD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (M, width) = or += weights (M, K), of any strides, times x (K, width ...)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (m < M)[:, None] & (j < width)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * width + j[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        place = m.to(tl.int64)[:, None] * weight_row + k.to(tl.int64)[None, :] * weight_col
        w = tl.load(weight_ptr + place, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(
            x_ptr + k.to(tl.int64)[:, None] * x_row + j[None, :],
            mask=(k < K)[:, None] & (j < width)[None, :],
            other=0.0,
        )
        if SPLIT:
            high, low = _halved(w)
            if x_ptr.dtype.element_ty == tl.float16:
                x_high, x_low = _halved(x.to(tl.float32))
                total = tl.dot(low, x_high, tl.dot(high, x_low, total))
                total = tl.dot(high, x_high, total)
            else:
                total = tl.dot(high, x, tl.dot(low, x, total))
        else:
            total = tl.dot(w, x, total, input_precision=PRECISION)
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


def tile_config(dtype: torch.dtype) -> dict[str, int]:
    """Of similarities, whose tile is reduced both ways in registers."""
    if interpreted(_drrho_sums_kernel):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 128}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    hip = torch.version.hip is not None
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 32 if hip else 64, "num_warps": 8, "num_stages": 2 if hip else 3}


def product_config(dtype: torch.dtype) -> dict[str, int]:
    """Weights are halved in registers, which bounds the tile; fp32 runs on plain FMAs, in smaller steps."""
    if interpreted(_drrho_product_kernel):
        return {"BLOCK_M": 128, "BLOCK_K": 128, "BLOCK_D": 128}
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_K": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


def _options(rows: torch.Tensor, cols: torch.Tensor) -> dict[str, object]:
    tma = copied_by_tma(rows, cols)
    return {"TMA": tma, "PRECISION": "tf32" if tf32_allowed() else "ieee", **tile_config(rows.dtype)}


def _operands(rows: torch.Tensor, cols: torch.Tensor, config: dict) -> tuple[object, object]:
    if not config["TMA"]:
        return rows, cols
    return tiles(rows, config["BLOCK_M"], config["BLOCK_D"]), tiles(cols, config["BLOCK_N"], config["BLOCK_D"])


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
    grid = (cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]))
    row_lse, col_lse = diag.new_empty(grid[1], M), diag.new_empty(grid[0], N)
    if M > 0:
        with on_device(rows):
            _drrho_sums_kernel[grid](
                *_operands(rows, cols, config), diag, scale, row_lse, col_lse, M, N, D, offset, **config
            )
    # nothing is kept, in the shape that says so
    return row_lse.logsumexp(0), col_lse.logsumexp(0), diag.new_empty(0, (N + 63) // 64 * 64 + 16)


def drrho_grad(
    rows: torch.Tensor, cols: torch.Tensor, diag: torch.Tensor, scale: torch.Tensor, offset: int,
    row_u: torch.Tensor, col_u: torch.Tensor, own: torch.Tensor, kept: torch.Tensor, width: int,
    need_rows: bool, need_cols: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> weights times cols (M, width), their transpose times rows (N, width), the sum of weights times t ()."""
    rows, cols = _wide_in_interpreter(rows, cols)
    (M, D), N = rows.shape, cols.shape[0]
    d_rows = diag.new_empty(M if need_rows else 0, width)
    d_cols = diag.new_zeros(N if need_cols else 0, width)
    moments = [diag.new_zeros(1, dtype=torch.float64)]
    config, product = _options(rows, cols), product_config(rows.dtype)
    flags = {"SPLIT": rows.dtype != torch.float32, "PRECISION": config["PRECISION"], **product}
    chunk = max(128, CHUNK // N // 128 * 128)
    stride = cdiv(N, 16) * 16  # whole lines, so that weights are read 16 bytes at a time
    weights = diag.new_empty(min(M, chunk), stride)
    tiles = cdiv(width, product["BLOCK_D"])
    with on_device(rows):
        for start in range(0, M, chunk):
            some = rows[start : start + chunk]
            m, at = some.shape[0], slice(start, start + chunk)
            grid = (cdiv(m, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]))
            moment = diag.new_empty(grid)
            _drrho_weights_kernel[grid](
                *_operands(some, cols, config), diag, scale, row_u[at], col_u, own[at], weights, moment,
                m, N, D, stride, offset + start, **config,
            )  # fmt: skip
            moments.append(moment.double().sum().reshape(1))
            if need_rows:
                _drrho_product_kernel[(cdiv(m, product["BLOCK_M"]), tiles)](
                    weights, cols, d_rows[at], m, N, width, D, stride, 1, ADD=False, **flags
                )
            if need_cols:
                _drrho_product_kernel[(cdiv(N, product["BLOCK_M"]), tiles)](
                    weights, some, d_cols, N, m, width, D, 1, stride, ADD=True, **flags
                )
    return d_rows, d_cols, torch.cat(moments).sum().float()
