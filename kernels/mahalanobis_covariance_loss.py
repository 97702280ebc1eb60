"""The loss over pairs of a class: rows are whitened by the grouped products of ``conceptor_project``; here are the
distances and what they do to the whitened rows.

A program has a block of rows of one class and goes through all rows of the class in tiles, sums of squared differences
first, then each row's pull, in a fixed order and without atomics. Nothing synchronises: the grid has its static bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import cdiv, interpreted, next_power_of_2, on_device
from .conceptor_project import _block, _interpreted_bf16, _matmul, _sorted


@triton.jit
def _square_distances(
    y_ptr, w_ptrs, rows, live, partners, exists, n,
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
            term *= tl.load(w_ptrs + k, mask=k < n, other=0.0)[None, None, :]
        square += tl.sum(term, axis=2)
    return tl.where(square < 0, 0.0, square), square < 0


@triton.jit(do_not_specialize=["B", "C"])
def _mahalanobis_covariance_loss_kernel(
    new_ptr, old_ptr, w_ptr, order_ptr, offsets_ptr, loss_ptr, pull_ptr, B, C, n,
    HAS_WEIGHTS: tl.constexpr, NEED_GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, rows, live = _block(tl.program_id(0), order_ptr, offsets_ptr, B, C, True, BLOCK_B, BLOCK_K)
    if tl.max(live.to(tl.int32), axis=0) > 0:
        w_ptrs = w_ptr + group.to(tl.int64) * n
        total = tl.zeros((BLOCK_B,), dtype=tl.float32)
        stop = tl.load(offsets_ptr + group + 1)
        for at in range(tl.load(offsets_ptr + group), stop, BLOCK_J):
            place = at + tl.arange(0, BLOCK_J)
            exists = place < stop
            partners = tl.load(order_ptr + place, mask=exists, other=0)
            square, below = _square_distances(
                new_ptr, w_ptrs, rows, live, partners, exists, n, HAS_WEIGHTS, BLOCK_B, BLOCK_J, BLOCK_N
            )
            square_old, _ = _square_distances(
                old_ptr, w_ptrs, rows, live, partners, exists, n, HAS_WEIGHTS, BLOCK_B, BLOCK_J, BLOCK_N
            )
            distance = tl.sqrt(square + 1e-8)
            change = distance - tl.sqrt(square_old + 1e-8)
            pair = live[:, None] & exists[None, :] & (rows[:, None] != partners[None, :])
            # rows of a class are in ascending order
            total += tl.sum(tl.where(pair & (rows[:, None] < partners[None, :]), tl.abs(change), 0.0), axis=1)
            if NEED_GRAD:
                sign = tl.where(change > 0, 1.0, tl.where(change < 0, -1.0, change))
                strength = tl.where(pair & (below == 0), sign / (distance * B), 0.0)
                for start in range(0, n, BLOCK_N):
                    k = start + tl.arange(0, BLOCK_N)
                    inside = live[:, None] & (k < n)[None, :]
                    here = rows[:, None] * n + k[None, :]
                    a = tl.load(new_ptr + here, mask=inside, other=0.0)
                    b = tl.load(
                        new_ptr + partners[:, None] * n + k[None, :], mask=exists[:, None] & (k < n)[None, :], other=0.0
                    )
                    pull = tl.sum(strength[:, :, None] * (a[:, None, :] - b[None, :, :]), axis=1)
                    tl.store(pull_ptr + here, tl.load(pull_ptr + here, mask=inside, other=0.0) + pull, mask=inside)
        tl.store(loss_ptr + rows, total, mask=live)


def pairs_config(n: int) -> dict[str, int]:
    """A tile of differences lives in registers: rows × partners × columns."""
    if interpreted(_mahalanobis_covariance_loss_kernel):
        return {"BLOCK_B": 32, "BLOCK_J": 32, "BLOCK_N": min(128, max(16, next_power_of_2(n))), "BLOCK_K": 16}
    return {"BLOCK_B": 16, "BLOCK_J": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}


def mahalanobis_covariance_loss(
    new: torch.Tensor, old: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor, s: torch.Tensor | None,
    diag: torch.Tensor | None, normalize: bool, need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """new, old (B, d), labels (B,), factor (C, d, r), s (C, r), diag (C, d) -> loss (), d_new (B, d) in float32."""
    (B, d), C = new.shape, factor.shape[0]
    d_new = torch.zeros((B if need_grad else 0, d), dtype=torch.float32, device=new.device)
    if B == 0:
        return torch.zeros((), dtype=torch.float32, device=new.device), d_new
    if _interpreted_bf16(factor):
        factor = factor.float()
    index = torch.where((labels >= 0) & (labels < C), labels, -1)
    order, offsets = _sorted(index, C)
    group = index.clamp(min=0)
    paired = ((index >= 0) & (offsets.diff()[group] > 1)).unsqueeze(1)
    index = torch.where(paired.squeeze(1), index, -1)  # rows without a partner take no part in the products
    origin = order[offsets[:-1].clamp(max=B - 1)][group]  # the first row of a row's class
    weights = None if s is None else torch.cat([diag, s], 1).float()

    def whitened(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        norm = None
        if normalize:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
            norm = torch.where(norm > 0, norm, torch.inf)
        unit = x.double() if norm is None else x.double() / norm
        centred = (unit - unit[origin]).float()
        z = _matmul(centred, factor, index, None, None, None, False, mean_in=False, mean_out=False, dtype=torch.float32)
        return z if s is None else torch.cat([centred, z], 1), norm, unit

    y, norm, unit = whitened(new)
    before, _, _ = whitened(old)
    n = y.shape[1]
    parts = torch.zeros(B, dtype=torch.float32, device=new.device)
    pull = torch.zeros_like(y) if need_grad else y
    order, offsets = _sorted(index, C)
    config = pairs_config(n)
    with on_device(new):
        _mahalanobis_covariance_loss_kernel[(cdiv(B, config["BLOCK_B"]) + C,)](
            y, before, y if weights is None else weights, order, offsets, parts, pull, B, C, n,
            HAS_WEIGHTS=weights is not None, NEED_GRAD=need_grad, **config,
        )  # fmt: skip
    loss = (parts.double().sum() / B).float()
    if not need_grad:
        return loss, d_new
    if weights is not None:
        pull = pull * weights[group]
    inner = pull if s is None else pull[:, d:].contiguous()
    g = _matmul(inner, factor, index, None, None, None, True, mean_in=False, mean_out=False, dtype=torch.float32)
    g = (g if s is None else g + pull[:, :d]).double()
    if norm is not None:
        g = (g - unit * (unit * g).sum(-1, keepdim=True)) / norm
    return loss, torch.where(paired, g, 0).float()
