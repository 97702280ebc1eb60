"""``batch_topk_encode``: the k·B largest positive pre-activations x W_encᵀ + b_enc of a batch.

Fused like ``topk_encode``, with one bound that all rows share: the (B, d_sae) pre-activations are
never stored. Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import choose
from clipsteer.ops._ragged import SparseCodes, encode
from clipsteer.ops._reference import rounded_once
from clipsteer.ops._sparse import with_gradient_options
from clipsteer.ops.threshold_encode import codes_where

__all__ = ["batch_topk_encode", "batch_topk_encode_reference"]


@rounded_once
def batch_topk_encode_reference(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    count: int,
) -> SparseCodes:
    """The definition in plain torch; ties go to the earlier row, then to the lower feature, and a
    row with a NaN has one code."""
    pre = F.linear(x, W_enc, b_enc)  # (B, n)
    nan = pre.isnan().any(-1, keepdim=True)
    ranked = pre.masked_fill(nan, 0).flatten()
    order = torch.argsort(ranked, descending=True, stable=True)
    first = torch.arange(order.shape[0], device=x.device) < count - nan.sum()
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, order, first) & (ranked > 0)
    return codes_where(pre, keep.view_as(pre), max(count, x.shape[0]))


def batch_topk_encode(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    count: int,
    backend: str = "auto",
    sparse_grad: bool = False,
) -> SparseCodes:
    """Encode a batch to its ``count`` largest pre-activations, those that are positive.

    Args:
        x: (B, d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype.
        b_enc: (d_sae,) or None.
        count: how many in all, k·B for k a row on average.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.
        sparse_grad: the gradient of ``W_enc`` is a sparse COO tensor of the rows in use.

    Returns ``SparseCodes`` with room for max(count, B) codes, a row's features in ascending order.
    Equal pre-activations go to the earlier row, then to the lower feature. A row with a NaN
    pre-activation has one code of them, NaN at feature 0. The gradient of the values holds the set
    of codes fixed.

    Raises:
        ValueError: shapes, devices or a count that do not fit.
        TypeError: not tensors, dtypes that differ outside autocast, count not an int.
        RuntimeError: the backend asked for cannot run here.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
    """
    op = "batch_topk_encode"
    given = W_enc
    named: dict[str, Any] = {"x": x, "W_enc": W_enc, "b_enc": b_enc}
    if all(isinstance(t, Tensor) for t in (x, W_enc)):
        x, W_enc, b_enc = _check.autocast(x, W_enc, b_enc)
        named.update(x=x, W_enc=W_enc, b_enc=b_enc)
    _check.check_encoder(op, named, "B")
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(_check.mistake(op, "count", "an int", type(count).__name__, named))
    if count < 0:
        raise ValueError(_check.mistake(op, "count", "at least 0", count, named))
    backend = choose(op, backend, x)
    W_enc, _ = with_gradient_options(op, given, W_enc, sparse_grad, None, backend)
    if backend == "reference":
        return batch_topk_encode_reference(x, W_enc, b_enc, count=count)
    return encode(op, x, W_enc, b_enc, count, backend=backend, sparse_grad=sparse_grad)
