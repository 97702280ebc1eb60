"""Monosemanticity: how alike the images that activate a feature are, to another tower.

    MS = Σ_{n<m} a_n a_m cos(e_n, e_m) / Σ_{n<m} a_n a_m

a is the feature's largest activation on each image, scaled to [0, 1] by its smallest and largest; e
are another tower's embeddings of the images: the SAE's own would call alike what the SAE is made
of. The sums are over all pairs of images, as (‖Σ a e‖² - Σ a²) / 2 and ((Σ a)² - Σ a²) / 2. Source:
Pach et al. 2025 (arXiv 2504.02821).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops
from clipsteer.sae.metrics.estimate import BLOCKS, Estimate, blocks_of, interval, sizes_of, sums_by
from clipsteer.sae.metrics.recorder import PooledCodes

# of the pairs' weight: below it a feature is active on one image alone, and rounding is left
_ROUNDING = 1e-6


def _weights(codes: PooledCodes) -> Tensor:
    """(m,) float64: activations scaled to [0, 1] feature by feature."""
    values = codes.values.double()
    zero = torch.zeros(codes.d_sae, dtype=torch.float64)
    peak = zero.scatter_reduce(0, codes.features, values, "amax")
    lowest = (zero + torch.inf).scatter_reduce(0, codes.features, values, "amin")
    everywhere = torch.bincount(codes.features, minlength=codes.d_sae) == len(codes.images)
    lowest = torch.where(everywhere, lowest, 0)
    width = torch.where(peak > lowest, peak - lowest, 1)
    return (values - lowest[codes.features]) / width[codes.features]


def _score(
    total: Tensor,  # (d_sae, e) Σ a e
    weight: Tensor,  # (d_sae,) Σ a
    squares: Tensor,  # (d_sae,) Σ a²
) -> Tensor:
    """(d_sae,) MS; NaN where there is no pair."""
    pairs = weight.square() - squares
    alike = torch.linalg.vector_norm(total, dim=1).square() - squares
    return torch.where(pairs > _ROUNDING * weight.square(), alike / pairs, torch.nan)


def _sums(
    codes: PooledCodes,
    unit: Tensor,  # (N, e)
) -> tuple[Tensor, ...]:
    """Σ a e, Σ a and Σ a² of every feature, a being the codes' values, in their dtype."""
    a = codes.values
    order = codes.features.argsort(stable=True)
    counts = torch.bincount(codes.features, minlength=codes.d_sae)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = ops.ragged_decode(a[order], codes.rows[order], offsets, unit)
    sums = [sums_by(codes.features, part, codes.d_sae) for part in (a, a * a)]
    return total, *(part.to(a.dtype) for part in sums)


def monosemanticity_score(
    codes: PooledCodes,
    embeddings: Tensor,  # (N, e), of any length
    *,
    seed: int = 0,
) -> Estimate:
    """Mean MS of the features that are active on two images or more; details: that of any two
    images (what a feature that fires at random gets), and quartiles.

    embeddings: of ``codes.images``, in their order.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(codes.images):
        raise ValueError(
            f"monosemanticity: embeddings must be ({len(codes.images)}, e), one of each image, got "
            f"{tuple(embeddings.shape)}"
        )
    unit = F.normalize(embeddings.cpu().double(), dim=1)
    codes = codes._replace(values=_weights(codes))
    every = _sums(codes, unit)
    scores = _score(*every)
    scored = scores[~scores.isnan()]
    value = float(scored.mean()) if len(scored) else math.nan
    block = blocks_of(codes.images, seed)
    every = tuple(part.float() for part in every)
    codes = codes._replace(values=codes.values.float())
    without = []
    for b in range(BLOCKS):
        gone = block == b
        parts = _sums(codes.of_images(gone), unit[gone].float())
        rest = _score(*(torch.sub(whole, part) for whole, part in zip(every, parts)))
        without.append(float(rest.nanmean()))
    n = len(unit)
    low, high = interval(value, without, sizes_of(block))
    details: dict[str, object] = {"images": n}
    if n > 1:
        details["any_two"] = float((unit.sum(0).square().sum() - n) / (n * (n - 1)))
    if len(scored):
        quartiles = scored.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=scored.dtype))
        details["quartiles"] = quartiles.tolist()
    return Estimate(value, low, high, len(scored), "features", details)
