"""All pre-activations of x W_encᵀ + b_enc above a limit, as ragged codes, without a (B, n) buffer.

Launch 1 multiplies BLOCK_B x BLOCK_N tiles, counts what each row of a tile keeps and emits the first J of it. The
counts' running sum says where every row of every tile writes. Launch 2 copies what was emitted; only a tile that kept
more than J of a row is multiplied again.

With TIES the limit is a value that some pre-activations equal, of which the first ``quota`` are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import interpreted, on_device
from ._product import tile_numbers
from .topk_encode import Dictionary, Product, _pre_acts_tile, feature_numbers, product_of

EMITTED = 8  # a row of a tile, 256 features wide at most


@triton.jit
def _limits(limit_ptr, cols, n, SINGLE: tl.constexpr):
    """A column's limit; beyond the last one NaN, which nothing is above or equals."""
    at = tl.zeros_like(cols) if SINGLE else cols
    return tl.load(limit_ptr + at, mask=cols < n, other=float("nan")).to(tl.float32)


@triton.jit
def next_number(tile, local, BLOCK_N: tl.constexpr):
    """The first column of each row that holds a number, that number, and the tile without it. One at a time: whole
    tiles of columns and places do not fit into registers beside the product."""
    at = tl.min(tl.where(tile == tile, local[None, :], BLOCK_N), axis=1)
    here = local[None, :] == at[:, None]
    number = tl.sum(tl.where(here, tile, 0.0), axis=1)
    return at, number, tl.where(here, float("nan"), tile)


@triton.jit(do_not_specialize=["B"])
def _threshold_count_kernel(
    x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, limit_ptr, above_ptr, equal_ptr, nan_ptr, value_ptr, col_ptr,
    B, n, d, features,
    J: tl.constexpr, SINGLE: tl.constexpr, TIES: tl.constexpr, HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_b, tile_n = tile_numbers(B, n, BLOCK_B, BLOCK_N)
    rows = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    local = tl.arange(0, BLOCK_N)
    cols = tile_n * BLOCK_N + local
    acc = _pre_acts_tile(
        x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, tile_b, tile_n, B, n, d, features,
        HAS_BIAS, ACROSS, TMA, EVEN_D, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    limit = _limits(limit_ptr, cols, n, SINGLE)[None, :]
    live = rows < B
    at = rows.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile_n
    # columns beyond the last one repeat it
    tl.store(nan_ptr + at, tl.sum((acc != acc).to(tl.int32), axis=1), mask=live)
    if TIES:
        left = tl.where(acc >= limit, acc, float("nan"))
        tl.store(equal_ptr + at, tl.sum((left == limit).to(tl.int32), axis=1), mask=live)
    else:
        left = tl.where(acc > limit, acc, float("nan"))
    tl.store(above_ptr + at, tl.sum((left > limit).to(tl.int32), axis=1), mask=live)
    for j in range(J):
        col, value, left = next_number(left, local, BLOCK_N)
        emitted = live & (col < BLOCK_N)
        tl.store(value_ptr + at * J + j, value, mask=emitted)
        tl.store(col_ptr + at * J + j, col.to(tl.uint8), mask=emitted)


@triton.jit(do_not_specialize=["B"])
def _threshold_write_kernel(
    x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, limit_ptr, total_ptr, quota_ptr, base_ptr, spoiled_ptr, value_ptr,
    col_ptr, values_ptr, indices_ptr, B, n, d, features, capacity,
    J: tl.constexpr, SINGLE: tl.constexpr, TIES: tl.constexpr, HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_b, tile_n = tile_numbers(B, n, BLOCK_B, BLOCK_N)
    rows = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    at = rows.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile_n
    base = tl.load(base_ptr + at, mask=live, other=0)
    spoiled = tl.load(spoiled_ptr + rows, mask=live, other=0) != 0
    total = tl.load(total_ptr + at, mask=live, other=0)
    if tile_n == 0:
        nan = tl.full((BLOCK_B,), float("nan"), dtype=tl.float32)
        tl.store(values_ptr + base, nan.to(values_ptr.dtype.element_ty), mask=spoiled & (base < capacity))
        if columns_ptr is not None:
            first = feature_numbers(columns_ptr, tl.zeros((BLOCK_B,), dtype=tl.int64), spoiled)
            tl.store(indices_ptr + base, first, mask=spoiled & (base < capacity))
    most = tl.max(total, axis=0)
    if most > J:
        local = tl.arange(0, BLOCK_N)
        cols = tile_n * BLOCK_N + local
        acc = _pre_acts_tile(
            x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, tile_b, tile_n, B, n, d, features,
            HAS_BIAS, ACROSS, TMA, EVEN_D, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        limit = _limits(limit_ptr, cols, n, SINGLE)[None, :]
        # read again, as registers are short beside the product; places from the tile's first on take half of them
        first = (tile_b * BLOCK_B).to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile_n
        place = tl.arange(0, BLOCK_B) * tl.cdiv(n, BLOCK_N)
        total = tl.load(total_ptr + first + place, mask=live, other=0)
        there = (total > 0)[:, None]
        if TIES:
            left = tl.where((acc >= limit) & there, acc, float("nan"))
            quota = tl.load(quota_ptr + first + place, mask=live, other=0)
        else:
            left = tl.where((acc > limit) & there, acc, float("nan"))
        # BLOCK_B rows never have 2^31 codes
        start = tl.load(base_ptr + first)
        step = (tl.load(base_ptr + first + place, mask=live, other=0) - start).to(tl.int32)
        room = tl.minimum(tl.maximum(capacity - start, 0), 0x7FFFFFFF).to(tl.int32)
        for _ in range(0, most):
            col, value, left = next_number(left, local, BLOCK_N)
            chosen = col < BLOCK_N
            if TIES:
                equal = value == tl.load(limit_ptr)
                chosen = chosen & ((equal == 0) | (quota > 0))
                quota -= equal.to(tl.int32)
            mask = chosen & (step < room)
            tl.store(values_ptr + start + step, value.to(values_ptr.dtype.element_ty), mask=mask)
            name = feature_numbers(columns_ptr, (tile_n * BLOCK_N + col).to(tl.int64), mask)
            tl.store(indices_ptr + start + step, name, mask=mask)
            step += chosen.to(tl.int32)
    else:
        if TIES:
            quota = tl.load(quota_ptr + at, mask=live, other=0)
        for j in range(0, most):
            taken = j < total
            number = tl.load(value_ptr + at * J + j, mask=taken, other=0.0)
            column = tl.load(col_ptr + at * J + j, mask=taken, other=0).to(tl.int64)
            if TIES:
                same = taken & (number == tl.load(limit_ptr))
                taken = taken & ((same == 0) | (quota > 0))
                quota -= same.to(tl.int32)
            mask = taken & (base < capacity)
            tl.store(values_ptr + base, number.to(values_ptr.dtype.element_ty), mask=mask)
            name = feature_numbers(columns_ptr, tile_n * BLOCK_N + column, mask)
            tl.store(indices_ptr + base, name, mask=mask)
            base += taken.to(tl.int64)


def encode_above(
    product: Product,
    limit: torch.Tensor,  # (1,) if ``single``, else one a column
    single: bool,
    quota: torch.Tensor | None,  # () how many that equal the limit are kept; None: none
    capacity: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values and indices (capacity,), offsets (B + 1,); -1 makes as much room as is needed."""
    B = product.sizes[0]
    device, tiles = limit.device, product.tiles
    above, equal, nan = torch.empty((3, B, tiles), dtype=torch.int32, device=device)
    value = torch.empty((B, tiles, EMITTED), dtype=torch.float32, device=device)
    col = torch.empty((B, tiles, EMITTED), dtype=torch.uint8, device=device)
    kinds = {"J": EMITTED, "SINGLE": single, "TIES": quota is not None}
    kinds = {**kinds, **product.flags, **product.config}
    _threshold_count_kernel[product.grid](
        *product.inputs, limit, above, equal, nan, value, col, *product.sizes, **kinds
    )
    spoiled = nan.any(1)
    total, kept, quotas = above, above, above
    if quota is not None:
        # in the order of rows, and of features in each, as many as there is a quota for
        equal = equal.masked_fill(spoiled[:, None], 0)
        before = equal.flatten().cumsum(0).view_as(equal) - equal
        quotas = torch.minimum((quota - before).clamp(min=0), equal).to(torch.int32)
        total, kept = above + equal, above + quotas
    total = total.masked_fill(spoiled[:, None], 0)
    first = torch.arange(tiles, device=device) == 0
    kept = torch.where(spoiled[:, None], first.to(torch.int32), kept)
    ends = kept.flatten().cumsum(0)
    base = (ends - kept.flatten()).contiguous()
    offsets = torch.zeros(B + 1, dtype=torch.int64, device=device)
    offsets[1:] = ends.view(B, tiles)[:, -1]
    room = int(offsets[-1]) if capacity < 0 else capacity
    values = torch.zeros(room, dtype=dtype, device=device)
    indices = torch.zeros(room, dtype=torch.int64, device=device)
    _threshold_write_kernel[product.grid](
        *product.inputs, limit, total, quotas, base, spoiled.to(torch.int8), value, col, values, indices,
        *product.sizes, room, **kinds,
    )  # fmt: skip
    return values, indices, offsets


def none_at_all(x: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes where there are no rows or no features."""
    index = {"dtype": torch.int64, "device": x.device}
    room = max(capacity, 0)
    return x.new_zeros(room), torch.zeros(room, **index), torch.zeros(x.shape[0] + 1, **index)


def threshold_encode(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor | None, threshold: torch.Tensor, capacity: int,
    scale: torch.Tensor | None = None, columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (B, d), W_enc (n, d), b_enc and scale (n,) or None, threshold (1,) or (n,), columns (m,) or None -> values and
    indices (capacity,), offsets (B + 1,): all pre-activations above their threshold."""
    return _above(x, Dictionary(W_enc, b_enc, scale, columns), threshold, capacity)


def _above(
    x: torch.Tensor, dictionary: Dictionary, threshold: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if interpreted(_threshold_count_kernel) and x.dtype == torch.bfloat16:
        # The interpreter's bf16 dot multiplies raw bits and its bf16 store truncates.
        values, *rest = _above(x.float(), dictionary.widened(), threshold.float(), capacity)
        return values.bfloat16(), *rest
    with on_device(x):
        product = product_of(x, dictionary)
        if 0 in product.sizes[:2]:
            return none_at_all(x, capacity)
        single = threshold.numel() == 1 and product.sizes[3] != 1
        limit = threshold if single else dictionary.of_columns(threshold)
        return encode_above(product, limit, single, None, capacity, x.dtype)
