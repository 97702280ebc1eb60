"""``threshold_encode``: all pre-activations x W_encᵀ + b_enc above a threshold, as ragged codes.

Fused like ``topk_encode``, with a bound that is known from the start: the (B, d_sae)
pre-activations are never stored. Source: Rajamanoharan et al. 2024 (arXiv 2407.14435) for
JumpReLU; Bussmann et al. 2024 (arXiv 2412.06410) for the inference of BatchTopK.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._autograd import tracked
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._encoder import named_by, pre_activations, readable
from clipsteer.ops._ragged import SparseCodes
from clipsteer.ops._ragged_encode import encode
from clipsteer.ops._reference import rounded_once
from clipsteer.ops._sparse import with_gradient_options
from clipsteer.ops._steps import contiguous, contiguous_if, detached, full

__all__ = ["threshold_encode", "threshold_encode_reference"]


def codes_where(
    pre: Tensor,  # (B, n)
    keep: Tensor,  # (B, n) bool
    capacity: int | None,
    columns: Tensor | None = None,  # (n,), the features' own numbers
) -> SparseCodes:
    """The kept pre-activations in order; a row with a NaN has one code, NaN at the first
    feature."""
    nan = pre.isnan().any(-1, keepdim=True)
    first = torch.arange(pre.shape[1], device=pre.device) == 0
    keep = torch.where(nan, first, keep)
    offsets = F.pad(keep.sum(-1).cumsum(0), (1, 0))
    flat = pre.masked_fill(nan, float("nan")).flatten()
    if capacity is None:
        at = keep.flatten().nonzero().flatten()
        return SparseCodes(flat.gather(0, at), named_by(columns, at % pre.shape[1]), offsets)
    # each kept one to its place, all others to a spare one
    place = keep.flatten().cumsum(0) - 1
    place = torch.where(keep.flatten() & (place < capacity), place, capacity)
    numbers = named_by(columns, torch.arange(pre.shape[1], device=pre.device))
    values = flat.new_zeros(capacity + 1).scatter(0, place, flat)[:-1]
    indices = numbers.new_zeros(capacity + 1)
    indices = indices.scatter(0, place, numbers.expand_as(pre).flatten())[:-1]
    return SparseCodes(values, indices, offsets)


@rounded_once
def threshold_encode_reference(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    threshold: Tensor,  # () or (d_sae,)
    relu: bool = True,
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
    capacity: int | None = None,
) -> SparseCodes:
    """The definition in plain torch."""
    pre = pre_activations(x, W_enc, b_enc, scale, columns)
    if threshold.dim() > 0:
        threshold = threshold if columns is None else threshold[columns]
    keep = pre > (threshold.clamp_min(0) if relu else threshold)
    return codes_where(pre, keep, capacity, columns)


def check_arguments(op: str, named: dict[str, Any], capacity: int | None) -> None:
    """Those of an encoder with a threshold."""
    _check.check_encoder(op, named, "B")
    sizes = named["threshold"].shape
    n = named["W_enc"].shape[0]
    if len(sizes) > 1 or (len(sizes) == 1 and sizes[0] != n):
        expected = f"a number or of shape (d_sae = {n},)"
        raise ValueError(_check.mistake(op, "threshold", expected, tuple(sizes), named))
    if capacity is not None and capacity < 0:
        raise ValueError(f"{op}: capacity must be None or at least 0, got {capacity}")


def _limits(
    threshold: Tensor,  # () or (d_sae,)
    relu: bool,
) -> Tensor:  # (1,) or (d_sae,)
    """What pre-activations are compared with."""
    threshold = threshold.detach()
    return (threshold.clamp_min(0) if relu else threshold).reshape(-1).contiguous()


@remembered
def threshold_encode(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    threshold: Tensor | float,  # () or (d_sae,)
    relu: bool = True,
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
    capacity: int | None = None,
    backend: str = "auto",
    sparse_grad: bool = False,
) -> SparseCodes:
    """Encode to all pre-activations that are larger than a threshold.

    Args:
        x: (B, d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype. The transpose of a
            contiguous (d_in, d_sae) is read where it lies, and its gradient lies so, too.
        b_enc: (d_sae,) or None.
        threshold: one for all features, or one a feature; compared strictly.
        relu: only positive pre-activations are codes, whatever the threshold.
        scale: (d_sae,) or None, finite, of any sign: what is compared, and returned, is
            (x W_encᵀ + b_enc) · scale.
        columns: (m,) int64 or None: only these features are looked at, where they lie. Indices are
            the features' own numbers in ``W_enc``, in the order of ``columns``, and gradients have
            the shapes of all of ``W_enc``, ``b_enc``, ``scale``.
        capacity: how many codes there is room for; None makes as much as there are, which a GPU has
            to wait for. With too little room the last codes are missing, and ``codes.overflowed``
            says so.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.
        sparse_grad: the gradient of ``W_enc`` is a sparse COO tensor of the rows in use.

    Returns ``SparseCodes``, a row's features in ascending order. A row with a NaN pre-activation
    has one code, NaN at feature 0 (the first of ``columns``). The gradient of the values holds the
    set of codes fixed; the threshold has none.

    Raises:
        ValueError: shapes, devices, columns or a capacity that do not fit.
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), equation 4.
    """
    op = "threshold_encode"
    given = W_enc
    if isinstance(x, Tensor):
        if not isinstance(threshold, Tensor):
            threshold = full(threshold, x.dtype, x.device)
        if isinstance(W_enc, Tensor):
            cast = _check.autocast(x, W_enc, b_enc, threshold, scale)
            x, W_enc, b_enc, threshold, scale = cast
    named: dict[str, Any] = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "threshold": threshold}
    named |= {"scale": scale, "columns": columns}
    check_arguments(op, named, capacity)
    assert isinstance(threshold, Tensor)
    plain = scale is None and columns is None
    backend = choose(op if plain else "threshold_encode_options", backend, x)
    W_enc, _ = with_gradient_options(op, given, W_enc, sparse_grad, None, backend)
    options: dict[str, Any] = {"scale": scale, "columns": columns}
    if backend == "reference":
        options |= {"threshold": threshold.detach(), "relu": relu, "capacity": capacity}
        return threshold_encode_reference(x, W_enc, b_enc, **options)
    room = -1 if capacity is None else capacity
    if backend == "cpp" and not tracked(x, W_enc, b_enc, scale):
        b_enc, scale, columns = (contiguous_if(t) for t in (b_enc, scale, columns))
        threshold = contiguous(detached(threshold))
        arguments = (contiguous(x), readable(W_enc, backend), b_enc, threshold, relu, room)
        return SparseCodes(*call(backend, "threshold_codes", *arguments, scale, columns))
    limits = (step(_limits, threshold, relu), room)
    options |= {"positive": relu, "backend": backend, "sparse_grad": sparse_grad}
    return encode(op, x, W_enc, b_enc, *limits, **options)
