"""Training losses of the sparse autoencoder, as sums over this process's rows that add up to the
loss of all.

Statistics of the batch (mean, total variance) are those of the joint batch of all processes, so
summing the gradients gives exactly the gradient of one process that holds every row.
Sources: Joseph et al. 2025 (arXiv 2504.08729) for relu, Gao et al. 2024 (2406.04093) for FVU and
    AuxK.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops
from clipsteer.sae.architectures import batch_count
from clipsteer.sae.model import SAE, SAEOutput
from clipsteer.sae.normalization import InputStats
from clipsteer.training.world import World


class BatchStats(NamedTuple):
    """What the losses divide by: the joint batch's rows, each row's distance from their mean, the
    total variance."""

    count: int  # type: ignore[assignment]  # a tuple's method is called so, too
    distance: Tensor  # (B,) ‖x - mean‖ of this process's rows
    total_variance: Tensor  # () Σ ‖x - mean‖² over all processes


class TrainingOutput(NamedTuple):
    """What a forward pass gives in training."""

    x_hat: Tensor  # (B, d_in), in x's dtype
    acts: Tensor  # (B, k) for topk; of ragged codes (m,); (B, d_sae) where encoded densely
    indices: Tensor | None  # of acts' shape, int64; None where encoded densely
    stats: InputStats  # of the input, as ``SAE.decode`` takes them
    x_hats: Tensor  # (G, B, d_in), of each prefix (``SAE.decode_prefixes``)


@torch.no_grad()
def batch_stats(x: Tensor, world: World) -> BatchStats:
    """Statistics of the joint batch; x (B, d) is this process's share, of the same B everywhere."""
    count = len(x) * world.size
    mean = world.sum_(x.sum(0)) / count
    distance = torch.linalg.vector_norm(x - mean, dim=-1)
    # identical rows have no variance: tiny keeps a perfect reconstruction at 0 instead of NaN
    tiny = torch.finfo(x.dtype).tiny
    total = world.sum_(distance.square().sum()).clamp_min(tiny)
    return BatchStats(count, distance.clamp_min(tiny), total)


def fvu(x: Tensor, x_hat: Tensor, stats: BatchStats) -> Tensor:
    """Of rows (B, d) the fraction of variance unexplained: Σ ‖x̂ - x‖² / Σ ‖x - mean‖²; the sum of
    those of reconstructions (G, B, d)."""
    return (x_hat - x).square().sum() / stats.total_variance


def scaled_mse(x: Tensor, x_hat: Tensor, stats: BatchStats) -> Tensor:
    """Of rows (B, d) the mean over tokens and dimensions of (x̂ - x)² / ‖x - mean‖₂ (Joseph et al.
    2025: the norm, not its square); the sum of those of reconstructions (G, B, d)."""
    per_token = (x_hat - x).square().sum(-1) / stats.distance
    return per_token.sum() / (stats.count * x.shape[-1])


def l1(acts: Tensor, stats: BatchStats) -> Tensor:
    """Mean over tokens of ‖f‖₁; acts (B, d_sae)."""
    return acts.abs().sum() / stats.count


def auxk(
    sae: SAE,
    x: Tensor,  # (B, d_in)
    out: SAEOutput | TrainingOutput,
    stats: BatchStats,
    dead: Tensor,  # (n_dead,) int64, not empty
    sparse_grad: bool = False,
    target: Tensor | None = None,  # (B, d_out) for a transcoder
) -> Tensor:
    """AuxK: how much of the residual x - x̂ the dead features leave, over the total variance. With
    prefixes it is the residual of all features; of a transcoder that of its target, and d_out is in
    the place of d_in.

    The k_aux = min(d_in / 2, n_dead) largest of the dead features decode the residual, without
    b_dec and in x's own scale; with fewer than d_in / 2 dead features the loss shrinks in
    proportion. The residual is a constant; the gradient reaches encoder and decoder of the dead
    features, as rows alone if ``sparse_grad``.
    """
    half = max(sae.W_dec.shape[1] // 2, 1)
    k = min(half, len(dead))
    centred, _ = sae._centred(x)
    W_enc = F.embedding(dead, sae.W_enc, sparse=sparse_grad)  # (n_dead, d_in)
    W_dec = F.embedding(dead, sae.W_dec, sparse=sparse_grad)
    acts, indices = ops.topk_encode(centred, W_enc, sae.b_enc[dead], k=k)  # (B, k) each
    guess = ops.sparse_decode(acts, indices, W_dec)  # (B, d_in)
    if out.stats.scale is not None:
        guess = guess * out.stats.scale
    residual = ((x if target is None else target) - out.x_hat).detach()
    left = (guess.to(x.dtype) - residual).square().sum() / stats.total_variance
    return left * min(len(dead) / half, 1.0)


def forward(sae: SAE, x: Tensor, world: World, sparse_grad: bool = False) -> TrainingOutput:
    """The SAE's forward pass in training mode; batch_topk selects over the joint batch of all
    processes, and its acts and indices are those of ragged codes (m,)."""
    centred, stats = sae._centred(x)
    codes: Any
    if sae.architecture == "topk":
        acts, indices = codes = sae._topk_encode(centred, sparse_grad)
    elif sae.architecture == "batch_topk":
        codes = _joint_codes(sae, centred, world, sparse_grad)
        acts, indices, _ = codes
    else:
        acts = codes = sae._dense_acts(centred)
        indices = None
    x_hats = sae.with_skip(sae.decode_prefixes(codes, stats, sparse_grad=sparse_grad), x)
    return TrainingOutput(x_hats[-1], acts, indices, stats, x_hats)


def _joint_codes(
    sae: SAE,
    centred: Tensor,  # (B, d_in)
    world: World,
    sparse_grad: bool,
) -> ops.SparseCodes:
    x = centred
    count = batch_count(cast(float, sae.k), len(x) * world.size)
    # no process can own more than all of the kept ones
    codes = sae.batch_codes(centred, min(count, len(x) * sae.d_sae), sparse_grad)
    acts = codes.values
    if world.size > 1:
        with torch.no_grad():
            every = world.gather(acts)
            threshold = torch.topk(every, min(count, len(every)), sorted=False).values.amin()
        acts = torch.where(acts >= threshold, acts, 0)
    with torch.no_grad():
        least = torch.where(acts > 0, acts, torch.inf).amin()
        sae._update_threshold(world.min_(least.reshape(1)))
    return codes._replace(values=acts)


@torch.no_grad()
def fired(sae: SAE, out: SAEOutput | TrainingOutput, world: World) -> Tensor:
    """(d_sae,) bool: features active on some row of the joint batch."""
    if out.indices is None:
        hits = (out.acts > 0).reshape(-1, sae.d_sae).any(0).to(torch.int32)
    else:
        # inactive slots go to a spare cell, so that no write depends on the order of another
        hits = torch.zeros(sae.d_sae + 1, dtype=torch.int32, device=out.acts.device)
        hits.index_fill_(0, torch.where(out.acts > 0, out.indices, sae.d_sae).reshape(-1), 1)
        hits = hits[:-1]
    return world.sum_(hits) > 0
