"""The value of ``drrho_loss`` and its gradients: what lies between the sweeps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._calls import step
from clipsteer.ops._dispatch import call
from clipsteer.ops._steps import cast_to, contiguous
from clipsteer.ops._sweeps import Pairs, in_one_call, keeps


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


def _beside(
    x: Tensor,  # (B, d)
    reference: Tensor,  # (B, r)
    negative: bool,
) -> Tensor:  # (B, d + r)
    return torch.cat([x, -reference if negative else reference], 1)


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
    d = image.shape[1]
    rows = image
    cols = text
    if ref_image is not None and ref_text is not None:
        rows = step(_beside, image, ref_image, True)
        cols = step(_beside, text, ref_text, False)
    if in_one_call(backend, world):
        past = None if u is None else contiguous(cast_to(u, wide))
        keep = any(needs) and keeps(rows, rows.shape[0], rows.shape[1])
        given = (contiguous(rows), contiguous(cols), tau, past, gamma, eps, rho, d, keep)
        return call(backend, "drrho_loss", *given, *needs)
    pairs = Pairs(rows, cols, tau.reciprocal(), backend, world)
    B = pairs.columns
    lse, kept = pairs.log_sums(any(needs) and keeps(rows, B, rows.shape[1]))
    u, _ = averaged(lse - log_of(B, lse), u, gamma, eps)
    total = u.double().sum()
    if world is not None:
        total = world.sum_(total)
    mean = total / (2 * B) + rho
    loss = (tau.double() * mean).to(wide)
    none = image.new_empty(0, dtype=wide)
    if not any(needs):
        return loss, u, none, none, none
    own = -(lse - u).exp().sum(0)  # (M,): what the other pairs' weights make of a pair's own
    d_rows, d_cols, moment = pairs.gradients(u, own, kept, d, needs)
    d_tau = mean - moment / (2 * B * B)
    return loss, u, d_rows, d_cols, d_tau.to(wide)
