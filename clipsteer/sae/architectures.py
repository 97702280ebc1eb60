"""The five architectures: which there are, what they take, and batch_topk's threshold.

Sources: Gao et al. 2024 (arXiv 2406.04093) for topk, Bussmann et al. 2024 (2412.06410) for
batch_topk, Rajamanoharan et al. 2024 (2407.14435, 2404.16014) for jumprelu and gated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.sae.normalization import NORMALIZATIONS

ARCHITECTURES = ("relu", "topk", "batch_topk", "jumprelu", "gated")
# weight of the newest batch in batch_topk's running threshold
_THRESHOLD_RATE = 0.01


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"SAE: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"SAE: {name} must be at least 1, got {value}")
    return value


def check(
    d_in: int, d_sae: int, architecture: str, normalize: str, dtype: torch.dtype | None
) -> None:
    """Raises ValueError, TypeError for what no SAE can be made of; of k see ``checked_k``."""
    _positive_int("d_in", d_in)
    _positive_int("d_sae", d_sae)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"SAE: architecture must be one of {ARCHITECTURES}, got {architecture!r}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"SAE: normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
    if normalize == "layer_norm" and d_in < 2:
        raise ValueError(f"SAE: layer_norm needs d_in of at least 2, got {d_in}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"SAE: dtype must be a floating type, got {dtype}")


def checked_k(k: int | float | None, architecture: str, d_sae: int) -> int | float | None:
    """k where it has a meaning, as an int where it is whole; else None."""
    if architecture not in ("topk", "batch_topk"):
        return None
    fractional = architecture == "batch_topk"
    if isinstance(k, bool) or not isinstance(k, (int, float) if fractional else int):
        raise TypeError(f"SAE: k must be an int for {architecture}, got {type(k).__name__}")
    if not (0 if fractional else 1) <= k <= d_sae or k == 0:
        raise ValueError(f"SAE: k must be in [1, d_sae = {d_sae}], got {k}")
    return int(k) if k == int(k) else k


def batch_count(k: int | float, rows: int) -> int:
    """How many activations batch_topk keeps of a batch."""
    return k * rows if isinstance(k, int) else max(1, int(k * rows))


def running_threshold(
    threshold: Tensor,  # (); negative: the first batch sets it
    acts: Tensor,  # of any shape, as selected; zeros do not count
) -> Tensor:
    """The running mean of the smallest activation that each batch kept; no host sync."""
    least = torch.where(acts > 0, acts, torch.inf).amin().to(threshold.dtype)
    moved = torch.lerp(threshold, least, _THRESHOLD_RATE)
    running = torch.where(threshold < 0, least, moved)
    return torch.where(least.isfinite(), running, threshold)
