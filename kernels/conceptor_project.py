"""Rows times the matrix of their group, in one launch over blocks of rows that share a group.

The grid has its static bound, a block for every BLOCK_B rows and one more a group; those past the last block return.
While there are few rows and groups, each program counts the group numbers itself, and so finds its group and its rows
with no launch before it and nothing sorted; beyond, torch sorts them stably, on the device and without a
synchronisation. A tile of h and, in low rank, the r-vector stay on chip. A half times a vector that was computed here
takes the vector as the sum of two halves, so that the tensor cores lose nothing of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Chip, cdiv, chip, interpreted, next_power_of_2, on_device, precision

# A block's r-vectors live in registers, as far as they fit; beyond, they take a (B, r) buffer and two launches.
MAX_RANK = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
MAX_RANK_ELSEWHERE = 64  # in few registers, or where they hold halves as float32 too
# Rows, rows times groups, and groups (a bin each, in registers) up to which every program counts for itself.
MAX_ROWS, MAX_TALLY, MAX_GROUPS = 2**13, 2**17, 2**11 - 1
STEP = 4096  # rows whose numbers the sorting kernel looks at at a time


@triton.jit
def _block(
    pid, index_ptr, order_ptr, offsets_ptr, B, K, GROUPING: tl.constexpr, LEAST: tl.constexpr, SIDES: tl.constexpr,
    BLOCK_B: tl.constexpr, SCAN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Whether block ``pid`` exists, its group, its rows, and which of them exist.

    ``GROUPING`` says where the groups are: ``"none"``, there is one; ``"order"``, in order_ptr and offsets_ptr, where
    groups of fewer than LEAST rows are left out; ``"index"``, in index_ptr alone, and order_ptr is room for the rows
    of this launch. Rows come in SIDES stacks of B; a block has the same ones of each.
    """
    PART: tl.constexpr = BLOCK_B // SIDES
    lane = tl.arange(0, BLOCK_B) % PART
    group = tl.zeros((), dtype=tl.int32)
    first = tl.zeros((), dtype=tl.int32)
    stop = tl.zeros((), dtype=tl.int32)
    if GROUPING == "none":
        first += pid * PART
        stop += B
    elif GROUPING == "order":
        total = tl.zeros((), dtype=tl.int32)
        for start in range(0, K, BINS):
            k = start + tl.arange(0, BINS)
            low = tl.load(offsets_ptr + k, mask=k < K, other=0)
            high = tl.load(offsets_ptr + k + 1, mask=k < K, other=0)
            blocks = tl.where(high - low >= LEAST, (high - low + PART - 1) // PART, 0)
            begin = total + tl.cumsum(blocks, axis=0) - blocks
            here = (pid >= begin) & (pid < begin + blocks)
            group += tl.sum(tl.where(here, k, 0), axis=0)
            first += tl.sum(tl.where(here, low + (pid - begin) * PART, 0), axis=0)
            stop += tl.sum(tl.where(here, high, 0), axis=0)
            total += tl.sum(blocks, axis=0)
    else:
        k = tl.arange(0, BINS)
        at = tl.arange(0, SCAN)  # all rows
        number = tl.load(index_ptr + at, mask=at < B, other=-1)
        number = tl.where((number >= 0) & (number < K), number, K).to(tl.int32)
        counts = tl.where(k < K, tl.histogram(number, BINS), 0)
        blocks = (counts + PART - 1) // PART
        begin = tl.cumsum(blocks, axis=0) - blocks
        here = (pid >= begin) & (pid < begin + blocks)
        group = tl.sum(tl.where(here, k, 0), axis=0)
        before = tl.sum(tl.where(here, (pid - begin) * PART, 0), axis=0)
        low = tl.sum(tl.where(here, tl.cumsum(counts, axis=0) - counts, 0), axis=0)
        first = low + before
        stop = low + tl.sum(tl.where(here, counts, 0), axis=0)
        if first < stop:
            own = (number == group).to(tl.int32)
            place = tl.cumsum(own, axis=0) - 1 - before
            tl.store(order_ptr + first + place, at, mask=(own > 0) & (place >= 0) & (place < PART))
            tl.debug_barrier()
    live = first + lane < stop
    rows = (first + lane).to(tl.int64)
    if GROUPING != "none":
        rows = tl.load(order_ptr + first + lane, mask=live, other=0).to(tl.int64)
    if SIDES > 1:
        rows += (tl.arange(0, BLOCK_B) // PART).to(tl.int64) * B
    return first < stop, group, rows, live


@triton.jit(do_not_specialize=["B", "K"])
def _group_kernel(index_ptr, order_ptr, offsets_ptr, B, K, SCAN: tl.constexpr):
    """The rows in the order of their groups, and where each group begins and the last one ends; a program a group."""
    group = tl.program_id(0)
    first = tl.zeros((), dtype=tl.int32)
    for start in range(0, B, SCAN):
        at = start + tl.arange(0, SCAN)
        number = tl.load(index_ptr + at, mask=at < B, other=-1)
        first += tl.sum(((number >= 0) & (number < group)).to(tl.int32), axis=0)
    tl.store(offsets_ptr + group, first)
    for start in range(0, B, SCAN):
        at = start + tl.arange(0, SCAN)
        own = (tl.load(index_ptr + at, mask=at < B, other=-1) == group).to(tl.int32)
        tl.store(order_ptr + first + tl.cumsum(own, axis=0) - 1, at, mask=own > 0)
        first += tl.sum(own, axis=0)
    if group == K - 1:
        tl.store(offsets_ptr + K, first)


@triton.jit
def _dot(x, w, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    if SPLIT:
        high = x.to(w.dtype)
        rest = x - high.to(tl.float32)
        # an infinity is all in its first half
        low = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(w.dtype)
        return tl.dot(low, w, tl.dot(high, w, acc))
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["B", "K"])
def _grouped_matmul_kernel(
    x_ptr, w_ptr, index_ptr, order_ptr, offsets_ptr, scale_ptr, beta_ptr, mean_ptr, out_ptr,
    B, K, m, n, w_row, w_col, x_row, out_row,
    GROUPING: tl.constexpr, LEAST: tl.constexpr, SIDES: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BETA: tl.constexpr, MEAN_IN: tl.constexpr,
    MEAN_OUT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    if GROUPING == "index":
        order_ptr += tl.program_id(1) * B
    exists, group, rows, live = _block(
        tl.program_id(0), index_ptr, order_ptr, offsets_ptr, B, K, GROUPING, LEAST, SIDES, BLOCK_B, SCAN, BINS
    )
    if exists:
        g = group.to(tl.int64)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        w_ptrs = w_ptr + g * m * n + cols[None, :] * w_col
        acc = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
        for start in range(0, m, BLOCK_M):
            j = start + tl.arange(0, BLOCK_M)
            inside = j < m
            x = tl.load(x_ptr + rows[:, None] * x_row + j[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs + j[:, None] * w_row, mask=inside[:, None] & (cols < n)[None, :], other=0.0)
            if MEAN_IN:
                mean = tl.load(mean_ptr + g * m + j, mask=inside, other=0.0).to(tl.float32)
                x = x.to(tl.float32) - mean[None, :]
            acc = _dot(x, w, acc, SPLIT, PRECISION)
        if HAS_SCALE:
            acc *= tl.load(scale_ptr + g * n + cols, mask=cols < n, other=0.0)[None, :]
        if HAS_BETA:
            acc *= tl.load(beta_ptr + g)
        if MEAN_OUT:
            acc += tl.load(mean_ptr + g * n + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + rows[:, None] * out_row + cols[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & (cols < n)[None, :],
        )


@triton.jit(do_not_specialize=["B", "K"])
def _low_rank_project_kernel(
    x_ptr, u_ptr, s_ptr, index_ptr, order_ptr, offsets_ptr, mean_ptr, out_ptr, B, K, d, r,
    GROUPING: tl.constexpr, HAS_MEAN: tl.constexpr, SPLIT_X: tl.constexpr, SPLIT_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SCAN: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    exists, group, rows, live = _block(
        tl.program_id(0), index_ptr, order_ptr, offsets_ptr, B, K, GROUPING, 1, 1, BLOCK_B, SCAN, BINS
    )
    if exists:
        g = group.to(tl.int64)
        i = tl.arange(0, BLOCK_R)
        inner = tl.zeros((BLOCK_B, BLOCK_R), dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + rows[:, None] * d + j[None, :], mask=live[:, None] & (j < d)[None, :], other=0.0)
            u = tl.load(
                u_ptr + g * d * r + j[:, None] * r + i[None, :],
                mask=(j < d)[:, None] & (i < r)[None, :],
                other=0.0,
            )
            if HAS_MEAN:
                x = x.to(tl.float32) - tl.load(mean_ptr + g * d + j, mask=j < d, other=0.0).to(tl.float32)[None, :]
            inner = _dot(x, u, inner, SPLIT_X, PRECISION)
        inner *= tl.load(s_ptr + g * r + i, mask=i < r, other=0.0).to(tl.float32)[None, :]
        # an infinity of x times the padding's zeros is no number, and would meet them again
        inner = tl.where((i < r)[None, :], inner, 0.0)
        for start in range(0, d, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            u = tl.load(
                u_ptr + g * d * r + j[None, :] * r + i[:, None],
                mask=(j < d)[None, :] & (i < r)[:, None],
                other=0.0,
            )
            y = _dot(inner, u, tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32), SPLIT_R, PRECISION)
            if HAS_MEAN:
                y += tl.load(mean_ptr + g * d + j, mask=j < d, other=0.0).to(tl.float32)[None, :]
            tl.store(
                out_ptr + rows[:, None] * d + j[None, :],
                y.to(out_ptr.dtype.element_ty),
                mask=live[:, None] & (j < d)[None, :],
            )


@triton.jit(do_not_specialize=["B"])
def _grouped_outer_kernel(
    a_ptr, b_ptr, order_ptr, offsets_ptr, out_ptr, B, m, n,
    HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_INDEX:
        first = tl.load(offsets_ptr + group)
        stop = tl.load(offsets_ptr + group + 1)
    else:
        first = 0
        stop = B
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, stop, BLOCK_B):
        at = start + tl.arange(0, BLOCK_B)
        live = at < stop
        if HAS_INDEX:
            rows = tl.load(order_ptr + at, mask=live, other=0).to(tl.int64)
        else:
            rows = at.to(tl.int64)
        a = tl.load(a_ptr + rows[None, :] * m + i[:, None], mask=live[None, :] & (i < m)[:, None], other=0.0)
        b = tl.load(b_ptr + rows[:, None] * n + j[None, :], mask=live[:, None] & (j < n)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + group * m * n + i.to(tl.int64)[:, None] * n + j[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(i < m)[:, None] & (j < n)[None, :],
    )


def _upcast(t: torch.Tensor | None) -> torch.Tensor | None:
    return t.float() if t is not None and t.dtype == torch.bfloat16 else t


def _interpreted_bf16(t: torch.Tensor) -> bool:
    # The interpreter multiplies bf16 as raw bits and truncates its stores: there kernels run in fp32, torch rounds.
    return t.dtype == torch.bfloat16 and interpreted(_grouped_matmul_kernel)


def _sorted(index: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in the order of their groups, and where each group begins and the last one ends."""
    B = index.shape[0]
    if _many(B, groups):
        ordered, order = torch.sort(index.to(torch.int32), stable=True)
        bounds = torch.arange(groups + 1, dtype=torch.int32, device=index.device)
        return order, torch.searchsorted(ordered, bounds, out_int32=True)
    found = torch.empty(B + groups + 1, dtype=torch.int32, device=index.device)
    order, offsets = found[:B], found[B:]
    with on_device(index):
        _group_kernel[(groups,)](index, order, offsets, B, groups, SCAN=min(STEP, max(128, next_power_of_2(B))))
    return order, offsets


def _many(rows: int, groups: int) -> bool:
    return rows > MAX_ROWS or rows * groups > MAX_TALLY or groups > MAX_GROUPS


def _grouping(x: torch.Tensor, index: torch.Tensor | None, groups: int, launches: int = 1) -> tuple[tuple, dict]:
    """The three pointers that a program finds its rows by, and how; ``launches`` programs may have the same block."""
    if index is None:
        return (x, x, x), {"GROUPING": "none", "SCAN": 1, "BINS": 1}
    B = index.shape[0]
    if _many(B, groups):
        return (index, *_sorted(index, groups)), {"GROUPING": "order", "SCAN": 1, "BINS": 128}
    room = torch.empty(launches * B, dtype=torch.int32, device=index.device)
    # a bin more, for numbers that name no group
    bins = max(32, next_power_of_2(groups + 1))
    return (index, room, room), {"GROUPING": "index", "SCAN": max(128, next_power_of_2(B)), "BINS": bins}


def matmul_config(dtype: torch.dtype, n: int, gpu: Chip, split: bool = False, rows: int = 0) -> dict[str, int]:
    """A block of rows by a tile of columns, large where a group has ``rows`` enough; fp32 in smaller steps."""
    if interpreted(_grouped_matmul_kernel):
        return {"BLOCK_B": 32, "BLOCK_M": 128, "BLOCK_N": 256}
    block_n = min(128 if gpu.multiplies(dtype) else 64, max(16, next_power_of_2(n)))
    if not gpu.multiplies(dtype):
        depth = gpu.plain_depth(dtype)
        return {"BLOCK_B": 32, "BLOCK_M": depth, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}
    tile = {"BLOCK_B": 64, "BLOCK_M": 64, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}
    if gpu.few_registers:
        tile |= {"BLOCK_M": 32, "BLOCK_N": min(64, block_n)}
    if split:  # both halves of a tile are in registers
        tile |= {"BLOCK_B": 32, "BLOCK_N": min(64, block_n)}
    elif n >= 256 and rows >= 128 and gpu.operands_apart:
        tile |= {"BLOCK_B": 128, "BLOCK_N": 256, "num_warps": 8}
    return tile


def low_rank_config(dtype: torch.dtype, r: int, gpu: Chip, mean: bool = False, rows: int = 0) -> dict[str, int]:
    """Blocks of few rows, where a group has few or a wide r-vector of each fills the registers."""
    block_r = max(16, next_power_of_2(r))
    if interpreted(_low_rank_project_kernel):
        return {"BLOCK_B": 32, "BLOCK_D": 128, "BLOCK_R": block_r}
    hip, wide = gpu.amd, block_r > 64
    if not gpu.multiplies(dtype):
        block_b, block_d = 16 if wide or gpu.few_registers else 32, gpu.plain_depth(dtype)
    else:
        # centred rows are split in registers, and a wide r-vector fills them
        block_b = 16 if (wide and hip) or gpu.few_registers else 64 if rows >= 128 and not (wide or mean or hip) else 32
        block_d = 32 if (wide and hip) or gpu.few_registers else min(64 if mean else 128, 8192 // block_r)
    return {
        "BLOCK_B": block_b, "BLOCK_D": block_d, "BLOCK_R": block_r,
        "num_warps": 8 if (wide or gpu.multiplies(dtype)) and not hip else 4, "num_stages": 2 if hip else 3,
    }  # fmt: skip


def outer_config(dtype: torch.dtype, m: int, n: int, gpu: Chip) -> dict[str, int]:
    """A tile of a group's gradient; few, wide programs, as every one reads the rows of its group."""
    if interpreted(_grouped_outer_kernel):
        side = {"BLOCK_M": min(256, max(16, next_power_of_2(m))), "BLOCK_N": min(256, max(16, next_power_of_2(n)))}
        return {"BLOCK_B": 64, **side}
    largest = 128 if gpu.multiplies(dtype) else 64
    return {
        "BLOCK_B": 32 if gpu.multiplies(dtype) else gpu.plain_depth(dtype),
        "BLOCK_M": min(largest, max(16, next_power_of_2(m))),
        "BLOCK_N": min(largest, max(16, next_power_of_2(n))),
        "num_warps": 4,
        "num_stages": 2,
    }


def _matmul(x, W, index, scale, beta, mean, transpose, *, mean_in, mean_out, dtype):
    B, m = x.shape
    K, n = W.shape[0], W.shape[1] if transpose else W.shape[2]
    out = torch.empty((B, n), dtype=dtype, device=x.device)
    if out.numel() > 0:
        split = W.dtype != torch.float32 and (mean_in or x.dtype == torch.float32)
        config = matmul_config(W.dtype, n, chip(x.device), split, B // K)
        grouping = _grouping(x, index, K, cdiv(n, config["BLOCK_N"]))
        launch_matmul(x, W, grouping, out, B, transpose, config, scale, beta, mean, mean_in, mean_out, split)
    return out


def launch_matmul(
    x, W, grouping, out, B, transpose, config, scale=None, beta=None, mean=None, mean_in=False, mean_out=False,
    split=False, least=1,
) -> None:  # fmt: skip
    """out = x W by groups (``_grouping``), of rows that may be strided and come in stacks of B."""
    pointers, how = grouping
    K, m, n = W.shape[0], x.shape[1], out.shape[1]
    sides = x.shape[0] // B
    blocks = cdiv(B, config["BLOCK_B"] // sides) + (0 if how["GROUPING"] == "none" else K)
    with on_device(x):
        _grouped_matmul_kernel[(blocks, cdiv(n, config["BLOCK_N"]))](
            x, W, *pointers, x if scale is None else scale, x if beta is None else beta,
            x if mean is None else mean, out, B, K, m, n, 1 if transpose else n, m if transpose else 1,
            x.stride(0), out.stride(0),
            LEAST=least, SIDES=sides, HAS_SCALE=scale is not None, HAS_BETA=beta is not None,
            MEAN_IN=mean_in, MEAN_OUT=mean_out, SPLIT=split, PRECISION=precision(W, m), **how, **config,
        )  # fmt: skip


def grouped_matmul(
    x: torch.Tensor, W: torch.Tensor, index: torch.Tensor | None, beta: torch.Tensor | None,
    mean: torch.Tensor | None, transpose: bool,
) -> torch.Tensor:  # fmt: skip
    """x (B, m), W (K, m, n) or, if ``transpose``, (K, n, m) -> (B, n): beta (x - mean) W + mean of the group."""
    if _interpreted_bf16(x):
        return grouped_matmul(x.float(), W.float(), index, beta, _upcast(mean), transpose).bfloat16()
    given = mean is not None
    return _matmul(x, W, index, None, beta, mean, transpose, mean_in=given, mean_out=given, dtype=x.dtype)


def low_rank_project(
    x: torch.Tensor, U: torch.Tensor, s: torch.Tensor, index: torch.Tensor | None, mean: torch.Tensor | None
) -> torch.Tensor:
    """x (B, d), U (K, d, r), s (K, r), mean (K, d) or None -> (B, d): U (s * U^T (x - mean)) + mean."""
    if _interpreted_bf16(x):
        return low_rank_project(x.float(), U.float(), s, index, _upcast(mean)).bfloat16()
    B, d = x.shape
    K, _, r = U.shape
    given = mean is not None
    gpu = chip(x.device)
    if r > (MAX_RANK[x.dtype] if gpu.halves and not gpu.few_registers else MAX_RANK_ELSEWHERE):
        inner = _matmul(x, U, index, s, None, mean, False, mean_in=given, mean_out=False, dtype=torch.float32)
        return _matmul(inner, U, index, None, None, mean, True, mean_in=False, mean_out=given, dtype=x.dtype)
    out = torch.empty((B, d), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    pointers, grouping = _grouping(x, index, K)
    config = low_rank_config(x.dtype, r, gpu, given, B // K)
    half = x.dtype != torch.float32
    with on_device(x):
        _low_rank_project_kernel[(cdiv(B, config["BLOCK_B"]) + (0 if index is None else K),)](
            x, U, s, *pointers, mean if given else x, out, B, K, d, r,
            HAS_MEAN=given, SPLIT_X=half and given, SPLIT_R=half, PRECISION=precision(x, d), **grouping, **config,
        )  # fmt: skip
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None, groups: int) -> torch.Tensor:
    """a (B, m), b (B, n) -> (K, m, n): the sum of a_b b_b^T over the rows of each group, in ascending order."""
    if _interpreted_bf16(a):
        return grouped_outer(a.float(), b.float(), index, groups).bfloat16()
    B, m = a.shape
    n = b.shape[1]
    out = torch.empty((groups, m, n), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    order, offsets = (a, a) if index is None else _sorted(index, groups)
    config = outer_config(a.dtype, m, n, chip(a.device))
    grid = (groups, cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]))
    with on_device(a):
        _grouped_outer_kernel[grid](
            a, b, order, offsets, out, B, m, n,
            HAS_INDEX=index is not None, PRECISION=precision(a, 1), **config,  # a group may have a single row
        )  # fmt: skip
    return out
