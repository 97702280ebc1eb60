"""The ``count`` largest positive pre-activations of a batch, exact, without a (B, n) buffer.

Launch 1 is ``topk_encode``'s: the J largest of each row of each tile. Three histograms of them, of ever narrower bins,
find the ``count``-th, T, which no true one is below. Three more find that of all pre-activations: a row of a tile can
hold more of at least T than its J only when its J-th is, and such tiles are multiplied again. What is above that
value, and the first of what equals it, is gathered as by a threshold.

Numbers are compared as ``topk_encode``'s integers; a row with a NaN has one code, which is one of the count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import interpreted, next_power_of_2, on_device
from ._product import tile_numbers
from .threshold_encode import encode_above, next_number, none_at_all
from .topk_encode import (
    MAX_CANDIDATES_PER_BUCKET,
    Dictionary,
    Product,
    _ordered,
    _pre_acts_tile,
    candidates_per_bucket,
    emitted,
    product_of,
)

BINS = 2048
WIDTHS = (20, 9, 0)  # bits of a bin: 2^31 numbers, then the bins' own
NAN = 0x7FFFFFFF


@triton.jit(do_not_specialize=["B"])
def _batch_bins_kernel(
    order_ptr, spoiled_ptr, least_ptr, bins_ptr, x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, B, n, d, features,
    J: tl.constexpr, J2: tl.constexpr, WHOLE: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_b, tile_n = tile_numbers(B, n, BLOCK_B, BLOCK_N)
    rows = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    competes = (rows < B) & (tl.load(spoiled_ptr + rows, mask=rows < B, other=1) == 0)
    least = tl.load(least_ptr)
    at = (rows.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile_n) * J
    last = tl.load(order_ptr + at + J - 1, mask=competes, other=-0x80000000)
    hidden = tl.max(last, axis=0) >= least
    if WHOLE and hidden:
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _pre_acts_tile(
            x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, tile_b, tile_n, B, n, d, features,
            HAS_BIAS, ACROSS, TMA, EVEN_D, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        # only of positive numbers can orders be compared as they are
        value = tl.where(cols < n, least.to(tl.float32, bitcast=True), float("nan"))
        left = tl.where((acc >= value[None, :]) & competes[:, None], acc, float("nan"))
        most = tl.max(tl.sum((left == left).to(tl.int32), axis=1), axis=0)
        for _ in range(0, most):
            col, number, left = next_number(left, tl.arange(0, BLOCK_N), BLOCK_N)
            place = (_ordered(number) - least) >> SHIFT
            tl.atomic_add(bins_ptr + place, 1, mask=(col < BLOCK_N) & (place < BINS), sem="relaxed")
    else:
        j = tl.arange(0, J2)
        there = competes[:, None] & (j < J)[None, :]
        order = tl.load(order_ptr + at[:, None] + j[None, :], mask=there, other=-0x80000000)
        bin = (order - least) >> SHIFT
        tl.atomic_add(bins_ptr + bin, 1, mask=(order >= least) & (bin < BINS), sem="relaxed")


def _kth(
    product: Product,
    order: torch.Tensor,  # (B, tiles, J)
    spoiled: torch.Tensor,  # (B,)
    least: torch.Tensor,  # () int32: none that is wanted is below
    count: torch.Tensor,  # () int64
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count``-th largest order, of all pre-activations if ``whole``, else of the emitted ones, and how many that
    equal it are among the ``count``."""
    J = order.shape[2]
    top = least
    for shift in WIDTHS:
        bins = torch.zeros(BINS, dtype=torch.int32, device=order.device)
        _batch_bins_kernel[product.grid](
            order, spoiled, top, bins, *product.inputs, *product.sizes,
            J=J, J2=next_power_of_2(J), WHOLE=whole, SHIFT=shift, BINS=BINS,
            **product.flags, **product.config,
        )  # fmt: skip
        # how many there are from a bin on upwards
        upwards = bins.flip(0).cumsum(0).flip(0)
        number = ((upwards >= count).sum() - 1).clamp(min=0)
        count = count - (upwards.gather(0, number[None]) - bins.gather(0, number[None]))[0]
        top = (top + (number << shift)).to(torch.int32)
    return top, count


def batch_topk_encode(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor | None, count: int,
    scale: torch.Tensor | None = None, columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (B, d), W_enc (n, d), b_enc and scale (n,) or None, columns (m,) or None -> values and indices
    (max(count, B),), offsets (B + 1,)."""
    return _largest(x, Dictionary(W_enc, b_enc, scale, columns), count)


def _largest(x: torch.Tensor, dictionary: Dictionary, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if interpreted(_batch_bins_kernel) and x.dtype == torch.bfloat16:
        values, *rest = _largest(x.float(), dictionary.widened(), count)
        return values.bfloat16(), *rest
    with on_device(x):
        product = product_of(x, dictionary, ties=True)
        B, n = product.sizes[:2]
        capacity = max(count, B)
        if B == 0 or n == 0:
            return none_at_all(x, capacity)
        # as many a row as on average, and half as many again
        J = min(MAX_CANDIDATES_PER_BUCKET, candidates_per_bucket(product.tiles, min(n, max(1, 3 * count // (2 * B)))))
        order, _ = emitted(product, J)
        spoiled = (order == NAN).any(2).any(1)
        wanted = count - spoiled.sum()
        spoiled = spoiled.to(torch.int8)
        # order 1 is the smallest positive number
        least = torch.ones((), dtype=torch.int32, device=x.device)
        least, _ = _kth(product, order, spoiled, least, wanted, whole=False)
        least, quota = _kth(product, order, spoiled, least, wanted, whole=True)
        limit = least.view(torch.float32)[None]
        limit = torch.where(wanted > 0, limit, torch.inf)
        return encode_above(product, limit, n != 1, quota, capacity, x.dtype)
