"""What is taken out of each row before an SAE encodes it, and put back into what it decodes.

    x' = (x - mean) / scale,   x̂ = x̂' · scale + mean

Source: Joseph et al. 2025 (arXiv 2504.08729).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NORMALIZATIONS = ("none", "layer_norm", "constant_norm")
_LAYER_NORM_EPS = 1e-5


class InputStats(NamedTuple):
    """What the normalisation took out of each row and the decoder puts back; None where there is
    nothing to do."""

    mean: Tensor | None  # (..., 1)
    scale: Tensor | None  # (..., 1)


def normalize(
    x: Tensor,  # (..., d_in)
    how: str,
    dtype: torch.dtype,
) -> tuple[Tensor, InputStats]:
    """The rows normalised, in ``dtype``, and what it takes to undo that.

    Statistics of 16-bit rows are taken in float32. A constant row is mapped to 0, and so is a row
    of zeros.
    """
    if how == "none":
        return x.to(dtype), InputStats(None, None)
    wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    x = x.to(wide)
    d_in = x.shape[-1]
    if how == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        x = x - mean
        # the unbiased standard deviation; as a norm its gradient at no spread is 0, not NaN
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / (d_in - 1) ** 0.5
        return (x / (scale + _LAYER_NORM_EPS)).to(dtype), InputStats(mean, scale)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / d_in**0.5
    # a row of zeros stays
    unit = x / scale.clamp_min(torch.finfo(wide).tiny)
    return unit.to(dtype), InputStats(None, scale)


def denormalize(x_hat: Tensor, stats: InputStats) -> Tensor:
    """Rows (..., d_in) of the normalised space in the space of what was normalised."""
    if stats.scale is not None:
        x_hat = x_hat * stats.scale
    return x_hat if stats.mean is None else x_hat + stats.mean
