"""Matryoshka dictionaries: every prefix of the features is a dictionary of its own.

    x̂_g = f[: n_g] W_dec[: n_g] + b_dec,   loss = mean over g of the loss of x̂_g

for sizes n_1 < … < n_G = d_sae, after one encoding with all features. Sources: Bussmann et al. 2025
(arXiv 2503.17547), whose loss is the sum over g; the mean keeps the weights of L1 and AuxK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer import ops

ARCHITECTURES = ("topk", "batch_topk", "relu", "jumprelu")


def checked_prefixes(
    prefixes: Sequence[int] | None, architecture: str, d_sae: int
) -> tuple[int, ...] | None:
    """The sizes as a tuple. Raises ValueError, TypeError where they are none of ``d_sae``
    features."""
    if prefixes is None:
        return None
    is_listed = isinstance(prefixes, Sequence) and not isinstance(prefixes, (str, bytes))
    if not is_listed or not all(type(size) is int for size in prefixes):
        raise TypeError(
            f"SAE: matryoshka must list the sizes of the prefixes as ints, got {prefixes!r:.80}"
        )
    ascending = all(a < b for a, b in zip((0, *prefixes), prefixes))
    if not prefixes or not ascending or prefixes[-1] != d_sae:
        raise ValueError(
            f"SAE: matryoshka must ascend from above 0 to d_sae = {d_sae} (sizes of prefixes, each "
            f"with the one before in it), got {tuple(prefixes)}"
        )
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"SAE: matryoshka needs an architecture of {ARCHITECTURES}, got {architecture!r}"
        )
    return tuple(prefixes)


def decode_prefixes(
    acts: Any,  # (..., d_sae), a pair (acts, indices) of (..., k), or ragged codes of B rows
    W_dec: Tensor,  # (d_sae, d)
    b_dec: Tensor,  # (d,)
    prefixes: Sequence[int],
    sparse_grad: bool = False,
) -> Tensor:
    """The reconstruction of every prefix, (G, ..., d): of sparse codes in one pass over them, of
    dense ones a group of features after the other."""
    if isinstance(acts, ops.SparseCodes):
        return ops.ragged_decode(*acts, W_dec, b_dec, prefixes=prefixes, sparse_grad=sparse_grad)
    if isinstance(acts, tuple):
        values, indices = acts
        return ops.sparse_decode(
            values, indices, W_dec, b_dec, prefixes=prefixes, sparse_grad=sparse_grad
        )
    parts = []
    first = 0
    x_hat = b_dec
    for prefix in prefixes:
        group = slice(first, prefix)
        x_hat = F.linear(acts[..., group].to(W_dec.dtype), W_dec[group].T) + x_hat
        parts.append(x_hat)
        first = prefix
    return torch.stack(parts)
