"""Training losses of the sparse autoencoder, as sums over this process's rows that add up to the
loss of all.

Statistics of the batch (mean, total variance) are those of the joint batch of all processes, so
summing the gradients gives exactly the gradient of one process that holds every row.
Sources: Joseph et al. 2025 (arXiv 2504.08729) for relu, Gao et al. 2024 (2406.04093) for FVU and
    AuxK.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops
from clipsteer.sae.architectures import batch_count
from clipsteer.sae.model import SAE, SAEOutput
from clipsteer.sae.selection import joint_largest
from clipsteer.training.world import World


class BatchStats(NamedTuple):
    """What the losses divide by: the joint batch's rows, each row's distance from their mean, the
    total variance."""

    count: int  # type: ignore[assignment]  # a tuple's method is called so, too
    distance: Tensor  # (B,) ‖x - mean‖ of this process's rows
    total_variance: Tensor  # () Σ ‖x - mean‖² over all processes


@torch.no_grad()
def batch_stats(x: Tensor, world: World) -> BatchStats:
    """Statistics of the joint batch; x (B, d) is this process's share of it."""
    count = sum(world.counts(len(x)))
    mean = world.sum_(x.sum(0)) / count
    distance = torch.linalg.vector_norm(x - mean, dim=-1)
    # identical rows have no variance: tiny keeps a perfect reconstruction at 0 instead of NaN
    tiny = torch.finfo(x.dtype).tiny
    total = world.sum_(distance.square().sum()).clamp_min(tiny)
    return BatchStats(count, distance.clamp_min(tiny), total)


def fvu(x: Tensor, x_hat: Tensor, stats: BatchStats) -> Tensor:
    """Of rows (B, d) the fraction of variance unexplained: Σ ‖x̂ - x‖² / Σ ‖x - mean‖²."""
    return (x_hat - x).square().sum() / stats.total_variance


def scaled_mse(x: Tensor, x_hat: Tensor, stats: BatchStats) -> Tensor:
    """Of rows (B, d) the mean over tokens and dimensions of (x̂ - x)² / ‖x - mean‖₂ (Joseph et al.
    2025: the norm, not its square)."""
    per_token = (x_hat - x).square().sum(-1) / stats.distance
    return per_token.sum() / (stats.count * x.shape[-1])


def l1(acts: Tensor, stats: BatchStats) -> Tensor:
    """Mean over tokens of ‖f‖₁; acts (B, d_sae)."""
    return acts.abs().sum() / stats.count


def auxk(
    sae: SAE,
    x: Tensor,  # (B, d_in)
    out: SAEOutput,
    stats: BatchStats,
    dead: Tensor,  # (n_dead,) int64, not empty
    sparse_grad: bool = False,
    number: int | None = None,
) -> Tensor:
    """AuxK: how much of the residual x - x̂ the dead features leave, over the total variance.

    The k_aux = min(d_in / 2, n_dead) largest of the dead features decode the residual, without
    b_dec and in x's own scale; with fewer than d_in / 2 dead features the loss shrinks in
    proportion. The residual is a constant; the gradient reaches encoder and decoder of the dead
    features, as rows alone if ``sparse_grad``. ``number``: n_dead of all processes, where each has
    a part of the features, and then this one's may be none.
    """
    half = max(sae.d_in // 2, 1)
    number = len(dead) if number is None else number
    k = min(half, number)
    centred, _ = sae._centred(x)
    W_enc = F.embedding(dead, sae.W_enc, sparse=sparse_grad)  # (n_dead, d_in)
    W_dec = F.embedding(dead, sae.W_dec, sparse=sparse_grad)
    codes = sae._ops.topk_encode(centred, W_enc, sae.b_enc[dead], k=k)
    ragged = isinstance(codes, ops.SparseCodes)
    decode = sae._ops.ragged_decode if ragged else sae._ops.sparse_decode
    guess = decode(*codes, W_dec)  # (B, d_in)
    if out.stats.scale is not None:
        guess = guess * out.stats.scale
    residual = (x - out.x_hat).detach()
    left = (guess.to(x.dtype) - residual).square().sum() / stats.total_variance
    return left * min(number / half, 1.0)


def forward(sae: SAE, x: Tensor, world: World, sparse_grad: bool = False) -> SAEOutput:
    """The SAE's forward pass in training mode; batch_topk selects over the joint batch of all
    processes, and its acts and indices are those of ragged codes (m,)."""
    if sae.architecture not in ("topk", "batch_topk"):
        return sae(x, sparse_grad=sparse_grad)
    centred, stats = sae._centred(x)
    if sae.architecture == "topk":
        codes = sae._topk_encode(centred, sparse_grad)
    else:
        codes = _batch_codes(sae, centred, world, sparse_grad)
    x_hat = sae.decode(codes, stats, sparse_grad=sparse_grad)
    return SAEOutput(x_hat.to(x.dtype), codes[0], codes[1], stats)


def _batch_codes(
    sae: SAE,
    centred: Tensor,  # (B, d_in)
    world: World,
    sparse_grad: bool,
) -> ops.SparseCodes:
    """The largest of the joint batch, those of this process."""
    count = batch_count(cast(float, sae.k), sum(world.counts(len(centred))))
    codes = sae.batch_codes(centred, count, sparse_grad)
    if world.size > 1:
        codes = codes._replace(values=joint_largest(codes, count, world))
    with torch.no_grad():
        acts = codes.values
        least = torch.where(acts > 0, acts, torch.inf).amin()
        sae._update_threshold(world.min_(least.reshape(1)))
    return codes


@torch.no_grad()
def fired(sae: SAE, out: SAEOutput, world: World) -> Tensor:
    """(d_sae,) bool: features active on some row of the joint batch."""
    if out.indices is None:
        hits = (out.acts > 0).reshape(-1, sae.d_sae).any(0).to(torch.int32)
    else:
        # inactive slots go to a spare cell, so that no write depends on the order of another
        hits = torch.zeros(sae.d_sae + 1, dtype=torch.int32, device=out.acts.device)
        hits.index_fill_(0, torch.where(out.acts > 0, out.indices, sae.d_sae).reshape(-1), 1)
        hits = hits[:-1]
    return world.sum_(hits) > 0
