"""The sigmoid loss: a tile of similarities becomes losses and weights where it is computed.

No pair waits for another: there is one sweep. Each program leaves three sums of its tile, which torch adds, and writes
its weights, which _weights.py multiplies. No atomics, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, operands, similarities
from ._product import parts_of, product_tile, store_weights, tile_numbers
from ._weights import masked, products_of_weights, wide_in_interpreter


@triton.jit
def _log_above_one(e):
    """log(1 + e) for e in [0, 1]: twice the area tangent of e / (2 + e), whose series in its square, of at most 1/9, is
    off by less than a rounding after the eighth term."""
    s = e / (2.0 + e)
    q = s * s
    y = q * (1.0 / 15) + 1.0 / 13
    y = y * q + 1.0 / 11
    y = y * q + 1.0 / 9
    y = y * q + 1.0 / 7
    y = y * q + 1.0 / 5
    y = y * q + 1.0 / 3
    return 2.0 * (s + s * (q * y))


@triton.jit
def _sigmoids(
    S, row, col, scale, bias, losses, products, shares, weight_ptr, rest_ptr, M, N, stride, offset,
    STORE: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Writes the weights of a part of a tile, which begins at ``row`` and ``col``; returns the three sums (by rows)
    with what is in it: losses, weights times similarities, weights."""
    m = row + tl.arange(0, S.shape[0])
    n = col + tl.arange(0, S.shape[1])
    z = S * scale + bias
    if MASKED:
        partner = m[:, None] + offset == n[None, :]
        z = tl.where(partner, -z, z)
    e = tl.exp(-tl.abs(z))
    share = 1.0 / (1.0 + e)
    w = tl.where(z > 0, share, e * share)
    loss = tl.where(z > 0, z, 0.0) + _log_above_one(e)
    inside = None
    if MASKED:
        w = tl.where(partner, -w, w)
        there = (m < M)[:, None] & (n < N)[None, :]
        loss = tl.where(there, loss, 0.0)
        w = tl.where(there, w, 0.0)
        S = tl.where(there, S, 0.0)
        # what lies between N and the stride nobody reads
        inside = (m < M)[:, None] & (n < stride)[None, :]
    if STORE:
        store_weights(w, weight_ptr, rest_ptr, row, col, stride, inside, SPLIT, TMA)
    return losses + tl.sum(loss, axis=1), products + tl.sum(w * S, axis=1), shares + tl.sum(w, axis=1)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _siglip_weights_kernel(
    rows_ptr, cols_ptr, scale_ptr, bias_ptr, weight_ptr, rest_ptr, sums_ptr, M, N, D, stride, offset,
    STORE: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_numbers(M, N, BLOCK_M, BLOCK_N)
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    S = product_tile(
        rows_ptr, cols_ptr, tile_m, tile_n, M, N, D, TMA, EVEN_D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    parts = parts_of(S, PARTS)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    losses = tl.zeros((BLOCK_M,), dtype=tl.float32)
    products = tl.zeros((BLOCK_M,), dtype=tl.float32)
    shares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if masked(tile_m, tile_n, M, N, offset, BLOCK_M, BLOCK_N):
        for part in tl.static_range(PARTS):
            losses, products, shares = _sigmoids(
                parts[part], row, col + part * WIDTH, scale, bias, losses, products, shares, weight_ptr,
                rest_ptr, M, N, stride, offset, STORE, SPLIT, TMA, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(PARTS):
            losses, products, shares = _sigmoids(
                parts[part], row, col + part * WIDTH, scale, bias, losses, products, shares, weight_ptr,
                rest_ptr, M, N, stride, offset, STORE, SPLIT, TMA, False,
            )  # fmt: skip
    place = sums_ptr + tl.program_id(0) * 3
    tl.store(place, tl.sum(losses, axis=0))
    tl.store(place + 1, tl.sum(products, axis=0))
    tl.store(place + 2, tl.sum(shares, axis=0))


def siglip_sweep(
    rows: torch.Tensor, cols: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int, need_rows: bool,
    need_cols: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """rows (M, D), cols (N, D), scale () and bias () in float32 -> sums of losses, of weights times similarities and of
    weights (3,), weights times cols (M, D), their transpose times rows (N, D)."""
    rows, cols = wide_in_interpreter(_siglip_weights_kernel, rows, cols)
    D, N = rows.shape[1], cols.shape[0]
    options, config = similarities(rows, cols, interpreted(_siglip_weights_kernel))
    # what becomes of a wider tile leaves the registers, and of this one half of them
    config |= {"BLOCK_N": 64, "PARTS": 4}
    config.pop("maxnreg", None)
    sums = [scale.new_zeros(3, dtype=torch.float64)]

    def launch(at: slice, m: int, stride: int, places: tuple) -> None:
        programs = cdiv(m, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
        parts = scale.new_empty(programs, 3)
        factors = operands(rows[at], cols, options["TMA"], *(config[f"BLOCK_{x}"] for x in "MND"))
        _siglip_weights_kernel[(programs,)](
            *factors, scale, bias, *places, parts, m, N, D, stride, offset + at.start, STORE=need_rows or need_cols,
            SPLIT=rows.dtype != torch.float32, **options, **config,
        )  # fmt: skip
        sums.append(parts.double().sum(0))

    d_rows, d_cols = products_of_weights(rows, cols, D, need_rows, need_cols, options["TMA"], config, launch)
    return torch.stack(sums).sum(0).float(), d_rows, d_cols
