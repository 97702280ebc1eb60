"""Rows of a matrix: scaled to norm 1, and the point in their middle."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(weight: Tensor) -> Tensor:
    """Rows (n, d) scaled to norm 1; a row of zeros stays zero."""
    norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight / norm.clamp_min(torch.finfo(weight.dtype).tiny)


def geometric_median(
    rows: Tensor,  # (N, d) float64, N >= 1
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    """The point (d,) of least total distance from all rows.

    Weiszfeld's iteration with Vardi and Zhang's step (2000) at a data point, where the plain one
    stops. It ends once a step is ``tolerance`` of the mean distance.
    """
    median = rows.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(rows - median, dim=-1)  # (N,)
        here = distance == 0
        weight = torch.where(here, 0, 1 / distance)
        if not bool(weight.any()):
            break
        target = weight @ rows / weight.sum()
        pull = torch.linalg.vector_norm(weight @ (rows - median))
        share = (here.sum() / pull.clamp_min(1e-300)).clamp(max=1)
        step = (1 - share) * (target - median)
        median = median + step
        if torch.linalg.vector_norm(step) <= tolerance * distance.mean():
            break
    return median
