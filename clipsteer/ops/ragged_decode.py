"""``ragged_decode``: x_hat = Σ_j values_j · W_dec[indices_j] + b_dec, over as many codes as each
row has, for every prefix of the dictionary at once.

Fused: the sum over the first features goes on into the sum over more of them, so that all prefixes
cost one pass over the codes; so does the way back. Its gradients, ``_dot`` (for the values) and
``_outer`` (for the dictionary), take pairs of a row and a feature, and the three are closed under
differentiation. Source: Bussmann et al. 2025 (arXiv 2503.17547) for the prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import call, choose, tracked
from clipsteer.ops._reference import rounded_once

__all__ = ["SparseCodes", "code_rows", "ragged_decode", "ragged_decode_reference"]


class SparseCodes(NamedTuple):
    """Codes of B rows, of as many features as each has.

    Row r has ``values[offsets[r] : offsets[r + 1]]`` at ``indices[offsets[r] : offsets[r + 1]]``;
    what comes after is padding, of value 0 and index 0. Where ``offsets[-1]`` exceeds their number
    the capacity asked for was too small, and the last codes are missing.
    """

    values: Tensor  # (m,)
    indices: Tensor  # (m,) int64, ascending in each row
    offsets: Tensor  # (B + 1,) int64, from 0


def code_rows(codes: SparseCodes) -> Tensor:
    """The row (m,) of each code, B for padding."""
    at = torch.arange(codes.values.shape[0], device=codes.offsets.device)
    return torch.searchsorted(codes.offsets[1:].contiguous(), at, right=True)


@rounded_once
def ragged_decode_reference(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    offsets: Tensor,  # (B + 1,)
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
    *,
    prefixes: Sequence[int] | None = None,
) -> Tensor:
    """The definition in plain torch."""
    rows = offsets.shape[0] - 1
    terms = values[:, None] * W_dec.index_select(0, indices)  # (m, d)
    row = code_rows(SparseCodes(values, indices, offsets))
    zeros = terms.new_zeros(rows + 1, W_dec.shape[1])
    sums = []
    for prefix in prefixes or (W_dec.shape[0],):
        there = torch.where(indices < prefix, row, rows)
        sums.append(zeros.index_add(0, there, terms)[:-1])
    x_hat = torch.stack(sums)
    x_hat = x_hat if b_dec is None else x_hat + b_dec
    return x_hat[0] if prefixes is None else x_hat


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        values,  # (m,)
        indices,  # (m,)
        offsets,  # (B + 1,)
        W,  # (n, d)
        b,  # (d,) or None
        prefixes,
        backend,
        sparse_grad,
    ):
        return call(backend, "ragged_decode", values, indices, offsets, W, b, prefixes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, offsets, W, _, ctx.prefixes, ctx.backend, ctx.sparse_grad = inputs
        ctx.save_for_backward(values, indices, offsets, W)

    @staticmethod
    def backward(ctx, grad):  # (G, B, d)
        values, indices, offsets, W = ctx.saved_tensors
        groups, rows, d = grad.shape
        row = code_rows(SparseCodes(values, indices, offsets))
        there = row < rows
        # a feature is in its own prefix and in all that are longer
        tails = grad
        if groups > 1:
            tails = grad.flip(0).cumsum(0).flip(0)
            for prefix in ctx.prefixes[:-1]:
                row = row + torch.where(indices < prefix, 0, rows)
        row = torch.where(there, row, -1)
        tails = tails.reshape(groups * rows, d).contiguous()
        d_values = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_values = dot(tails, row, indices, W, ctx.backend)
        if ctx.needs_input_grad[3]:
            d_W, _ = pair_gradient(values, indices, row, tails, W, ctx.backend, ctx.sparse_grad)
        if ctx.needs_input_grad[4]:
            d_b = grad.sum((0, 1))
        return d_values, None, None, d_W, d_b, None, None, None


class _Dot(torch.autograd.Function):
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
        rows, row, indices, W, ctx.backend = inputs
        ctx.save_for_backward(rows, row, indices, W)

    @staticmethod
    def backward(ctx, grad):
        rows, row, indices, W = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = d_W = None
        if ctx.needs_input_grad[0]:
            d_rows = decode_pairs(grad, indices, row, W, rows.shape[0], ctx.backend)
        if ctx.needs_input_grad[3]:
            d_W, _ = outer(grad, indices, row, rows, W.shape[0], ctx.backend)
        return d_rows, None, None, d_W, None


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(
        coeff,  # (m,)
        indices,  # (m,)
        row,  # (m,), -1 for none
        rows,  # (R, d)
        n,
        backend,
    ):
        return call(backend, "ragged_outer", coeff, indices, row, rows, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        coeff, indices, row, rows, _, ctx.backend = inputs
        ctx.save_for_backward(coeff, indices, row, rows)

    @staticmethod
    def backward(ctx, grad_W, grad_b):
        coeff, indices, row, rows = ctx.saved_tensors
        grad_W = grad_W.contiguous()
        d_coeff = d_rows = None
        if ctx.needs_input_grad[0]:
            d_coeff = dot(rows, row, indices, grad_W, ctx.backend)
            d_coeff = d_coeff + torch.where(row < 0, 0, grad_b.index_select(0, indices))
        if ctx.needs_input_grad[3]:
            d_rows = decode_pairs(coeff, indices, row, grad_W, rows.shape[0], ctx.backend)
        return d_coeff, None, None, d_rows, None, None


def decode(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    offsets: Tensor,  # (B + 1,)
    W: Tensor,  # (n, d)
    backend: str,
) -> Tensor:
    """Σ_j values_j W[indices_j] of each row: (B, d); contiguous inputs, nothing checked."""
    whole = (values, indices, offsets, W, None, [W.shape[0]])
    if tracked(values, W):
        return _Decode.apply(*whole, backend, False)[0]
    return call(backend, "ragged_decode", *whole)[0]


def decode_pairs(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,) in any order, -1 for none
    W: Tensor,  # (n, d)
    rows: int,
    backend: str,
) -> Tensor:
    """The same of pairs in any order: (rows, d)."""
    row, order = torch.sort(row, stable=True)
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    return decode(values[order], indices[order], offsets, W, backend)


def dot(
    rows: Tensor,  # (R, d)
    row: Tensor,  # (m,), -1 for none
    indices: Tensor,  # (m,)
    W: Tensor,  # (n, d)
    backend: str,
) -> Tensor:
    """⟨rows[row_p], W[indices_p]⟩, 0 for a pair without a row: (m,)."""
    if tracked(rows, W):
        return _Dot.apply(rows, row, indices, W, backend)
    return call(backend, "ragged_dot", rows, row, indices, W)


def outer(
    coeff: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,), -1 for none
    rows: Tensor,  # (R, d)
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Segment sums Σ coeff·rows and Σ coeff over the pairs of each feature: (n, d), (n,)."""
    if tracked(coeff, rows):
        return _Outer.apply(coeff, indices, row, rows, n, backend)
    return call(backend, "ragged_outer", coeff, indices, row, rows, n)


def pair_gradient(
    coeff: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    row: Tensor,  # (m,), -1 for none
    rows: Tensor,  # (R, d)
    W: Tensor,  # (n, d)
    backend: str,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """``outer`` as the caller wants it: dense, or of the rows in use alone."""
    n = W.shape[0]
    if not sparse:
        return outer(coeff, indices, row, rows, n, backend)
    if tracked(coeff, rows):
        raise RuntimeError("sparse_grad gives first derivatives only; leave it out to go further")
    features, compact = torch.unique(indices, return_inverse=True)
    d_W, d_b = outer(coeff, compact, row, rows, features.numel(), backend)
    d_W = torch.sparse_coo_tensor(
        features[None], d_W, (n, rows.shape[1]), is_coalesced=True, check_invariants=False
    )
    return d_W, torch.zeros(n, dtype=d_b.dtype, device=d_b.device).index_copy(0, features, d_b)


def needs_compiled(op: str, sparse_grad: bool, backend: str) -> None:
    """RuntimeError where rows alone are asked of the reference, which has none."""
    if sparse_grad and backend == "reference":
        raise RuntimeError(
            f'{op}: sparse_grad needs a compiled backend, and this call runs on "reference"; leave '
            "it out, or see clipsteer env for how to get one"
        )


def ragged_decode(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    offsets: Tensor,  # (B + 1,)
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
    *,
    prefixes: Sequence[int] | None = None,
    backend: str = "auto",
    sparse_grad: bool = False,
) -> Tensor:
    """Decode codes of as many features as each row has: ``ragged_decode(*codes, W_dec, b_dec)``.

    Args:
        values, indices, offsets: the three parts of ``SparseCodes``.
        W_dec: (d_sae, d_in) dictionary, a feature a row, of ``values``' dtype.
        b_dec: (d_in,) or None.
        prefixes: n_1 < n_2 < … = d_sae: one reconstruction from the features below each of them,
            as a Matryoshka SAE is trained on.
        backend: ``"auto" | "reference" | "cpp"``; ``ops.explain`` says which can run.
        sparse_grad: the gradient of ``W_dec`` is a sparse COO tensor of the rows in use.

    Returns:
        (B, d_in), or (G, B, d_in) for G prefixes; rounded once from float32 accumulation for half
        precisions. All gradients are exact and repeat bit for bit.

    Raises:
        ValueError: shapes, devices, prefixes or indices that do not fit.
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Bussmann et al. 2025 (arXiv 2503.17547).
    """
    op = "ragged_decode"
    named: dict[str, Any] = {
        "values": values,
        "indices": indices,
        "offsets": offsets,
        "W_dec": W_dec,
        "b_dec": b_dec,
    }
    if all(isinstance(t, Tensor) for t in (values, W_dec)):
        values, W_dec, b_dec = _check.autocast(values, W_dec, b_dec)
        named.update(values=values, W_dec=W_dec, b_dec=b_dec)
    _check.check_tensors(op, named, integer=("indices", "offsets"))
    if W_dec.dim() != 2:
        expected = "of shape (d_sae, d_in)"
        raise ValueError(_check.mistake(op, "W_dec", expected, tuple(W_dec.shape), named))
    if values.dim() != 1 or values.shape != indices.shape:
        expected = "of indices' shape (m,)"
        raise ValueError(_check.mistake(op, "values", expected, tuple(values.shape), named))
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        expected = "of shape (B + 1,)"
        raise ValueError(_check.mistake(op, "offsets", expected, tuple(offsets.shape), named))
    n = W_dec.shape[0]
    _check.check_shape(op, named, "b_dec", (W_dec.shape[1],), "(d_in,)")
    _check.check_indices(op, indices, n, named)
    if prefixes is not None:
        ascending = all(a < b for a, b in zip([0, *prefixes], prefixes))
        if not ascending or not prefixes or prefixes[-1] != n:
            raise ValueError(
                f"{op}: prefixes must ascend from above 0 to d_sae = {n}, got {tuple(prefixes)}"
            )
    backend = choose(op, backend, values)
    needs_compiled(op, sparse_grad, backend)
    if backend == "reference":
        return ragged_decode_reference(values, indices, offsets, W_dec, b_dec, prefixes=prefixes)
    b = None if b_dec is None else b_dec.contiguous()
    # a compiler may take them for symbols, which a node of autograd cannot keep
    limits = [n] if prefixes is None else [int(prefix) for prefix in prefixes]
    x_hat = _Decode.apply(
        values.contiguous(),
        indices.contiguous(),
        offsets.contiguous(),
        W_dec.contiguous(),
        b,
        limits,
        backend,
        sparse_grad,
    )
    return x_hat[0] if prefixes is None else x_hat
