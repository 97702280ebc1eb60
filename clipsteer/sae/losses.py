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
from clipsteer.sae.encoding import Codes, Encoded, indices_of, takes_codes, values_of
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
    codes: Codes  # as ``SAE.decode`` takes them
    gate: Tensor | None  # of acts' shape (``Encoded``)
    x_hats: Tensor  # (G, B, d_in), of every prefix (``SAE.decode_prefixes``); the last is x_hat


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


def l1(
    acts: Tensor,  # of any shape, as many as there are
    stats: BatchStats,
    norms: Tensor | None = None,  # of acts' shape, or (d_sae,)
) -> Tensor:
    """Mean over tokens of ‖f‖₁, or of Σ |f_i| ‖W_dec,i‖ with the norms of the decoder's rows."""
    sizes = acts.abs() if norms is None else acts.abs() * norms
    return sizes.sum() / stats.count


def tanh_l0(acts: Tensor, stats: BatchStats, norms: Tensor | None = None) -> Tensor:
    """Mean over tokens of Σ tanh(4 f_i ‖W_dec,i‖), a smooth L0; decoder rows of norm 1 need no
    ``norms`` (SAELens, after Anthropic's update of January 2025)."""
    sizes = acts if norms is None else acts * norms
    return torch.tanh(4 * sizes).sum() / stats.count


def auxk(
    sae: SAE,
    x: Tensor,  # (B, d_in)
    out: SAEOutput | TrainingOutput,
    stats: BatchStats,
    dead: Tensor,  # (n_dead,) int64, not empty
    sparse_grad: bool = False,
    target: Tensor | None = None,  # (B, d_out) for a transcoder
) -> Tensor:
    """AuxK: how much of the residual x - x̂ the dead features leave, over the total variance; of
    gated by its gates. With prefixes x̂ is that of all features; of a transcoder the residual is
    that of its target, and d_out takes the place of d_in.

    The k_aux = min(d_in / 2, n_dead) largest of the dead features decode the residual, without
    b_dec and in x's own scale; with fewer than d_in / 2 dead features the loss shrinks in
    proportion. The residual is a constant; the gradient reaches encoder and decoder of the dead
    features, as rows alone if ``sparse_grad``.
    """
    half = max(sae.W_dec.shape[1] // 2, 1)
    k = min(half, len(dead))
    centred, _ = sae._centred(x)
    acts, indices = ops.topk_encode(  # (B, k) each
        centred, sae.W_enc, sae.encoder_bias, k=k, columns=dead, sparse_grad=sparse_grad
    )
    guess = ops.sparse_decode(acts, indices, sae.W_dec, sparse_grad=sparse_grad)  # (B, d_in)
    if out.stats.scale is not None:
        guess = guess * out.stats.scale
    residual = ((x if target is None else target) - out.x_hat).detach()
    left = (guess.to(x.dtype) - residual).square().sum() / stats.total_variance
    return left * min(len(dead) / half, 1.0)


def forward(
    sae: SAE,
    x: Tensor,  # (B, d_in)
    world: World,
    sparse_grad: bool = False,
    bandwidth: float | Tensor | None = None,
) -> TrainingOutput:
    """The SAE's forward pass in training mode.

    batch_topk selects over the joint batch of all processes. relu, jumprelu and gated are encoded
    to codes unless most features are active, as they may be at first; ``bandwidth`` as in
    ``SAE.forward``.
    """
    centred, stats = sae._centred(x)
    if sae.architecture == "batch_topk":
        encoded = Encoded(_joint_codes(sae, centred, world, sparse_grad))
    else:
        dense = sae.architecture != "topk"
        dense = dense and (not takes_codes(centred) or sae.mostly_active(centred))
        encoded = sae.encoded(centred, sparse_grad and not dense, bandwidth=bandwidth, dense=dense)
    codes, gate = encoded
    x_hats = sae.with_skip(sae.decode_prefixes(codes, stats, sparse_grad=sparse_grad), x)
    acts = values_of(codes)
    return TrainingOutput(x_hats[-1], acts, indices_of(codes), stats, codes, gate, x_hats)


def _joint_codes(
    sae: SAE,
    centred: Tensor,  # (B, d_in)
    world: World,
    sparse_grad: bool,
) -> ops.SparseCodes:
    count = batch_count(cast(float, sae.k), len(centred) * world.size)
    # no process can own more than all of the kept ones
    codes = sae.batch_codes(centred, min(count, len(centred) * sae.d_sae), sparse_grad)
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


def decoder_norms(sae: SAE, out: TrainingOutput, sparse_grad: bool) -> Tensor | None:
    """Norms of decoder rows as they go with ``out.acts``; None where they are all 1."""
    if sae.has_unit_rows:
        return None
    if out.indices is None:
        return torch.linalg.vector_norm(sae.W_dec, dim=-1)
    used, place = out.indices.unique(return_inverse=True)
    rows = F.embedding(used, sae.W_dec, sparse=sparse_grad)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return F.embedding(place, norms)[..., 0]


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
