"""``batch_topk_encode``: the k·B largest positive pre-activations x W_encᵀ + b_enc of a batch.

Fused like ``topk_encode``, with one bound that all rows share: the (B, d_sae) pre-activations are
never stored. Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import remembered
from clipsteer.ops._dispatch import choose
from clipsteer.ops._encoder import pre_activations
from clipsteer.ops._ragged import SparseCodes
from clipsteer.ops._ragged_encode import encode
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
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
) -> SparseCodes:
    """The definition in plain torch; ties go to the earlier row, then to the lower feature (the
    earlier of ``columns``), and a row with a NaN has one code."""
    pre = pre_activations(x, W_enc, b_enc, scale, columns)  # (B, n)
    nan = pre.isnan().any(-1, keepdim=True)
    ranked = pre.masked_fill(nan, 0).flatten()
    order = torch.argsort(ranked, descending=True, stable=True)
    first = torch.arange(order.shape[0], device=x.device) < count - nan.sum()
    keep = torch.zeros_like(ranked, dtype=torch.bool).scatter(0, order, first) & (ranked > 0)
    return codes_where(pre, keep.view_as(pre), max(count, x.shape[0]), columns)


@remembered
def batch_topk_encode(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    count: int | None = None,
    k: float | None = None,
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
    backend: str = "auto",
    sparse_grad: bool = False,
) -> SparseCodes:
    """Encode a batch to its k·B largest pre-activations, those that are positive.

    Args:
        x: (B, d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype. The transpose of a
            contiguous (d_in, d_sae) is read where it lies, and its gradient lies so, too.
        b_enc: (d_sae,) or None.
        count: how many in all; or
        k: how many a row on average, of which a whole number is made: ``max(1, int(k * B))``.
        scale: (d_sae,) or None, finite, of any sign: what is compared, and returned, is
            (x W_encᵀ + b_enc) · scale.
        columns: (m,) int64 or None: only these features are looked at, where they lie. Indices are
            the features' own numbers in ``W_enc``, in the order of ``columns``, and gradients have
            the shapes of all of ``W_enc``, ``b_enc``, ``scale``.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.
        sparse_grad: the gradient of ``W_enc`` is a sparse COO tensor of the rows in use.

    Returns ``SparseCodes`` with room for max(count, B) codes, a row's features in ascending order;
    its ``threshold`` is the smallest value kept, which inference takes in the batch's place.
    Equal pre-activations go to the earlier row, then to the lower feature. A row with a NaN
    pre-activation has one code of them, NaN at feature 0 (the first of ``columns``). The gradient
    of the values holds the set of codes fixed.

    Raises:
        ValueError: shapes, devices, columns, a count or a k that do not fit, or both of these.
        TypeError: not tensors, dtypes that differ outside autocast, count not an int, k no number.
        RuntimeError: the backend asked for cannot run here.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.
    """
    op = "batch_topk_encode"
    given = W_enc
    if all(isinstance(t, Tensor) for t in (x, W_enc)):
        x, W_enc, b_enc, scale = _check.autocast(x, W_enc, b_enc, scale)
    named: dict[str, Any] = {"x": x, "W_enc": W_enc, "b_enc": b_enc}
    named |= {"scale": scale, "columns": columns}
    _check.check_encoder(op, named, "B")
    number = _count(op, count, k, x.shape[0], named)
    plain = scale is None and columns is None
    backend = choose(op if plain else "batch_topk_encode_options", backend, x)
    W_enc, _ = with_gradient_options(op, given, W_enc, sparse_grad, None, backend)
    options: dict[str, Any] = {"scale": scale, "columns": columns}
    if backend == "reference":
        return batch_topk_encode_reference(x, W_enc, b_enc, count=number, **options)
    options |= {"positive": True, "backend": backend, "sparse_grad": sparse_grad}
    return encode(op, x, W_enc, b_enc, number, **options)


def _count(op: str, count: Any, k: Any, rows: int, named: dict[str, Any]) -> Any:
    """How many codes are asked for, by one of two arguments."""
    if (count is None) == (k is None):
        got = "neither" if count is None else f"count={count} and k={k}"
        raise ValueError(_check.mistake(op, "count or k, one of them,", "given", got, named))
    if k is None:
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(_check.mistake(op, "count", "an int", type(count).__name__, named))
        if count < 0:
            raise ValueError(_check.mistake(op, "count", "at least 0", count, named))
        return count
    if isinstance(k, bool) or not isinstance(k, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(_check.mistake(op, "k", "a number", type(k).__name__, named))
    if not 0 < k < math.inf:
        raise ValueError(_check.mistake(op, "k", "above 0 and finite", k, named))
    return torch.sym_max(1, torch.sym_int(k * rows))
