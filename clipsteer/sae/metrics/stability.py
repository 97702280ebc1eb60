"""Stability: do SAEs of other seeds learn the same features?

    the assignment of one SAE's features to the other's that makes the cosines of their decoder rows
    largest (the Hungarian method); value: the mean cosine

Beside it stands the same for random rows in place of the other SAE's, drawn with the second moments
of its rows: high-dimensional rows match at chance too, the more so where they lie in few
directions. Sources: Fel et al. 2025 (arXiv 2502.12892), Paulo & Belrose 2025 (2501.16615).

No image has a part in it: the interval is over features (blocks of the first SAE's, the assignment
as it is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.sae.metrics.estimate import Estimate, blocks_of, of_sums, sizes_of, sums_by
from clipsteer.sae.model import SAE


def matched_cosines(
    a: Tensor,  # (n, d)
    b: Tensor,  # (m, d), m >= n
) -> Tensor:
    """(n,) float64: the cosine of every row of a with the row of b that it is assigned to.

    Raises RuntimeError without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise RuntimeError(
            "stability: matching features needs scipy (pip install scipy); leave 'stability' out "
            "of metrics"
        ) from error
    cosines = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
    found = cosines.cpu().numpy()
    rows, columns = linear_sum_assignment(found, maximize=True)
    order = torch.from_numpy(rows).argsort()
    return torch.from_numpy(found[rows, columns]).double()[order]


def _random_like(rows: Tensor, seed: int) -> Tensor:
    """Gaussian rows with the second moments of these."""
    n, d = rows.shape
    # rows = U S Vᵀ: of Z S Vᵀ / √n the second moments are rowsᵀ rows / n
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, len(s), generator=generator, dtype=torch.float64)
    return (z * s) @ vh / math.sqrt(n)


@torch.no_grad()
def seed_stability(sae: SAE, others: Sequence[SAE], *, seed: int = 0) -> Estimate:
    """Mean matched cosine of an SAE's features with those of others, the mean over these; details:
    of each and of random rows, and the share of features that are matched above 0.7.

    Raises ValueError for none, or one that gives rows of another width.
    """
    if not others:
        raise ValueError("stability: needs at least one other SAE")
    own = sae.W_dec.detach().cpu()
    matched, random = [], []
    for other in others:
        theirs = other.W_dec.detach().cpu()
        if theirs.shape[1] != own.shape[1]:
            raise ValueError(
                f"stability: decoder rows of width {own.shape[1]} and {theirs.shape[1]} have no "
                f"cosine; the SAEs must be of one place in one tower"
            )
        small, large = (own, theirs) if len(own) <= len(theirs) else (theirs, own)
        matched.append(matched_cosines(small, large))
        rows = F.normalize(_random_like(F.normalize(theirs.float(), dim=1), seed), dim=1)
        small, large = (own, rows) if len(own) <= len(rows) else (rows, own)
        random.append(matched_cosines(small, large))
    every = torch.cat(matched)
    numbers = torch.cat([torch.arange(len(part)) for part in matched])
    block = blocks_of(numbers, seed)
    sizes = sizes_of(block)
    above = sums_by(block, every, len(sizes))
    value, low, high = of_sums(above, torch.tensor(sizes), sizes)
    details = {
        "each": [float(part.mean()) for part in matched],
        "random": [float(part.mean()) for part in random],
        "above_0.7": float((every > 0.7).double().mean()),
        "interval": "features",
    }
    return Estimate(value, low, high, len(every), "features", details)
