"""The gradient of codes that were chosen elsewhere: by other processes, or out of more than was
kept."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops import _ragged as ragged
from clipsteer.ops import _sparse as sparse
from clipsteer.ops._autograd import Function, save, tracked
from clipsteer.ops._dispatch import choose
from clipsteer.ops._ragged import SparseCodes, code_rows, row_or_none

Codes = TypeVar("Codes", SparseCodes, tuple[Tensor, Tensor])


class Chosen(Function):
    """Values of codes as if x, W and b had just given them; the gradient holds the set of codes
    fixed."""

    @staticmethod
    def forward(
        x,  # (B, d)
        W,  # (n, d)
        b,  # (n,) or None
        values,  # (B, k), or (m,) with offsets
        indices,
        offsets,  # (B + 1,) or None
        backend,
        sparse_grad,
    ):
        return values.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _, values, indices, offsets, *ctx.options = inputs
        save(ctx, x, W, values, indices, offsets)

    @staticmethod
    def backward(ctx, grad):
        x, W, values, indices, offsets = ctx.saved_tensors
        backend, sparse_grad = ctx.options
        needs = ctx.needs_input_grad
        grad = torch.where(_active(values, offsets), grad, 0).contiguous()
        d_x = d_W = d_b = None
        if needs[0] and offsets is None:
            d_x = sparse.decode(grad, indices, W, None, backend)
        elif needs[0]:
            d_x = ragged.decode(grad, indices, offsets, W, None, None, backend)
        if (needs[1] or needs[2]) and offsets is None:
            d_W, d_b = sparse.weight_gradient(grad, indices, x, W, backend, sparse_grad, None)
        elif needs[1] or needs[2]:
            row = row_or_none(SparseCodes(values, indices, offsets))
            d_W, d_b = ragged.pair_gradient(grad, indices, row, x, W, backend, sparse_grad)
        return d_x, d_W if needs[1] else None, d_b if needs[2] else None, *[None] * 5


def _active(values: Tensor, offsets: Tensor | None) -> Tensor:
    """Which codes have a gradient: of top-k those above 0, of ragged ones all, but for NaN."""
    return values > 0 if offsets is None else ~values.isnan()


def chosen(
    x: Tensor,  # (B, d)
    W_enc: Tensor,  # (n, d)
    b_enc: Tensor | None,  # (n,)
    codes: Codes,
    *,
    sparse_grad: bool = False,
) -> Codes:
    """The same codes, of x's rows, with the gradient that an encoder gives them.

    ``codes`` are ``SparseCodes`` or a pair (values, indices) of (B, k) each, not negative, found
    among x W_encᵀ + b_enc without a gradient.
    """
    given = W_enc
    x, W_enc, b_enc = _check.autocast(x, W_enc, b_enc)
    if not tracked(x, W_enc, b_enc):
        return codes
    values, indices = codes[:2]
    offsets = codes.offsets if isinstance(codes, SparseCodes) else None
    backend = choose("sparse_decode" if offsets is None else "ragged_decode", "auto", x)
    if backend == "reference":
        values = _reference(x, W_enc, b_enc, codes)
    else:
        W_enc, _ = sparse.with_gradient_options("chosen", given, W_enc, sparse_grad, None, backend)
        arguments = (values, indices, offsets, backend, sparse_grad)
        values = Chosen.run(x.contiguous(), W_enc.contiguous(), b_enc, *arguments)
    if isinstance(codes, SparseCodes):
        return codes._replace(values=values)
    return values, indices


def _reference(x: Tensor, W: Tensor, b: Tensor | None, codes: Codes) -> Tensor:
    """The values in plain torch, from the same products."""
    values, indices = codes[:2]
    rows = x.unsqueeze(1)
    if isinstance(codes, SparseCodes):
        rows = x[code_rows(codes).clamp_max(len(x) - 1)]
    pre = (rows * W[indices]).sum(-1)
    if b is not None:
        pre = pre + b[indices]
    return torch.where(_active(values, codes[2] if len(codes) > 2 else None), pre, values)
