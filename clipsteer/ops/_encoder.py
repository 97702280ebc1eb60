"""What the encoders have in common: the pre-activations they are defined by, and the derivatives by
a feature's scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._reference import rows_of
from clipsteer.ops._sparse import lies_across
from clipsteer.ops._steps import contiguous


def pre_activations(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None,  # (d_sae,)
    scale: Tensor | None,  # (d_sae,)
    columns: Tensor | None,  # (m,)
) -> Tensor:
    """(x W_encᵀ + b_enc) · scale of the features ``columns``, or of all: (..., m)."""
    if columns is not None:
        W_enc = rows_of(W_enc, columns)
        b_enc = None if b_enc is None else rows_of(b_enc, columns)
        scale = None if scale is None else rows_of(scale, columns)
    pre = F.linear(x, W_enc, b_enc)
    return pre if scale is None else pre * scale


def readable(W: Tensor, backend: str) -> Tensor:
    """A dictionary (n, d) as the encoders of a backend read it: in either layout, but for CUDA."""
    return W if lies_across(W) and backend != "cuda" else contiguous(W)


def named_by(columns: Tensor | None, indices: Tensor) -> Tensor:
    """From places among the features that were looked at to the features' own numbers."""
    return indices if columns is None else columns[indices]


def scaled(
    grad: Tensor,  # of the values, of any shape
    scale: Tensor | None,  # (n,)
    indices: Tensor,  # of grad's shape
) -> Tensor:
    """The gradient of what a feature's scale multiplied."""
    return grad if scale is None else grad * rows_of(scale, indices)


def unscaled(
    values: Tensor,  # of any shape
    scale: Tensor,  # (n,)
    indices: Tensor,  # of values' shape
) -> Tensor:
    """What was multiplied to make the positive ones of these values; 0 for the others."""
    there = values > 0
    factor = torch.where(there, rows_of(scale, indices), 1)
    return torch.where(there, values, 0) / factor
