"""acts, indices = the k largest of x W_encᵀ + b_enc, row by row, exact, without a (B, n) buffer.

Launch 1 multiplies BLOCK_B x BLOCK_N tiles and emits the J largest of each tile's row (a "bucket"). Launch 2 takes
the k largest of a row's candidates: the k-th, T, is a lower bound of the true k-th. Only a bucket whose J-th value is
above T can hide a winner; the row is certified when there is none, and the few other buckets are multiplied again, for
that row, in the same launch. J follows from k and the number of buckets, so that this is rare on shuffled features;
where no small J does (k large beside n), keys of whole rows are written, a few rows at a time, and sorted by torch.

Values are compared as integers: v >= 0 is its own bit pattern, v < 0 the negated magnitude (so -0 ties with 0), NaN the
largest int32. A key is that integer above 2^31 - 1 - column: one 64-bit order, value descending, then index ascending.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import (
    Chip,
    by_matrix_units,
    cdiv,
    chip,
    fitted,
    interpreted,
    next_power_of_2,
    on_device,
    one_by_one,
    product_options,
    tiles,
)
from ._product import product_tile, tile_numbers
from ._sort import merged_top, sorted_top

MAX_CANDIDATES_PER_BUCKET = 16
MAX_K = 512  # a row's k best live in the registers of one program
KEY_BUFFER_BYTES = 32 << 20


@triton.jit
def _pre_acts_tile(
    x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, tile_b, tile_n, B, n, d, features,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(x Wᵀ + b) · scale, whose bias and scale are those of the n columns that are looked at."""
    acc = product_tile(
        x_ptr, w_ptr, tile_b, tile_n, B, n, d, TMA, EVEN_D, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D,
        columns_ptr, features, ACROSS,
    )  # fmt: skip
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + cols, mask=cols < n, other=1.0).to(tl.float32)[None, :]
    return acc  # (BLOCK_B, BLOCK_N)


@triton.jit
def feature_numbers(columns_ptr, place, mask):
    """The features' own numbers of places among the columns that are looked at."""
    if columns_ptr is None:
        name = place
    else:
        name = tl.load(columns_ptr + place, mask=mask, other=0)
    return name


@triton.jit
def _ordered(v):
    """float32 -> int32 in the same order; int32's minimum is left free to mean "no value"."""
    bits = v.to(tl.int32, bitcast=True)
    return tl.where(v != v, 0x7FFFFFFF, tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits))


@triton.jit
def _key(order, cols):
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - cols).to(tl.int64)


@triton.jit
def _kth(best, k, K2: tl.constexpr):
    return tl.min(tl.where(tl.arange(0, K2)[None, :] < k, best, 0x7FFFFFFFFFFFFFFF), axis=1)


@triton.jit(do_not_specialize=["B"])
def _topk_encode_fwd_kernel(
    x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, order_ptr, col_ptr, B, n, d, features,
    J: tl.constexpr, HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
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
    order = tl.where((cols < n)[None, :], _ordered(acc), -0x80000000)
    out = (rows.to(tl.int64) * tl.cdiv(n, BLOCK_N) + tile_n) * J
    for j in range(J):
        top = tl.max(order, axis=1)
        at = tl.min(tl.where(order == top[:, None], local[None, :], BLOCK_N - 1), axis=1)
        order = tl.where(local[None, :] == at[:, None], -0x80000000, order)
        tl.store(order_ptr + out + j, top, mask=rows < B)
        tl.store(col_ptr + out + j, at.to(tl.uint8), mask=rows < B)


@triton.jit(do_not_specialize=["B"])
def _topk_encode_select_kernel(
    order_ptr, col_ptr, x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, acts_ptr, indices_ptr, B, n, d, features, k,
    J: tl.constexpr, K2: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, RELU: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    buckets = tl.cdiv(n, BLOCK_N)
    total = buckets * J
    base = rows.to(tl.int64) * total
    best = _key(tl.full((BLOCK_B, K2), -0x80000000, dtype=tl.int32), tl.zeros((BLOCK_B, K2), dtype=tl.int32))
    for start in range(0, total, CHUNK):
        c = start + tl.arange(0, CHUNK)
        mask = live[:, None] & (c < total)[None, :]
        order = tl.load(order_ptr + base[:, None] + c[None, :], mask=mask, other=-0x80000000)
        col = tl.load(col_ptr + base[:, None] + c[None, :], mask=mask, other=0).to(tl.int32)
        keys = _key(order, (c // J * BLOCK_N)[None, :] + col)
        best = merged_top(best, sorted_top(keys, K2, 1))
    kth = _kth(best, k, K2)

    # The certificate: a bucket can hide a winner only when even its J-th value is above the k-th found.
    open_buckets = tl.zeros((BLOCK_B,), dtype=tl.int32)
    for start in range(0, buckets, CHUNK):
        c = start + tl.arange(0, CHUNK)
        last = base[:, None] + (c * J + J - 1)[None, :]
        mask = live[:, None] & (c < buckets)[None, :]
        order = tl.load(order_ptr + last, mask=mask, other=-0x80000000)
        col = tl.load(col_ptr + last, mask=mask, other=0).to(tl.int32)
        hides = (order != -0x80000000) & (_key(order, (c * BLOCK_N)[None, :] + col) > kth[:, None])
        open_buckets += tl.sum(hides.to(tl.int32), axis=1)

    if tl.max(open_buckets, axis=0) > 0:
        for bucket in range(0, buckets):
            last = base + bucket * J + J - 1
            order = tl.load(order_ptr + last, mask=live, other=-0x80000000)
            col = tl.load(col_ptr + last, mask=live, other=0).to(tl.int32)
            redo = (order != -0x80000000) & (_key(order, bucket * BLOCK_N + col) > kth)
            if tl.max(redo.to(tl.int32), axis=0) > 0:
                local = tl.arange(0, WIDTH)
                cols = bucket * BLOCK_N + local
                inside = (local < BLOCK_N) & (cols < n)
                at = cols.to(tl.int64)
                if columns_ptr is not None:
                    at = tl.load(columns_ptr + cols, mask=inside, other=0)
                acc = tl.zeros((BLOCK_B, WIDTH), dtype=tl.float32)
                for start in range(0, d, BLOCK_D):
                    offs = start + tl.arange(0, BLOCK_D)
                    x = tl.load(
                        x_ptr + rows.to(tl.int64)[:, None] * d + offs[None, :],
                        mask=live[:, None] & (offs < d)[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    if ACROSS:
                        place = offs.to(tl.int64)[None, :] * features + at[:, None]
                    else:
                        place = at[:, None] * d + offs[None, :]
                    w = tl.load(
                        w_ptr + place,
                        mask=inside[:, None] & (offs < d)[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    acc += tl.sum(x[:, None, :] * w[None, :, :], axis=2)
                if HAS_BIAS:
                    acc += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
                if scale_ptr is not None:
                    acc *= tl.load(scale_ptr + cols, mask=inside, other=1.0).to(tl.float32)[None, :]
                fresh = inside[None, :] & redo[:, None]
                for j in range(J):
                    seen = tl.load(col_ptr + base + bucket * J + j, mask=live, other=0).to(tl.int32)
                    fresh = fresh & (local[None, :] != seen[:, None])
                keys = _key(tl.where(fresh, _ordered(acc), -0x80000000), cols[None, :])
                best = merged_top(best, sorted_top(keys, K2, 1))
                kth = _kth(best, k, K2)

    order = (best >> 32).to(tl.int32)
    col = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    # A row that holds a NaN has it in front. The relu is exact on the integers too.
    if RELU:
        number = tl.maximum(order, 0)
    else:
        number = tl.where(order < 0, -order ^ -0x80000000, order)
    bits = tl.where(tl.max(order, axis=1)[:, None] == 0x7FFFFFFF, 0x7FC00000, number)
    j = tl.arange(0, K2)
    out = rows.to(tl.int64)[:, None] * k + j[None, :]
    mask = live[:, None] & (j < k)[None, :]
    tl.store(acts_ptr + out, bits.to(tl.float32, bitcast=True).to(acts_ptr.dtype.element_ty), mask=mask)
    tl.store(indices_ptr + out, feature_numbers(columns_ptr, col, mask), mask=mask)


@triton.jit(do_not_specialize=["B"])
def _topk_encode_keys_kernel(
    x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, keys_ptr, B, n, d, features,
    HAS_BIAS: tl.constexpr, ACROSS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_b, tile_n = tile_numbers(B, n, BLOCK_B, BLOCK_N)
    rows = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _pre_acts_tile(
        x_ptr, w_ptr, b_ptr, scale_ptr, columns_ptr, tile_b, tile_n, B, n, d, features,
        HAS_BIAS, ACROSS, TMA, EVEN_D, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = keys_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out, _key(_ordered(acc), cols[None, :]), mask=(rows < B)[:, None] & (cols < n)[None, :])


@functools.lru_cache(256)
def candidates_per_bucket(buckets: int, k: int) -> int:
    """Smallest J for which less than 1 % of rows should need a bucket redone, were features in random order."""
    if k <= 2:
        return k
    mean = k / buckets
    term = math.exp(-mean)
    below = 0.0  # P(Poisson(mean) < j)
    for j in range(k):
        if j and buckets * (1.0 - below) < 0.01:
            return j
        below += term
        term *= mean / (j + 1)
    return k


def tile_config(
    dtype: torch.dtype,
    how: str,
    gpu: Chip,
    whole_rows: bool = False,
    by_number: bool = False,
    tma: bool = False,
    narrow: bool = False,
) -> dict[str, int]:
    """Tile of the matrix product: 8 warps of tensor-core work, or a smaller one where it runs on plain FMAs.
    ``by_number``: rows begin at odd places, so that numbers go through registers one by one. ``narrow``: registers
    hold more beside it."""
    if not by_matrix_units(dtype, how, gpu):
        # beside what is made of a tile NVIDIA's registers hold no deeper factors
        depth = gpu.plain_depth(dtype) if gpu.amd else 16
        return {"BLOCK_B": 64, "BLOCK_N": 128, "BLOCK_D": depth, "num_warps": 8, "num_stages": 2}
    rows, cols = 128, 256
    if how == "tf32x3":  # both halves of a tile pass through the registers, and all of it where these hold operands
        cols = 128 if tma and gpu.operands_apart else 64
    if narrow or whole_rows or gpu.sums_apart or gpu.few_registers:
        # 64-bit keys of a wider tile do not fit into 64 KB on their way to memory, nor sums that come into registers
        # all at once into these
        cols = min(128, cols)
    # one of AMD's stages is in registers
    shallow = dtype == torch.float32 or gpu.few_registers
    config = {
        "BLOCK_B": rows, "BLOCK_N": cols, "BLOCK_D": 32 if shallow else 64,
        "num_warps": 8, "num_stages": 2 if gpu.amd else 3,
    }  # fmt: skip
    return {**config, "BLOCK_D": 16} if by_number else fitted(config, rows, cols, dtype.itemsize, gpu)


def select_config(k: int, candidates: int, block_n: int, element_size: int) -> dict[str, int]:
    """A row a program; chunks short enough that a sort stays in registers; 16 bytes of W a lane in a redone bucket."""
    # Below 32 the tiles are too thin for their layouts and registers spill.
    k2 = max(32, next_power_of_2(k))
    return {
        "K2": k2,
        "CHUNK": max(k2, min(next_power_of_2(candidates), 256 if k2 <= 64 else 512 if k2 <= 128 else 1024)),
        "WIDTH": max(k2, block_n),
        "BLOCK_B": 1,
        "BLOCK_N": block_n,
        "BLOCK_D": 16 // element_size,
        "num_warps": 4 if k2 <= 128 else 8,
        "num_stages": 1,
    }


class Product(NamedTuple):
    """How the pre-activations of a call are multiplied: what its kernels are given besides their own."""

    inputs: tuple[object, ...]  # x, W, bias, scale, columns
    config: dict[str, int]
    flags: dict[str, object]
    sizes: tuple[int, int, int, int]  # B, columns that are looked at, d, features that there are

    @property
    def tiles(self) -> int:
        return cdiv(self.sizes[1], self.config["BLOCK_N"])

    @property
    def grid(self) -> tuple[int]:
        return (cdiv(self.sizes[0], self.config["BLOCK_B"]) * self.tiles,)


class Dictionary(NamedTuple):
    """What x is multiplied by, either way in memory."""

    W: torch.Tensor  # (n, d)
    b: torch.Tensor | None  # (n,)
    scale: torch.Tensor | None  # (n,)
    columns: torch.Tensor | None  # (m,)

    def widened(self) -> Dictionary:
        """In float32."""
        return Dictionary(*(t if t is None or t is self.columns else t.float() for t in self))

    def of_columns(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """One number a feature of those that are looked at."""
        return t if t is None or self.columns is None else t[self.columns]


def product_of(x: torch.Tensor, dictionary: Dictionary, whole_rows: bool = False, ties: bool = False) -> Product:
    """Tiles of (x Wᵀ + b) · scale, of which keys of ``whole_rows`` may be written, or whose ``ties`` are looked at."""
    W, b, scale, columns = dictionary
    d = x.shape[1]
    across = not W.is_contiguous()
    lying = W.t() if across else W
    options = product_options(x, lying)
    if columns is not None:
        options["TMA"] = False  # bulk copies are of neighbours
    if interpreted(_topk_encode_fwd_kernel):
        # few programs, but several buckets: an interpreted program costs tens of milliseconds
        config = {"BLOCK_B": 64, "BLOCK_N": 64, "BLOCK_D": 64}
    else:
        # what is read down a column has an address a number, and a scale stays beside a tile whose ties are looked at
        narrow = (across and not options["TMA"]) or (ties and scale is not None)
        how = options["PRECISION"]
        by_number = one_by_one(options, x)
        config = tile_config(x.dtype, how, chip(x.device), whole_rows, by_number, options["TMA"], narrow)
    rows, cols, depth = config["BLOCK_B"], config["BLOCK_N"], config["BLOCK_D"]
    factors = (x, W)
    if options["TMA"]:
        factors = (tiles(x, rows, depth), tiles(lying, *((depth, cols) if across else (cols, depth))))
    flags = {"HAS_BIAS": b is not None, "ACROSS": across, "EVEN_D": d % depth == 0, **options}
    bias = W if b is None else dictionary.of_columns(b)
    n = W.shape[0] if columns is None else columns.shape[0]
    inputs = (*factors, bias, dictionary.of_columns(scale), columns)
    return Product(inputs, config, flags, (x.shape[0], n, d, W.shape[0]))


def emitted(product: Product, J: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The J largest of each row of each tile: orders and columns within the tile, (B, tiles, J)."""
    shape = (product.sizes[0], product.tiles, J)
    device = product.inputs[2].device
    order = torch.empty(shape, dtype=torch.int32, device=device)
    col = torch.empty(shape, dtype=torch.uint8, device=device)
    _topk_encode_fwd_kernel[product.grid](
        *product.inputs, order, col, *product.sizes, J=J, **product.flags, **product.config
    )
    return order, col


def topk_encode(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor | None, k: int, screen: bool = True,
    scale: torch.Tensor | None = None, columns: torch.Tensor | None = None, relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (B, d), W_enc (n, d), b_enc and scale (n,) or None, columns (m,) or None -> acts (B, k) in x's dtype,
    descending, and indices (B, k) int64. ``screen`` is the CPU's."""
    return _topk(x, Dictionary(W_enc, b_enc, scale, columns), k, relu)


def _topk(x: torch.Tensor, dictionary: Dictionary, k: int, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    on_cpu = interpreted(_topk_encode_fwd_kernel)
    if on_cpu and x.dtype == torch.bfloat16:
        # The interpreter's bf16 dot multiplies raw bits and its bf16 store truncates.
        acts, indices = _topk(x.float(), dictionary.widened(), k, relu)
        return acts.bfloat16(), indices
    B, columns = x.shape[0], dictionary.columns
    acts = torch.empty((B, k), dtype=x.dtype, device=x.device)
    indices = torch.empty((B, k), dtype=torch.int64, device=x.device)
    if B == 0 or k == 0:
        return acts, indices

    with on_device(x):
        product = product_of(x, dictionary)
        n = product.sizes[1]
        J = candidates_per_bucket(product.tiles, k)
        if k > MAX_K or J > MAX_CANDIDATES_PER_BUCKET:
            step = max(1, KEY_BUFFER_BYTES // (8 * n))
            for start in range(0, B, step):
                part = product_of(x[start : start + step], dictionary, whole_rows=True)
                keys = torch.empty((part.sizes[0], n), dtype=torch.int64, device=x.device)
                _topk_encode_keys_kernel[part.grid](*part.inputs, keys, *part.sizes, **part.flags, **part.config)
                top = torch.topk(keys, k, dim=1, sorted=True).values
                order = (top >> 32).to(torch.int32)
                bits = order.clamp(min=0) if relu else torch.where(order < 0, -order ^ -(2**31), order)
                acts[start : start + step] = bits.view(torch.float32).masked_fill(order[:, :1] == 0x7FFFFFFF, math.nan)
                places = 0x7FFFFFFF - (top & 0x7FFFFFFF)
                indices[start : start + step] = places if columns is None else columns[places]
            return acts, indices

        order, col = emitted(product, J)
        select = select_config(k, product.tiles * J, product.config["BLOCK_N"], x.element_size())
        if on_cpu:
            select = {**select, "BLOCK_B": 32, "BLOCK_D": 64}
            del select["num_warps"], select["num_stages"]
        grid = (cdiv(B, select["BLOCK_B"]),)
        flags = {name: product.flags[name] for name in ("HAS_BIAS", "ACROSS")}
        _topk_encode_select_kernel[grid](
            order, col, x, dictionary.W, *product.inputs[2:], acts, indices, *product.sizes, k,
            J=J, RELU=relu, **flags, **select,
        )  # fmt: skip
    return acts, indices
