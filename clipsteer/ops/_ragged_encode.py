"""Encoders that find ragged codes: one way to run them and to differentiate them.

Nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._dispatch import call
from clipsteer.ops._encoder import readable, scaled, unscaled
from clipsteer.ops._ragged import SparseCodes, decode, dot, outer, pair_gradient, row_or_none
from clipsteer.ops._reference import rows_of
from clipsteer.ops._sparse import laid_out
from clipsteer.ops._steps import contiguous, contiguous_if


class RaggedEncode(Function):
    """Ragged codes of a low-level op of the arguments (x, W, b, limits…, scale, columns); the
    gradient holds the set of codes fixed. ``positive``: their values are."""

    @staticmethod
    def forward(*inputs):
        *arguments, low_level, _, backend, _ = inputs
        return call(backend, low_level, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, b = inputs[:3]
        scale, _, _, ctx.positive, *ctx.options = inputs[-6:]
        values, indices, offsets = output
        save(ctx, x, W, b, scale, values, indices, offsets)
        ctx.mark_non_differentiable(indices, offsets)
        ctx.set_materialize_grads(False)
        ctx.at_scale = len(inputs) - 6

    @staticmethod
    def backward(ctx, grad, *_):
        limits = (None,) * (ctx.at_scale - 3)
        if grad is None:
            return None, None, None, *limits, *[None] * 6
        x, W, b, scale, values, indices, offsets = ctx.saved_tensors
        backend, sparse_grad = ctx.options
        W = laid_out(W, backend)
        needs = ctx.needs_input_grad
        row = row_or_none(SparseCodes(values, indices, offsets))
        grad = torch.where(values.isnan() | (row < 0), 0, grad)
        d_x = d_W = d_b = d_scale = None
        if scale is not None and needs[ctx.at_scale]:
            pre = _before_scale(ctx.positive, x, W, b, scale, values, indices, row, backend)
            ones = x.new_ones(x.shape[0], 1)
            _, d_scale = outer((grad * pre).contiguous(), indices, row, ones, W.shape[0], backend)
        grad = scaled(grad, scale, indices).contiguous()
        if needs[0]:
            d_x = decode(grad, indices, offsets, W, None, None, backend)
        if needs[1] or needs[2]:
            d_W, d_b = pair_gradient(grad, indices, row, x, W, backend, sparse_grad)
        d_W = d_W if needs[1] else None
        d_b = d_b if needs[2] else None
        return d_x, d_W, d_b, *limits, d_scale, *[None] * 5

    @staticmethod
    def jvp(ctx, t_x, t_W, t_b, *others):
        x, W, b, scale, values, indices, offsets = ctx.saved_tensors
        backend = ctx.options[0]
        W = laid_out(W, backend)
        t_scale = others[-6]
        row = row_or_none(SparseCodes(values, indices, offsets))
        of_x = of_W = of_b = of_scale = None
        if t_x is not None:
            of_x = dot(t_x.contiguous(), row, indices, W, backend)
        if t_W is not None:
            of_W = dot(x, row, indices, laid_out(t_W, backend), backend)
        if t_b is not None:
            of_b = rows_of(t_b, indices)
        tangent = total(of_x, of_W, of_b)
        if tangent is not None:
            tangent = scaled(tangent, scale, indices)
        if t_scale is not None:
            pre = _before_scale(ctx.positive, x, W, b, scale, values, indices, row, backend)
            of_scale = rows_of(t_scale, indices) * pre
        tangent = total(tangent, of_scale)
        if tangent is not None:
            tangent = torch.where((row < 0) | values.isnan(), 0, tangent)
        return tangent, None, None


def _before_scale(
    positive: bool,
    x: Tensor,  # (B, d)
    W: Tensor,  # (n, d)
    b: Tensor | None,  # (n,)
    scale: Tensor,  # (n,)
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,), -1 for padding
    backend: str,
) -> Tensor:
    """x W_encᵀ + b_enc of the codes: (m,)."""
    if positive:
        return unscaled(values, scale, indices)
    pre = dot(x, row, indices, W, backend)
    return pre if b is None else pre + rows_of(b, indices)


def encode(
    low_level: str,
    x: Tensor,  # (B, d)
    W: Tensor,  # (n, d), in any layout
    b: Tensor | None,  # (n,)
    *limits: Any,
    scale: Tensor | None,  # (n,)
    columns: Tensor | None,  # (m,)
    positive: bool,
    backend: str,
    sparse_grad: bool,
) -> SparseCodes:
    """The codes that a low-level op finds, whose values are all positive if ``positive``."""
    b, scale, columns = (contiguous_if(t) for t in (b, scale, columns))
    arguments = (contiguous(x), readable(W, backend), b, *limits, scale, columns)
    if tracked(x, W, b, scale):
        return SparseCodes(*RaggedEncode.run(*arguments, low_level, positive, backend, sparse_grad))
    return SparseCodes(*call(backend, low_level, *arguments))
