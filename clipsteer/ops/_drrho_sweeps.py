"""The two sweeps over similarities that ``drrho_loss`` consists of, and what lies between them.

The first takes the log-sums of rows and columns, which give u; the second takes the weights, which
give the gradients. Both have a block of rows against all columns, so that several processes can
share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._dispatch import call

# Similarities are kept between the two sweeps on a CPU while they take no more than so many copies
# of the features.
KEEP = 2


def averaged(
    log_G: Tensor,  # (2, B)
    past: Tensor | None,  # (2, B)
    gamma: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """u, and the share γ of this batch in it, which is 1 at a first visit: both (2, B)."""
    log_G = torch.logaddexp(log_G, torch.full_like(log_G, eps).log())
    past = torch.full_like(log_G, torch.nan) if past is None else past.to(log_G.dtype)
    share = torch.where(past.isnan(), 1.0, torch.full_like(past, gamma))
    kept = past.nan_to_num(0.0) + (1 - share).log()
    return torch.logaddexp(kept, log_G + share.log()), share


def log_of(B: int, like: Tensor) -> float | Tensor:
    """log B."""
    if torch.compiler.is_exporting():  # where math.log makes a number of a symbol
        count = torch.full((), B, dtype=torch.float64, device=like.device)
        return count.log().to(like.dtype)
    return math.log(B)


def _plain_sides(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
) -> tuple[Tensor, Tensor]:
    """t (M, N), image and text side; row m is the partner of column offset + m, where t is -inf."""
    S = rows.to(diag.dtype) @ cols.to(diag.dtype).T
    own = torch.zeros_like(S, dtype=torch.bool)
    own.diagonal(offset).fill_(True)
    image = (S - diag[offset : offset + len(rows)].unsqueeze(1)) * scale
    text = (S - diag) * scale
    return image.masked_fill(own, -torch.inf), text.masked_fill(own, -torch.inf)


def _plain_sums(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ exp t of every row (M,), and of every column over the rows here (N,)."""
    image, text = _plain_sides(rows, cols, diag, scale, offset)
    return image.logsumexp(1), text.logsumexp(0), image[:0]


def _plain_grad(
    rows: Tensor,  # (M, D)
    cols: Tensor,  # (N, D)
    diag: Tensor,  # (N,)
    scale: Tensor,  # ()
    offset: int,
    row_u: Tensor,  # (M,)
    col_u: Tensor,  # (N,)
    own: Tensor,  # (M,)
    kept: Tensor,  # unused: similarities are made anew
    width: int,
    need_rows: bool,
    need_cols: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """w (M, N) = exp(t − u) of both sides, own on the partners: w·cols, wᵀ·rows (their first
    ``width``), Σ w·t."""
    image, text = _plain_sides(rows, cols, diag, scale, offset)
    w_image = (image - row_u.unsqueeze(1)).exp()
    w_text = (text - col_u).exp()
    moment = (w_image * image.nan_to_num(neginf=0.0)).sum()
    moment = moment + (w_text * text.nan_to_num(neginf=0.0)).sum()
    w = w_image + w_text
    w.diagonal(offset).copy_(own)
    d_rows = w @ cols[:, :width].to(w.dtype)
    d_cols = w.T @ rows[:, :width].to(w.dtype)
    return d_rows, d_cols, moment


PLAIN: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "drrho_sums": _plain_sums,
    "drrho_grad": _plain_grad,
}


def _low_level(backend: str, op: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return PLAIN[op](*args)
    return call(backend, op, *args)


class Arguments(NamedTuple):
    """Those of ``drrho_loss``, checked; of M of the batch's rows."""

    image: Tensor  # (M, d)
    text: Tensor  # (M, d)
    ref_image: Tensor | None  # (M, r)
    ref_text: Tensor | None  # (M, r)
    tau: Tensor  # (), at least float32
    u: Tensor | None  # (2, M), without gradient
    gamma: float
    eps: float
    rho: float


def evaluate(
    arguments: Arguments,
    needs: tuple[bool, bool, bool],
    backend: str,
    world: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), u (2, M) and the gradients in image, text (both still times 2B²) and τ, each if
    needed.

    With a ``world`` the M rows are this process's share of the B, which may be of any size: every
    process has its rows against all columns, columns get what all rows say of them, and image's and
    text's gradients are complete.
    """
    image, text, ref_image, ref_text, tau, u, gamma, eps, rho = arguments
    wide = torch.promote_types(image.dtype, torch.float32)
    M = image.shape[0]
    d = image.shape[1]
    rows = image.contiguous()
    cols = text.contiguous()
    if ref_image is not None and ref_text is not None:
        rows = torch.cat([image, -ref_image], 1)
        cols = torch.cat([text, ref_text], 1)
    diag = (rows.to(wide) * cols.to(wide)).sum(1)
    scale = tau.reciprocal()
    offset = 0
    if world is not None:
        offset = world.offset
        cols = world.join(cols)
        diag = world.join(diag)
    B = cols.shape[0]
    keep = any(needs) and rows.device.type == "cpu" and not torch.compiler.is_exporting()
    # last, as it says something of B, which an exported graph would keep to
    keep = keep and KEEP * (M + B) * rows.shape[1] >= M * B
    similarities = (rows, cols, diag, scale, offset)
    row_lse, col_lse, kept = _low_level(backend, "drrho_sums", *similarities, keep)
    if world is not None:
        col_lse = world.logsumexp(col_lse)
    mine = slice(offset, offset + M)
    lse = torch.stack([row_lse, col_lse[mine]])
    u, _ = averaged(lse - log_of(B, lse), u, gamma, eps)
    col_u = u[1]
    total = u.double().sum()
    if world is not None:
        col_u = world.join(u[1])
        total = world.sum_(total)
    mean = total / (2 * B) + rho
    loss = (tau.double() * mean).to(wide)
    none = image.new_empty(0, dtype=wide)
    if not any(needs):
        return loss, u, none, none, none
    own = -(lse - u).exp().sum(0)  # (M,): what the other pairs' weights make of a pair's own
    d_rows, d_cols, moment = _low_level(
        backend,
        "drrho_grad",
        *similarities,
        u[0].contiguous(),
        col_u.contiguous(),
        own,
        kept,
        d,
        needs[0],
        needs[1],
    )
    if world is not None:
        moment = world.sum_(moment.double())
        d_cols = world.sum_(d_cols)[mine] if needs[1] else d_cols
    d_tau = mean - moment.double() / (2 * B * B)
    return loss, u, d_rows, d_cols, d_tau.to(wide)
