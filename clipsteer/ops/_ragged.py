"""Differentiable sums over ragged codes; the low-level ops of ``csrc/cpu/sparse_decode.cpp`` that
take pairs of a row and a feature.

``decode``, ``dot`` and ``outer`` are closed under differentiation, forward and reverse. Nothing is
checked here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._dispatch import call
from clipsteer.ops._reference import rows_of
from clipsteer.ops._sparse import across_if, laid_out, lies_across, optional_gradient


class SparseCodes(NamedTuple):
    """Codes of B rows, of as many features as each has.

    Row r has ``values[offsets[r] : offsets[r + 1]]`` at ``indices[offsets[r] : offsets[r + 1]]``;
    what comes after is padding, of value 0 and index 0. Where the capacity asked for was too small
    the last codes are missing, and ``overflowed`` says so.
    """

    values: Tensor  # (m,)
    indices: Tensor  # (m,) int64, in each row in the order they were looked at: ascending
    offsets: Tensor  # (B + 1,) int64, from 0

    @property
    def overflowed(self) -> Tensor:
        """Whether codes are missing: () bool, which no host has to wait for."""
        return self.offsets[-1] > self.values.shape[0]

    @property
    def threshold(self) -> Tensor:
        """The smallest value kept, of values' dtype: (); infinity where there is none."""
        values = self.values.detach()
        at = torch.arange(values.shape[0], device=values.device)
        there = (at < self.offsets[-1]) & ~values.isnan()
        none = values.new_full((1,), torch.inf)
        return torch.cat([torch.where(there, values, torch.inf), none]).amin()


def code_rows(codes: SparseCodes) -> Tensor:
    """The row (m,) of each code, B for padding."""
    at = torch.arange(codes.values.shape[0], device=codes.offsets.device)
    return torch.searchsorted(codes.offsets[1:].contiguous(), at, right=True)


class RaggedDecode(Function):
    @staticmethod
    def forward(
        values,  # (m,)
        indices,  # (m,)
        offsets,  # (B + 1,)
        W,  # (n, d)
        b,  # (d,) or None
        prefixes,  # or None
        backend,
        sparse_grad,
        grad_buffer,  # (n, d) or None
    ):
        return call(backend, "ragged_decode", values, indices, offsets, W, b, prefixes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, offsets, W, _, ctx.prefixes, *options = inputs
        save(ctx, values, indices, offsets, W)
        ctx.options = options

    @staticmethod
    def backward(ctx, grad):  # (B, d) or (G, B, d)
        values, indices, offsets, W = ctx.saved_tensors
        backend, sparse_grad, grad_buffer = ctx.options
        row = row_or_none(SparseCodes(values, indices, offsets))
        if ctx.prefixes is None:
            tails = grad.contiguous()
        else:
            tails = running_tails(grad)
            # the tail of the row from the first prefix on that has the feature
            later = grad.shape[1]
            shift = sum(torch.where(indices < prefix, 0, later) for prefix in ctx.prefixes[:-1])
            row = torch.where(row < 0, row, row + shift)
        d_values = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_values = dot(tails, row, indices, W, backend)
        if ctx.needs_input_grad[3]:
            options = (backend, sparse_grad, grad_buffer)
            d_W, _ = pair_gradient(values, indices, row, tails, W, *options, bias=False)
        if ctx.needs_input_grad[4]:
            d_b = grad.flatten(0, -2).sum(0)
        return d_values, None, None, d_W, d_b, None, None, None, None

    @staticmethod
    def jvp(ctx, t_values, _, __, t_W, t_b, *others):
        values, indices, offsets, W = ctx.saved_tensors
        of_values = of_W = of_b = None
        groups, backend = ctx.prefixes, ctx.options[0]
        if t_values is not None:
            of_values = decode(t_values.contiguous(), indices, offsets, W, None, groups, backend)
        if t_W is not None:
            t_W = laid_out(t_W, backend)
            of_W = decode(values, indices, offsets, t_W, None, groups, backend)
        if t_b is not None:
            size = (offsets.shape[0] - 1, t_b.shape[0])
            of_b = t_b.expand(size if groups is None else (len(groups), *size))
        return total(of_values, of_W, of_b)


def running_tails(
    grad: Tensor,  # (G, B, d)
) -> Tensor:
    """Of each prefix the sum of its gradient and those of all longer ones: (G·B, d).

    A feature is in its own prefix and in all that are longer.
    """
    tails = [grad[-1]]
    for shorter in reversed(grad[:-1].unbind()):
        tails.append(tails[-1] + shorter)
    return torch.cat(tails[::-1]) if len(tails) > 1 else grad[0].contiguous()


class RaggedDot(Function):
    @staticmethod
    def forward(
        rows,  # (R, d)
        row,  # (m,), -1 for none
        indices,  # (m,)
        W,  # (n, d)
        backend,
    ):
        return call(backend, "ragged_dot", rows, row, indices, W)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad):
        rows, row, indices, W = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = d_W = None
        if ctx.needs_input_grad[0]:
            d_rows = decode_pairs(grad, indices, row, W, rows.shape[0], ctx.backend)
        if ctx.needs_input_grad[3]:
            d_W, _ = outer(grad, indices, row, rows, W.shape[0], ctx.backend, lies_across(W))
        return d_rows, None, None, d_W, None

    @staticmethod
    def jvp(ctx, t_rows, _, __, t_W, *options):
        rows, row, indices, W = ctx.saved_tensors
        of_rows = of_W = None
        if t_rows is not None:
            of_rows = dot(t_rows.contiguous(), row, indices, W, ctx.backend)
        if t_W is not None:
            of_W = dot(rows, row, indices, laid_out(t_W, ctx.backend), ctx.backend)
        return total(of_rows, of_W)


class RaggedOuter(Function):
    @staticmethod
    def forward(
        coeff,  # (m,)
        indices,  # (m,)
        row,  # (m,), -1 for none
        rows,  # (R, d)
        n,
        across,
        backend,
    ):
        return call(backend, "ragged_outer", coeff, indices, row, rows, n, *across_if(across))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.n, ctx.across, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad_W, grad_b):
        coeff, indices, row, rows = ctx.saved_tensors
        grad_W = laid_out(grad_W, ctx.backend)
        d_coeff = d_rows = None
        if ctx.needs_input_grad[0]:
            d_coeff = dot(rows, row, indices, grad_W, ctx.backend)
            d_coeff = d_coeff + torch.where(row < 0, 0, rows_of(grad_b, indices))
        if ctx.needs_input_grad[3]:
            d_rows = decode_pairs(coeff, indices, row, grad_W, rows.shape[0], ctx.backend)
        return d_coeff, None, None, d_rows, None, None, None

    @staticmethod
    def jvp(ctx, t_coeff, _, __, t_rows, *others):
        coeff, indices, row, rows = ctx.saved_tensors
        options = (ctx.n, ctx.backend, ctx.across)
        of_coeff = of_rows = (None, None)
        if t_coeff is not None:
            of_coeff = outer(t_coeff.contiguous(), indices, row, rows, *options)
        if t_rows is not None:
            of_rows = outer(coeff, indices, row, t_rows.contiguous(), *options)
        t_db = torch.zeros_like(of_rows[1]) if of_coeff[1] is None else of_coeff[1]
        return total(of_coeff[0], of_rows[0]), t_db


def row_or_none(codes: SparseCodes) -> Tensor:
    """The row (m,) of each code, -1 for padding."""
    row = code_rows(codes)
    return torch.where(row < codes.offsets.shape[0] - 1, row, -1)


def decode(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    offsets: Tensor,  # (B + 1,)
    W: Tensor,  # (n, d)
    b: Tensor | None,  # (d,)
    prefixes: list[int] | None,
    backend: str,
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,  # (n, d)
) -> Tensor:
    """Σ_j values_j W[indices_j] + b of each row, (B, d), or of each prefix and row, (G, B, d);
    contiguous inputs, ``W`` as it is ``laid_out``."""
    arguments = (values, indices, offsets, W, b, prefixes)
    if tracked(values, W, b):
        return RaggedDecode.run(*arguments, backend, sparse_grad, grad_buffer)
    return call(backend, "ragged_decode", *arguments)


def decode_pairs(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,) in any order, -1 for none
    W: Tensor,  # (n, d)
    rows: int,
    backend: str,
) -> Tensor:
    """The same of pairs in any order: (rows, d)."""
    # those without a row come last, as padding does
    row, order = torch.sort(torch.where(row < 0, rows, row), stable=True)
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    values = values.gather(0, order)
    return decode(values, indices.gather(0, order), offsets, W, None, None, backend)


def dot(
    rows: Tensor,  # (R, d)
    row: Tensor,  # (m,), -1 for none
    indices: Tensor,  # (m,)
    W: Tensor,  # (n, d)
    backend: str,
) -> Tensor:
    """⟨rows[row_p], W[indices_p]⟩, 0 for a pair without a row: (m,)."""
    if tracked(rows, W):
        return RaggedDot.run(rows, row, indices, W, backend)
    return call(backend, "ragged_dot", rows, row, indices, W)


def outer(
    coeff: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,), -1 for none
    rows: Tensor,  # (R, d)
    n: int,
    backend: str,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """Segment sums Σ coeff·rows and Σ coeff over the pairs of each feature: (n, d), which lies as
    (d, n) if ``across``, and (n,)."""
    if tracked(coeff, rows):
        return RaggedOuter.run(coeff, indices, row, rows, n, across, backend)
    return call(backend, "ragged_outer", coeff, indices, row, rows, n, *across_if(across))


def pair_gradient(
    coeff: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,), -1 for none
    rows: Tensor,  # (R, d)
    W: Tensor,  # (n, d)
    backend: str,
    sparse: bool,
    buffer: Tensor | None = None,  # (n, d)
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``outer`` as the caller wants it: dense, row-sparse, or written into a kept buffer; a dense
    one in the layout of ``W``. Without ``bias`` nobody asks for the second sum."""
    n = W.shape[0]
    found = optional_gradient(
        "ragged_outer", coeff, indices, (row, rows), n, backend, sparse, buffer, bias
    )
    if found is not None:
        return found
    return outer(coeff, indices, row, rows, n, backend, lies_across(W))
