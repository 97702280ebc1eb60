"""Distances over all pairs of rows: a program has a block of rows and walks over the others, so that no pair's number
leaves the chip, or a pair of concepts' blocks and a part of the rows. |a - b| and its sum are two instructions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, on_device


@triton.jit
def _distance(x_ptr, rows, cols, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """|x_i - x_j| summed over the concepts, for these rows i and j; x is (K, N)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for q in range(0, K):
        line = x_ptr + tl.cast(q, tl.int64) * N
        a = tl.load(line + rows, mask=rows < N, other=0.0).to(tl.float32)
        b = tl.load(line + cols, mask=cols < N, other=0.0).to(tl.float32)
        total += tl.abs(a[:, None] - b[None, :])
    return total


@triton.jit
def _apart(p_ptr, q_ptr, rows, cols, N, K, L, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """d_P - d_Q, and 0 where a row meets itself or none."""
    apart = _distance(p_ptr, rows, cols, N, K, BLOCK_M, BLOCK_N) - _distance(q_ptr, rows, cols, N, L, BLOCK_M, BLOCK_N)
    live = (rows < N)[:, None] & (cols < N)[None, :] & (rows[:, None] != cols[None, :])
    return tl.where(live, 0.5 * apart, 0.0)


@triton.jit(do_not_specialize=["N", "first"])
def _agreement_sums_kernel(
    p_ptr, q_ptr, image_ptr, out_ptr, N, K, L, first,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of each row the sum over those that follow it; with images over all, and over those of its image."""
    start = (first + tl.program_id(0)) * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), dtype=tl.float64)
    own = tl.zeros((BLOCK_M,), dtype=tl.float64)
    for at in range(0 if ROWS else start, N, BLOCK_N):
        cols = at + tl.arange(0, BLOCK_N)
        size = tl.abs(_apart(p_ptr, q_ptr, rows, cols, N, K, L, BLOCK_M, BLOCK_N))
        if ROWS:
            mine = tl.load(image_ptr + rows, mask=rows < N, other=0)
            theirs = tl.load(image_ptr + cols, mask=cols < N, other=0)
            own += tl.sum(tl.where(mine[:, None] == theirs[None, :], size, 0.0), axis=1).to(tl.float64)
        else:
            size = tl.where(cols[None, :] > rows[:, None], size, 0.0)
        total += tl.sum(size, axis=1).to(tl.float64)
    tl.store(out_ptr + rows, total, mask=rows < N)
    if ROWS:
        tl.store(out_ptr + N + rows, own, mask=rows < N)


@triton.jit
def _add_order(x_ptr, sign, rows, cols, N, K, out_ptr, WAY: tl.constexpr):
    for q in range(0, K):
        line = tl.cast(q, tl.int64) * N
        a = tl.load(x_ptr + line + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        b = tl.load(x_ptr + line + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        order = tl.where(a > b, sign, 0.0) - tl.where(a < b, sign, 0.0)
        # by this program alone, but by whichever of its threads; sums of integers are the same in any order
        tl.atomic_add(out_ptr + line + rows, WAY * tl.sum(order, axis=1), mask=rows < N, sem="relaxed")


@triton.jit(do_not_specialize=["N", "first"])
def _agreement_counts_kernel(
    p_ptr, q_ptr, dp_ptr, dq_ptr, N, K, L, first,
    NEED_P: tl.constexpr, NEED_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of each number of these rows, the sum of sgn(d_P - d_Q) sgn(x_i - x_j) over all j; of Q, its negative. Sums of
    integers, exact below 2^24."""
    rows = (first + tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    for at in range(0, N, BLOCK_N):
        cols = at + tl.arange(0, BLOCK_N)
        apart = _apart(p_ptr, q_ptr, rows, cols, N, K, L, BLOCK_M, BLOCK_N)
        sign = tl.where(apart > 0.0, 1.0, tl.where(apart < 0.0, -1.0, 0.0))
        if NEED_P:
            _add_order(p_ptr, sign, rows, cols, N, K, dp_ptr, 1)
        if NEED_Q:
            _add_order(q_ptr, sign, rows, cols, N, L, dq_ptr, -1)


@triton.jit(do_not_specialize=["N", "step"])
def _concept_distances_kernel(
    p_ptr, q_ptr, out_ptr, N, K, L, step,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sums of ||P_ia - P_ja| - |Q_ib - Q_jb|| for a block of concepts a and b, over rows i < j; i is one of `step`."""
    a = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    part = tl.program_id(2)
    total = tl.zeros((BLOCK_K, BLOCK_L), dtype=tl.float64)
    for i in range(part, N, step):
        own = tl.cast(i, tl.int64)
        x = tl.load(p_ptr + own * K + a, mask=a < K, other=0.0).to(tl.float32)[None, :]
        y = tl.load(q_ptr + own * L + b, mask=b < L, other=0.0).to(tl.float32)[None, :]
        for first in range(i + 1, N, TOGETHER):
            some = tl.zeros((BLOCK_K, BLOCK_L), dtype=tl.float32)
            for at in range(0, TOGETHER, BLOCK_J):
                j = first + at + tl.arange(0, BLOCK_J).to(tl.int64)[:, None]
                live = j < N
                u = tl.abs(
                    x - tl.load(p_ptr + j * K + a[None, :], mask=live & (a < K)[None, :], other=0.0).to(tl.float32)
                )
                v = tl.abs(
                    y - tl.load(q_ptr + j * L + b[None, :], mask=live & (b < L)[None, :], other=0.0).to(tl.float32)
                )
                size = tl.abs(u[:, :, None] - v[:, None, :])
                some += tl.sum(tl.where(live[:, :, None], size, 0.0), axis=0)
            total += some.to(tl.float64)
    place = out_ptr + part.to(tl.int64) * K * L + a.to(tl.int64)[:, None] * L + b[None, :]
    tl.store(place, total, mask=(a < K)[:, None] & (b < L)[None, :])


def _blocks(kernel: object, columns: int = 64) -> dict[str, int]:
    return {"BLOCK_M": 64, "BLOCK_N": columns, **({} if interpreted(kernel) else {"num_warps": 4})}


def _share(N: int, block: int, part: int, parts: int) -> tuple[int, int]:
    """The blocks of rows of a process: from which on, and how many."""
    blocks = cdiv(N, block)
    first = blocks * part // parts
    return first, blocks * (part + 1) // parts - first


def agreement_sums(
    P: torch.Tensor, P_indices: None, P_offsets: None, K: int,
    Q: torch.Tensor, Q_indices: None, Q_offsets: None, L: int,
    images: torch.Tensor | None, part: int, parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """P (N, K), Q (N, L), images (N,) or None -> () float64, and (2, N) or (2, 0) float64."""
    N, kernel = P.shape[0], _agreement_sums_kernel
    rows = torch.zeros(1 if images is None else 2, N, dtype=torch.float64, device=P.device)
    config = _blocks(kernel)
    first, count = _share(N, config["BLOCK_M"], part, parts)
    if count:
        with on_device(P):
            kernel[(count,)](
                P.T.contiguous(), Q.T.contiguous(), rows if images is None else images, rows, N, K, L, first,
                ROWS=images is not None, **config,
            )  # fmt: skip
    if images is None:
        return rows.sum(), rows.new_empty(2, 0)
    return rows[0].sum() / 2, rows


def agreement_counts(
    P: torch.Tensor, P_indices: None, P_offsets: None, K: int,
    Q: torch.Tensor, Q_indices: None, Q_offsets: None, L: int,
    part: int, parts: int, need_P: bool, need_Q: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """P (N, K), Q (N, L) -> (N, K) and (N, L) float32, with no rows where they are not needed."""
    N, kernel = P.shape[0], _agreement_counts_kernel
    wide = {"dtype": torch.float32, "device": P.device}
    dP, dQ = torch.zeros(K, N if need_P else 0, **wide), torch.zeros(L, N if need_Q else 0, **wide)
    config = _blocks(kernel, 64 if interpreted(kernel) else 32)  # signs and counts share the registers
    first, count = _share(N, config["BLOCK_M"], part, parts)
    if count and (need_P or need_Q):
        with on_device(P):
            kernel[(count,)](
                P.T.contiguous(), Q.T.contiguous(), dP, dQ, N, K, L, first, NEED_P=need_P, NEED_Q=need_Q, **config
            )  # fmt: skip
    return dP.T.contiguous(), dQ.T.contiguous()


def concept_distances(
    P: torch.Tensor, P_indices: None, P_offsets: None, K: int,
    Q: torch.Tensor, Q_indices: None, Q_offsets: None, L: int,
    images: None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """P (N, K), Q (N, L) -> (K, L) float32, and (0, L)."""
    N, kernel = P.shape[0], _concept_distances_kernel
    on_cpu = interpreted(kernel)
    config = {"BLOCK_K": 32, "BLOCK_L": 32, "TOGETHER": 64, "BLOCK_J": 64}
    if not on_cpu:
        config |= {"BLOCK_J": 4, "num_warps": 4}
    grid = cdiv(K, 32), cdiv(L, 32)
    # enough programs for any chip; a row's are as many as follow it, so rows are dealt in turn
    step = 1 if on_cpu else max(1, min(N, cdiv(2048, max(1, grid[0] * grid[1]))))
    sums = torch.zeros(step, K, L, dtype=torch.float64, device=P.device)
    if N and K and L:
        with on_device(P):
            kernel[(*grid, step)](P, Q, sums, N, K, L, step, **config)
    D = sums.sum(0) / max(N * (N - 1), 1)
    return D.float(), sums.new_empty(0, L, dtype=torch.float32)
