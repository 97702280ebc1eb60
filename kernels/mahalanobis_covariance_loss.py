"""The loss over pairs of a class, in five launches: unit rows moved by the first of their class; their products with
the class's factor, new and old in one; the distances and what they do to the whitened rows; that times the factor
again; and back through the normalisation. Norms are taken in float64, what is summed over rows in a fixed order.

Nothing is sorted, no launch waits for the host, and there are no atomics: a row counts the labels below its own to find
its place in the order of the classes, grids have their static bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, chip, interpreted, next_power_of_2, on_device
from .conceptor_project import _block, _interpreted_bf16, launch_matmul


@triton.jit
def _inverse_norm(x_ptr, rows, live, d, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / norm in float64, 0 for a row of zeros; 1 without normalisation."""
    if NORMALIZE:
        square = tl.zeros((BLOCK_B,), dtype=tl.float64)
        for start in range(0, d, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + rows[:, None] * d + j[None, :], mask=live[:, None] & (j < d)[None, :], other=0.0)
            square += tl.sum(x.to(tl.float64) * x.to(tl.float64), axis=1)
        # of a row that holds a NaN, what is finite becomes 0
        some = square > 0
        inverse = tl.where(some, 1.0 / tl.sqrt(tl.where(some, square, 1.0)), 0.0)
    else:
        inverse = tl.full((BLOCK_B,), 1.0, dtype=tl.float64)
    return inverse


@triton.jit
def _centre(
    x_ptr, y_ptr, rows, origin, live, d, y_row, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    inverse = _inverse_norm(x_ptr, rows, live, d, NORMALIZE, BLOCK_B, BLOCK_D)
    of_origin = _inverse_norm(x_ptr, origin, live, d, NORMALIZE, BLOCK_B, BLOCK_D)
    for start in range(0, d, BLOCK_D):
        j = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (j < d)[None, :]
        x = tl.load(x_ptr + rows[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
        x0 = tl.load(x_ptr + origin[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
        moved = x - x0
        if NORMALIZE:
            # a row like the first is at 0, whether or not the compiler fuses products and differences of its own accord
            part = x0 * of_origin[:, None]
            moved = tl.fma(x, inverse[:, None], -part) - tl.fma(x0, of_origin[:, None], -part)
        tl.store(y_ptr + rows[:, None] * y_row + j[None, :], moved.to(tl.float32), mask=inside)
    return inverse


@triton.jit(do_not_specialize=["B", "C"])
def _mahalanobis_centre_kernel(
    new_ptr, old_ptr, labels_ptr, y_ptr, inverse_ptr, order_ptr, offsets_ptr, parts_ptr, B, C, d, y_row,
    NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Rows of new, of old, and, past them, where each class begins. Rows without a partner keep inverse -1."""
    pid = tl.program_id(0)
    side = tl.program_id(1)
    blocks = (B + BLOCK_B - 1) // BLOCK_B
    if pid < blocks:
        at = pid * BLOCK_B + tl.arange(0, BLOCK_B)
        label = tl.load(labels_ptr + at, mask=at < B, other=-1)
        own = (label >= 0) & (label < C)
        below = tl.zeros((BLOCK_B,), dtype=tl.int32)
        earlier = tl.zeros((BLOCK_B,), dtype=tl.int32)
        count = tl.zeros((BLOCK_B,), dtype=tl.int32)
        origin = tl.zeros((BLOCK_B,), dtype=tl.int32) + B
        for start in range(0, B, SCAN):
            other = start + tl.arange(0, SCAN)
            number = tl.load(labels_ptr + other, mask=other < B, other=-1)
            same = number[None, :] == label[:, None]
            below += tl.sum(((number >= 0)[None, :] & (number[None, :] < label[:, None])).to(tl.int32), axis=1)
            earlier += tl.sum((same & (other[None, :] < at[:, None])).to(tl.int32), axis=1)
            count += tl.sum(same.to(tl.int32), axis=1)
            origin = tl.minimum(origin, tl.min(tl.where(same, other[None, :], B), axis=1))
        live = own & (count > 1)
        rows = at.to(tl.int64)
        first = tl.where(live, origin, 0).to(tl.int64)
        if side == 0:
            tl.store(order_ptr + below + earlier, at, mask=own)
            tl.store(parts_ptr + at, tl.zeros((BLOCK_B,), dtype=tl.float32), mask=at < B)
            inverse = _centre(new_ptr, y_ptr, rows, first, live, d, y_row, NORMALIZE, BLOCK_B, BLOCK_D)
            tl.store(inverse_ptr + at, tl.where(live, inverse, -1.0), mask=at < B)
        else:
            y_ptr += B.to(tl.int64) * y_row
            _centre(old_ptr, y_ptr, rows, first, live, d, y_row, NORMALIZE, BLOCK_B, BLOCK_D)
    elif side == 0:
        k = (pid - blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        begin = tl.zeros((BLOCK_C,), dtype=tl.int32)
        for start in range(0, B, SCAN):
            other = start + tl.arange(0, SCAN)
            number = tl.load(labels_ptr + other, mask=other < B, other=-1)
            begin += tl.sum(((number >= 0)[None, :] & (number[None, :] < k[:, None])).to(tl.int32), axis=1)
        tl.store(offsets_ptr + k, begin, mask=k <= C)


@triton.jit
def _square_distances(
    y_ptr, diag_ptr, s_ptr, rows, live, partners, exists, d, n,
    HAS_WEIGHTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    square = tl.zeros((BLOCK_B, BLOCK_J), dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        a = tl.load(y_ptr + rows[:, None] * n + k[None, :], mask=live[:, None] & (k < n)[None, :], other=0.0)
        b = tl.load(y_ptr + partners[:, None] * n + k[None, :], mask=exists[:, None] & (k < n)[None, :], other=0.0)
        difference = a[:, None, :] - b[None, :, :]
        term = difference * difference
        if HAS_WEIGHTS:
            term *= _weights(diag_ptr, s_ptr, k, d, n)[None, None, :]
        square += tl.sum(term, axis=2)
    return tl.where(square < 0, 0.0, square), square < 0


@triton.jit
def _weights(diag_ptr, s_ptr, k, d, n):
    diag = tl.load(diag_ptr + k, mask=k < d, other=0.0).to(tl.float32)
    return tl.where(k < d, diag, tl.load(s_ptr + (k - d), mask=(k >= d) & (k < n), other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["B", "C"])
def _mahalanobis_covariance_loss_kernel(
    y_ptr, diag_ptr, s_ptr, order_ptr, offsets_ptr, parts_ptr, pull_ptr, B, C, d, n,
    HAS_WEIGHTS: tl.constexpr, NEED_GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one class meets all rows of the class in tiles: sums of squared differences first, then each
    row's pull."""
    found, group, rows, live = _block(
        tl.program_id(0), order_ptr, order_ptr, offsets_ptr, B, C, "order", 2, 1, BLOCK_B, 1, BINS
    )
    if found:
        diag_ptr += group.to(tl.int64) * d
        s_ptr += group.to(tl.int64) * (n - d)
        old_ptr = y_ptr + B.to(tl.int64) * n
        total = tl.zeros((BLOCK_B,), dtype=tl.float32)
        first = tl.load(offsets_ptr + group)
        stop = tl.load(offsets_ptr + group + 1)
        for at in range(first, stop, BLOCK_J):
            place = at + tl.arange(0, BLOCK_J)
            exists = place < stop
            partners = tl.load(order_ptr + place, mask=exists, other=0).to(tl.int64)
            square, below = _square_distances(
                y_ptr, diag_ptr, s_ptr, rows, live, partners, exists, d, n, HAS_WEIGHTS, BLOCK_B, BLOCK_J, BLOCK_N
            )
            square_old, _ = _square_distances(
                old_ptr, diag_ptr, s_ptr, rows, live, partners, exists, d, n, HAS_WEIGHTS, BLOCK_B, BLOCK_J, BLOCK_N
            )
            distance = tl.sqrt(square + 1e-8)
            change = distance - tl.sqrt(square_old + 1e-8)
            pair = live[:, None] & exists[None, :] & (rows[:, None] != partners[None, :])
            # rows of a class are in ascending order
            total += tl.sum(tl.where(pair & (rows[:, None] < partners[None, :]), tl.abs(change), 0.0), axis=1)
            if NEED_GRAD:
                sign = tl.where(change > 0, 1.0, tl.where(change < 0, -1.0, change))
                strength = tl.where(pair & (below == 0), sign / (distance * B), 0.0)
                # by rows, as triton 3.9 interprets a comparison of two numbers as an int32
                further = tl.zeros((BLOCK_B,), dtype=tl.int32) + at > first
                for start in range(0, n, BLOCK_N):
                    k = start + tl.arange(0, BLOCK_N)
                    inside = live[:, None] & (k < n)[None, :]
                    here = rows[:, None] * n + k[None, :]
                    a = tl.load(y_ptr + here, mask=inside, other=0.0)
                    b = tl.load(
                        y_ptr + partners[:, None] * n + k[None, :], mask=exists[:, None] & (k < n)[None, :], other=0.0
                    )
                    pull = tl.sum(strength[:, :, None] * (a[:, None, :] - b[None, :, :]), axis=1)
                    if HAS_WEIGHTS:
                        # what nothing pulls at stays 0 under an infinite weight too
                        pull = tl.where(pull == 0, 0.0, pull * _weights(diag_ptr, s_ptr, k, d, n)[None, :])
                    pull += tl.load(pull_ptr + here, mask=inside & further[:, None], other=0.0)
                    tl.store(pull_ptr + here, pull, mask=inside)
        tl.store(parts_ptr + rows, total, mask=live)


@triton.jit(do_not_specialize=["B"])
def _mahalanobis_finish_kernel(
    new_ptr, g_ptr, pull_ptr, inverse_ptr, parts_ptr, loss_ptr, d_new_ptr, B, d, pull_row,
    ADD: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The loss, by the first program; the gradient through x / norm, by the others."""
    if tl.program_id(0) == 0:
        total = tl.zeros((BLOCK_S,), dtype=tl.float64)
        for start in range(0, B, BLOCK_S):
            at = start + tl.arange(0, BLOCK_S)
            total += tl.load(parts_ptr + at, mask=at < B, other=0.0).to(tl.float64)
        tl.store(loss_ptr, (tl.sum(total, axis=0) / B).to(tl.float32))
    else:
        at = (tl.program_id(0) - 1) * BLOCK_B + tl.arange(0, BLOCK_B)
        rows = at.to(tl.int64)
        inverse = tl.load(inverse_ptr + at, mask=at < B, other=-1.0)
        live = inverse >= 0
        dot = tl.zeros((BLOCK_B,), dtype=tl.float64)
        for start in range(0, d if NORMALIZE else 0, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            inside = live[:, None] & (j < d)[None, :]
            g = _gradient(g_ptr, pull_ptr, rows, j, inside, d, pull_row, ADD)
            x = tl.load(new_ptr + rows[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
            dot += tl.sum(x * inverse[:, None] * g, axis=1)
        for start in range(0, d, BLOCK_D):
            j = start + tl.arange(0, BLOCK_D)
            inside = live[:, None] & (j < d)[None, :]
            g = _gradient(g_ptr, pull_ptr, rows, j, inside, d, pull_row, ADD)
            if NORMALIZE:
                x = tl.load(new_ptr + rows[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
                g = (g - x * (inverse * dot)[:, None]) * inverse[:, None]
            g = tl.where(live[:, None], g, 0.0).to(tl.float32)
            tl.store(d_new_ptr + rows[:, None] * d + j[None, :], g, mask=(at < B)[:, None] & (j < d)[None, :])


@triton.jit
def _gradient(g_ptr, pull_ptr, rows, j, inside, d, pull_row, ADD: tl.constexpr):
    g = tl.load(g_ptr + rows[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float64)
    if ADD:
        g += tl.load(pull_ptr + rows[:, None] * pull_row + j[None, :], mask=inside, other=0.0).to(tl.float64)
    return g


def rows_config(d: int) -> dict[str, int]:
    """A row a program, its columns at once."""
    if interpreted(_mahalanobis_covariance_loss_kernel):
        return {"BLOCK_B": 64, "BLOCK_D": min(128, max(16, next_power_of_2(d)))}
    return {"BLOCK_B": 1, "BLOCK_D": min(1024, max(16, next_power_of_2(d))), "num_warps": 4}


def product_config(factor: torch.Tensor, rows: int, n: int) -> dict[str, int]:
    """A block holds about the rows that a class has, so that each factor is read once, by tiles of its columns."""
    if interpreted(_mahalanobis_covariance_loss_kernel):
        return {"BLOCK_B": 64, "BLOCK_M": 128, "BLOCK_N": 256}
    deep = chip(factor.device).multiplies(factor.dtype)
    return {
        "BLOCK_B": min(32, max(16, next_power_of_2(rows))), "BLOCK_M": 64 if deep else 32,
        "BLOCK_N": min(64, max(16, next_power_of_2(n))), "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def pairs_config(rows: int, n: int) -> dict[str, int]:
    """A tile of differences lives in registers: rows × partners × columns; few rows, while few programs must fill the
    chip."""
    if interpreted(_mahalanobis_covariance_loss_kernel):
        return {"BLOCK_B": 32, "BLOCK_J": 32, "BLOCK_N": min(128, max(16, next_power_of_2(n))), "BINS": 16}
    few = (
        {"BLOCK_B": 2, "BLOCK_N": 128, "num_warps": 4}
        if rows <= 1024
        else {"BLOCK_B": 16, "BLOCK_N": 32, "num_warps": 8}
    )
    return few | {"BLOCK_J": 16, "BINS": 128, "num_stages": 2}


def mahalanobis_covariance_loss(
    new: torch.Tensor, old: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor, s: torch.Tensor | None,
    diag: torch.Tensor | None, normalize: bool, need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """new, old (B, d), labels (B,), factor (C, d, r), s (C, r), diag (C, d) -> loss (), d_new (B, d) in float32."""
    (B, d), (C, _, r) = new.shape, factor.shape
    wide = {"dtype": torch.float32, "device": new.device}
    if B == 0:
        return torch.zeros((), **wide), torch.empty((0, d), **wide)
    if _interpreted_bf16(factor):
        factor = factor.float()
    split = factor.dtype != torch.float32
    weighted = s is not None
    n = d + r if weighted else r
    # low rank keeps the centred rows beside their products
    centred = y = torch.empty((2 * B, n if weighted else d), **wide)
    z = y[:, d:]
    if not weighted:
        y = z = torch.empty((2 * B, n), **wide)
    inverse = torch.empty(B, dtype=torch.float64, device=new.device)
    numbers = torch.empty(B + C + 1, dtype=torch.int32, device=new.device)
    order, offsets = numbers[:B], numbers[B:]
    parts, loss = torch.empty(B, **wide), torch.empty((), **wide)
    by_row, block_c = rows_config(d), 32
    scan = min(1024, max(32, next_power_of_2(B)))
    blocks = cdiv(B, by_row["BLOCK_B"])
    grouping = (order, order, offsets), {"GROUPING": "order", "SCAN": 1, "BINS": 128}
    pairs = pairs_config(B, n)
    with on_device(new):
        _mahalanobis_centre_kernel[(blocks + cdiv(C + 1, block_c), 2)](
            new, old, labels, centred, inverse, order, offsets, parts, B, C, d, centred.stride(0),
            NORMALIZE=normalize, BLOCK_C=block_c, SCAN=scan, **by_row,
        )  # fmt: skip
        if r > 0:
            config = product_config(factor, 2 * B // C, r)
            launch_matmul(centred[:, :d], factor, grouping, z, B, False, config, split=split, least=2)
        pull = torch.empty((B, n), **wide) if need_grad else y
        _mahalanobis_covariance_loss_kernel[(cdiv(B, pairs["BLOCK_B"]) + C,)](
            y, diag if weighted else y, s if weighted else y, order, offsets, parts, pull, B, C, d, n,
            HAS_WEIGHTS=weighted, NEED_GRAD=need_grad, **pairs,
        )  # fmt: skip
        # storages of their own: compiled code takes an output for aligned, and g need not outlive this call
        g, d_new = (torch.empty((B if need_grad else 0, d), **wide) for _ in range(2))
        if need_grad:
            config = product_config(factor, B // C, d)
            launch_matmul(pull[:, n - r :], factor, grouping, g, B, True, config, split=split, least=2)
        _mahalanobis_finish_kernel[(1 + blocks * need_grad,)](
            new, g, pull, inverse, parts, loss, d_new, B, d, n,
            ADD=weighted, NORMALIZE=normalize, BLOCK_S=min(1024, max(32, next_power_of_2(B))), **by_row,
        )  # fmt: skip
    return loss, d_new
