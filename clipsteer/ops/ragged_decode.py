"""``ragged_decode``: x_hat = Σ_j values_j · W_dec[indices_j] + b_dec, over as many codes as each
row has, for every prefix of the dictionary at once.

Fused: the sum over the first features goes on into the sum over more of them, so that all prefixes
cost one pass over the codes; so does the way back (``_ragged.py``). ``sparse_decode`` runs on this
where it is given offsets or prefixes. Source: Bussmann et al. 2025 (arXiv 2503.17547) for the
prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import remembered
from clipsteer.ops._dispatch import choose
from clipsteer.ops._ragged import SparseCodes, code_rows, decode
from clipsteer.ops._reference import rounded_once
from clipsteer.ops._sparse import laid_out, with_gradient_options
from clipsteer.ops._steps import contiguous, contiguous_if

__all__ = ["SparseCodes", "code_rows", "ragged_decode", "ragged_decode_reference"]


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


@remembered
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
    grad_buffer: Tensor | None = None,  # (d_sae, d_in)
) -> Tensor:
    """Decode codes of as many features as each row has: ``ragged_decode(*codes, W_dec, b_dec)``.

    Args:
        values, indices, offsets: the three parts of ``SparseCodes``; here a row's features may come
            in any order, and more than once.
        W_dec: (d_sae, d_in) dictionary, a feature a row, of ``values``' dtype.
        b_dec: (d_in,) or None.
        prefixes: n_1 < n_2 < … = d_sae: one reconstruction from the features below each of them,
            as a Matryoshka SAE is trained on.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.
        sparse_grad: the gradient of ``W_dec`` is a sparse COO tensor of the rows in use.
        grad_buffer: a kept (d_sae, d_in) buffer for the gradient of ``W_dec``; see
            ``sparse_decode``.

    Returns:
        (B, d_in), or (G, B, d_in) for G prefixes; rounded once from float32 accumulation for half
        precisions. All gradients are exact and repeat bit for bit.

    Raises:
        ValueError: shapes, devices, prefixes, offsets or indices that do not fit.
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Bussmann et al. 2025 (arXiv 2503.17547).
    """
    op = "ragged_decode"
    codes = {"values": values, "indices": indices, "offsets": offsets}
    return decoded(op, op, codes, W_dec, b_dec, prefixes, backend, sparse_grad, grad_buffer)


def decoded(
    op: str,
    kernel: str,
    codes: dict[str, Tensor],
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None,  # (d_in,)
    prefixes: Sequence[int] | None,
    backend: str,
    sparse_grad: bool,
    grad_buffer: Tensor | None,  # (d_sae, d_in)
) -> Tensor:
    """The public op ``op`` on ragged codes: values (m,), under the name they have there, indices
    (m,) and offsets (B + 1,). ``kernel`` is what dispatch knows the case by."""
    name = next(iter(codes))
    values, indices, offsets = codes.values()
    given = W_dec
    named: dict[str, Any] = {**codes, "W_dec": W_dec, "b_dec": b_dec}
    if all(isinstance(t, Tensor) for t in (values, W_dec)):
        values, W_dec, b_dec = _check.autocast(values, W_dec, b_dec)
        named.update({name: values, "W_dec": W_dec, "b_dec": b_dec})
    _check.check_tensors(op, named, integer=("indices", "offsets"))
    if W_dec.dim() != 2:
        expected = "of shape (d_sae, d_in)"
        raise ValueError(_check.mistake(op, "W_dec", expected, tuple(W_dec.shape), named))
    if values.dim() != 1 or values.shape != indices.shape:
        expected = "of indices' shape (m,)"
        raise ValueError(_check.mistake(op, name, expected, tuple(values.shape), named))
    n = W_dec.shape[0]
    _check.check_shape(op, named, "b_dec", (W_dec.shape[1],), "(d_in,)")
    _check.check_indices(op, indices, n, named)
    _check.check_offsets(op, offsets, named)
    limits = checked_prefixes(op, prefixes, n)
    backend = choose(kernel, backend, values)
    W_dec, grad_buffer = with_gradient_options(op, given, W_dec, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        return ragged_decode_reference(values, indices, offsets, W_dec, b_dec, prefixes=prefixes)
    return decode(
        contiguous(values),
        contiguous(indices),
        contiguous(offsets),
        laid_out(W_dec, backend),
        contiguous_if(b_dec),
        limits,
        backend,
        sparse_grad,
        grad_buffer,
    )


def checked_prefixes(op: str, prefixes: Sequence[int] | None, n: int) -> list[int] | None:
    """What the low-level op takes."""
    if prefixes is None:
        return None
    # a compiler may take them for symbols, which a node of autograd cannot keep
    limits = [int(prefix) for prefix in prefixes]
    ascending = all(a < b for a, b in zip([0, *limits], limits))
    if not ascending or not limits or limits[-1] != n:
        raise ValueError(
            f"{op}: prefixes must ascend from above 0 to d_sae = {n}, got {tuple(prefixes)}"
        )
    return limits
