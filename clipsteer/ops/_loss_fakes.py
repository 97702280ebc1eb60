"""Shapes of what the low-level ops of the contrastive losses return, without computing."""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------- drrho_loss


def _stride(N: int) -> int:
    """Of a row of similarities: whole panels and a line; see row_stride in contrastive.h."""
    return (N + 63) // 64 * 64 + 16


def drrho_sums(
    rows: Tensor,
    cols: Tensor,
    diag: Tensor,
    scale: Tensor,
    offset: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    M = rows.shape[0]
    N = cols.shape[0]
    kept = diag.new_empty(M if keep else 0, _stride(N))
    return diag.new_empty(M), diag.new_empty(N), kept


def _of_sides(
    like: Tensor,
    rows: Tensor,
    cols: Tensor,
    width: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of columns; of none where they are not needed."""
    M = rows.shape[0] if need_rows else 0
    N = cols.shape[0] if need_cols else 0
    return like.new_empty(M, width), like.new_empty(N, width)


def drrho_grad(
    rows: Tensor,
    cols: Tensor,
    diag: Tensor,
    scale: Tensor,
    offset: int,
    row_u: Tensor,
    col_u: Tensor,
    own: Tensor,
    kept: Tensor,
    width: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_of_sides(diag, rows, cols, width, need_rows, need_cols), diag.new_empty(())


# ---------------------------------------------------------------- siglip_loss, distill_loss


def siglip_sweep(
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sides = _of_sides(scale, rows, cols, rows.shape[1], need_rows, need_cols)
    return scale.new_empty(3), *sides


def distill_sums(
    rows: Tensor,
    cols: Tensor,
    diag: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_cols: Tensor,
    teacher_diag: Tensor,
    teacher_scale: Tensor,
    offset: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_lse, col_lse, kept = drrho_sums(rows, cols, diag, scale, offset, keep)
    M = row_lse.shape[0]
    N = col_lse.shape[0]
    return diag.new_empty(4, M), diag.new_empty(4, N), kept, torch.empty_like(kept)


def distill_grad(
    rows: Tensor,
    cols: Tensor,
    diag: Tensor,
    scale: Tensor,
    teacher_rows: Tensor,
    teacher_cols: Tensor,
    teacher_diag: Tensor,
    teacher_scale: Tensor,
    offset: int,
    row_u: Tensor,
    col_u: Tensor,
    own: Tensor,
    factors: Tensor,
    kept: Tensor,
    teacher_kept: Tensor,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor]:
    return _of_sides(diag, rows, cols, rows.shape[1], need_rows, need_cols)


# ---------------------------------------------------------------- whole contrastive losses


def drrho_loss(
    rows: Tensor,
    cols: Tensor,
    tau: Tensor,
    u: Tensor | None,
    gamma: float,
    eps: float,
    rho: float,
    width: int,
    keep: bool,
    need_rows: bool,
    need_cols: bool,
    need_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sides = _of_sides(tau, rows, cols, width, need_rows, need_cols)
    return tau.new_empty(()), tau.new_empty(2, rows.shape[0]), *sides, tau.new_empty(())


def contrast_grad(
    grad: Tensor,
    image: Tensor,
    scale: Tensor | None,
    count: int,
    d_image: Tensor,
    d_text: Tensor,
    d_scale: Tensor,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = (image.new_empty(d_image.shape), image.new_empty(d_text.shape))
    return *sides, grad.new_empty(()), grad.new_empty(())


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    keep: bool,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = _of_sides(scale, image, text, image.shape[1], need_image, need_text)
    return scale.new_empty(()), *sides, scale.new_empty(())


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sides = _of_sides(scale, image, text, image.shape[1], need_image, need_text)
    return scale.new_empty(()), *sides, scale.new_empty(()), scale.new_empty(())


def distill_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    keep: bool,
) -> tuple[Tensor, ...]:
    B = image.shape[0]
    kept = scale.new_empty(B if keep else 0, _stride(B))
    shapes = ((), (), (2, 2, B), (2, 2, B), (2,), (B,), (B,))
    return *(scale.new_empty(shape) for shape in shapes), kept, torch.empty_like(kept)


def distill_loss_grad(
    contrastive: Tensor,
    distill: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    u: Tensor,
    others: Tensor,
    d_scales: Tensor,
    diag: Tensor,
    teacher_diag: Tensor,
    kept: Tensor,
    teacher_kept: Tensor,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sides = _of_sides(image, image, text, image.shape[1], need_image, need_text)
    return *sides, scale.new_empty(())
