"""Weights of all pairs of rows and columns, a chunk of rows at a time, by which torch multiplies the features.

A chunk has at most CHUNK numbers, or 128 rows. Halves take the tensor cores with weights as sums of two bfloat16 each,
which loses 2^-16 of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, on_device, tiles
from ._product import add_product, multiply

CHUNK = 2**26


@triton.jit
def masked(tile_m, tile_n, M, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile reaches past an end or has a row beside its partner."""
    first = tile_m * BLOCK_M + offset
    partners = (first < (tile_n + 1) * BLOCK_N) & (tile_n * BLOCK_N < first + BLOCK_M)
    return partners | ((tile_m + 1) * BLOCK_M > M) | ((tile_n + 1) * BLOCK_N > N)


def wide_in_interpreter(kernel: object, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Halves in float32 where the kernel is interpreted, which multiplies bf16, which every half's weights take, as raw
    bits."""
    wide = interpreted(kernel)
    return tuple(t.float() if wide else t for t in tensors)


def chunk_rows(N: int) -> int:
    """Rows of a chunk of N columns."""
    return max(128, CHUNK // N // 128 * 128)


def line(N: int) -> int:
    """Numbers from one row of N to the next: whole lines of memory."""
    return cdiv(N, 16) * 16


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What multiplies weights that are bfloat16 or float32: float16 becomes a sum of two bfloat16."""
    if x.dtype != torch.float16:
        return (x,)
    high = x.bfloat16()
    return high, torch.where(high.isinf(), 0.0, x.float() - high.float()).bfloat16()


def products_of_weights(
    rows: torch.Tensor, cols: torch.Tensor, width: int, need_rows: bool, need_cols: bool, tma: bool, config: dict,
    launch: Callable[[slice, int, int, tuple], None],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weights (M, N) times cols, and their transpose times rows, of the first ``width`` numbers of each, in float32.

    launch(at, m, stride, places) writes the weights of the m rows ``at``, one every ``stride`` numbers, to two places:
    whole, or as halves."""
    M, N = rows.shape[0], cols.shape[0]
    d_rows = rows.new_zeros(M if need_rows else 0, width, dtype=torch.float32)
    d_cols = rows.new_zeros(N if need_cols else 0, width, dtype=torch.float32)
    split = rows.dtype != torch.float32
    chunk, stride, parts = chunk_rows(N), line(N), 1 + split
    buffer = rows.new_empty(parts * min(M, chunk) * stride, dtype=torch.bfloat16 if split else torch.float32)
    (x, *x_rest), (y, *y_rest) = _parts(cols[:, :width]), _parts(rows[:, :width])
    with on_device(rows):
        for start in range(0, M, chunk):
            at = slice(start, min(start + chunk, M))
            m = at.stop - start
            weights = buffer[: parts * m * stride].view(parts, m, stride)
            rest, high = weights[0], weights[-1]
            part = config["BLOCK_M"], config["BLOCK_N"] // config["PARTS"]
            launch(at, m, stride, (tiles(high, *part), tiles(rest, *part)) if tma else (high, rest))
            # both parts of the weights in one product, the smaller one first
            both = weights.flatten(0, 1)[:, :N]
            if need_rows:
                product = multiply(both, x).view(parts, m, width).sum(0)
                d_rows[at] = add_product(product, high[:, :N], x_rest[0]) if x_rest else product
            if need_cols:
                add_product(d_cols, both.T, y[at].repeat(parts, 1))
                if y_rest:
                    add_product(d_cols, high[:, :N].T, y_rest[0][at])
    return d_rows, d_cols
