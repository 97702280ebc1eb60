"""``generalised_rand_index`` and ``concept_distances``: do two sets of concepts agree on which rows
are alike?

P (N, K) and Q (N, L) hold, of the same N rows (images or tokens), how near each is to each concept:
numbers in [0, 1] whose sum over a row is at most 1. With d_P(i, j) = ½‖p_i − p_j‖₁, 1 − d_P is how
far P takes two rows for alike, and over all N(N − 1)/2 pairs

    GRI(P, Q) = 1 − 2/(N(N − 1)) · Σ_{i<j} |d_P(i, j) − d_Q(i, j)|
    D(P, Q)[a, b] = 1/(N(N − 1)) · Σ_{i<j} ||P_ia − P_ja| − |Q_ib − Q_jb||

The ½ of d is in D, too: D is half the mean over the pairs, so that concepts that fit leave
1 − GRI ≤ Σ D over them. The authors' functions divide alike: their sum over pairs is halved for D
and not for the index (whose ½ is inside), then both are divided by N(N − 1)/2. Source: Vielhaben
et al. 2025 (arXiv 2412.06639), equations 2–4; Hüllermeier et al. 2012, the index.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["concept_distances_reference", "generalised_rand_index_reference"]

# numbers of a block of rows' differences
BLOCK = 1 << 22


def _blocks(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
) -> list[slice]:
    """The rows in blocks, whose differences from all rows fill no more than BLOCK numbers."""
    N = P.shape[0]
    step = max(1, BLOCK // max(1, N * max(P.shape[1], Q.shape[1])))
    return [slice(first, first + step) for first in range(0, N, step)]


def _differences(
    X: Tensor,  # (N, K)
    rows: slice,
) -> Tensor:  # (n, N, K)
    """|X_i − X_j| of these rows i and all j, in float64."""
    return (X[rows, None].double() - X.double()).abs()


def generalised_rand_index_reference(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
) -> Tensor:
    """The definition in plain torch, over blocks of rows, in float64 until it is rounded once; its
    derivative of |x| at 0 is 0."""
    N = P.shape[0]
    total = P.new_zeros((), dtype=torch.float64)
    for rows in _blocks(P, Q):
        apart = _differences(P, rows).sum(2) - _differences(Q, rows).sum(2)  # (n, N)
        total = total + apart.abs().sum()
    # every pair twice, and twice its d
    value = 1 - total / (2 * max(N * (N - 1), 1))
    return value.to(torch.promote_types(P.dtype, torch.float32))


def concept_distances_reference(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
) -> Tensor:  # (K, L)
    """The definition in plain torch, over blocks of rows, in float64 until it is rounded once."""
    N = P.shape[0]
    total = P.new_zeros(P.shape[1], Q.shape[1], dtype=torch.float64)
    for rows in _blocks(P, Q):
        u = _differences(P, rows).flatten(0, 1)  # (n N, K)
        v = _differences(Q, rows).flatten(0, 1)  # (n N, L)
        total = total + torch.cdist(u.T.contiguous(), v.T.contiguous(), p=1)
    value = total / (2 * max(N * (N - 1), 1))
    return value.to(torch.promote_types(P.dtype, torch.float32))
