"""``sparse_decode``: x_hat = Σ_j acts_j · W_dec[indices_j] + b_dec, a gather that never builds the
dense code.

Fused: the gathered rows are summed as they are read, so the (B, k, d_in) intermediate does not
exist. Its gradients, ``gather_dot`` (for acts) and ``sparse_outer`` (for the dictionary), are sums
of the same kind, and the three are closed under differentiation: every derivative of any order runs
on the same kernels. Codes of as many features as each row has, and the prefixes of a Matryoshka
dictionary, are ``ragged_decode``'s. Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3;
Bussmann et al. 2025 (arXiv 2503.17547) for the prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._dispatch import choose
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._sparse import check_gradient_options as check_gradient_options
from clipsteer.ops._sparse import decode, laid_out, with_gradient_options
from clipsteer.ops._sparse import gather_dot as gather_dot
from clipsteer.ops._sparse import sparse_outer as sparse_outer
from clipsteer.ops._sparse import weight_gradient as weight_gradient
from clipsteer.ops._steps import as_given, as_rows, contiguous, contiguous_if
from clipsteer.ops.ragged_decode import decoded, ragged_decode_reference

__all__ = ["sparse_decode", "sparse_decode_reference"]


@rounded_once
def sparse_decode_reference(
    acts: Tensor,  # (..., k), or (m,) with offsets
    indices: Tensor,  # as acts
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
    *,
    offsets: Tensor | None = None,  # (B + 1,)
    prefixes: Sequence[int] | None = None,
) -> Tensor:
    """The definition in plain torch; any leading shape, any float dtype, twice differentiable."""
    if offsets is not None:
        return ragged_decode_reference(acts, indices, offsets, W_dec, b_dec, prefixes=prefixes)
    terms = acts.unsqueeze(-1) * rows_of(W_dec, indices)  # (..., k, d)
    if prefixes is None:
        x_hat = terms.sum(-2)
    else:
        below = [(indices < prefix).unsqueeze(-1) for prefix in prefixes]
        x_hat = torch.stack([torch.where(part, terms, 0).sum(-2) for part in below])
    return x_hat if b_dec is None else x_hat + b_dec


def _offsets(rows: int, k: int, device: torch.device) -> Tensor:
    """Of rows of k codes each: (rows + 1,)."""
    return torch.arange(rows + 1, device=device) * k


@remembered
def sparse_decode(
    acts: Tensor,  # (..., k), or (m,) with offsets
    indices: Tensor,  # as acts
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
    *,
    offsets: Tensor | None = None,  # (B + 1,)
    prefixes: Sequence[int] | None = None,
    backend: str = "auto",
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,  # (d_sae, d_in)
) -> Tensor:
    """Decode sparse codes: ``x_hat[b] = Σ_j acts[b, j] · W_dec[indices[b, j]] + b_dec`` (duplicate
    indices add up).

    Args:
        acts: (..., k) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        indices: (..., k) int64 feature numbers in [0, d_sae), in any order.
        W_dec: (d_sae, d_in) dictionary, a feature a row, of ``acts``' dtype. On a CPU it may lie as
            (d_sae, d_in) or as (d_in, d_sae), as the weight of a linear layer does: it is read
            where it lies, and its dense gradient lies so, too. Any other layout is copied.
        b_dec: (d_in,) or None.
        offsets: (B + 1,) int64, for ragged codes: ``acts`` and ``indices`` are then the values and
            indices (m,) of ``SparseCodes``.
        prefixes: n_1 < n_2 < … = d_sae: one reconstruction from the features below each of them,
            all in one pass over the codes, as a Matryoshka SAE is trained on.
        backend: ``"auto" | "reference" | "cpp" | "triton" | "cuda"``; ``ops.explain`` says which
            can run.
        sparse_grad: the gradient of ``W_dec`` is a sparse COO tensor of the rows in use, as in
            ``F.embedding``; not under ``torch.compile`` or DistributedDataParallel, which refuse
            such gradients.
        grad_buffer: a (d_sae, d_in) tensor that the gradient of ``W_dec`` is written into and
            returned as; keep it from step to step to avoid the page faults of a fresh one. It is
            written only while nothing else holds its memory: while a gradient that was returned as
            it still lives (gradients are accumulated, somebody keeps one, a second use in the same
            backward pass), and where the buffer is a view or a ``.grad`` itself, the gradient is a
            fresh tensor. So one buffer for each dictionary serves best, and any number is right.
            Inside autocast it may have the dictionary's dtype or autocast's. Ignored under
            ``torch.compile`` and ``torch.func``.

    Returns:
        (..., d_in), or (B, d_in) with offsets; with G prefixes (G, ..., d_in). Rounded once from
        float32 accumulation for half precisions. All gradients, of any order (with ``sparse_grad``
        and ``grad_buffer``: of the first), are exact derivatives and repeat bit for bit.

    Raises:
        ValueError: shapes, devices, prefixes, offsets or indices that do not fit (on a GPU the
            latter two are checked only under ``CLIPSTEER_CHECK_INDICES=1``, because the check
            synchronises; compiled code raises IndexError).
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3; Bussmann et al. 2025 (arXiv
        2503.17547).
    """
    op = "sparse_decode"
    options = (prefixes, backend, sparse_grad, grad_buffer)
    if offsets is not None:
        codes = {"acts": acts, "indices": indices, "offsets": offsets}
        return decoded(op, "ragged_decode", codes, W_dec, b_dec, *options)
    given = W_dec
    given_b = b_dec
    named = {"acts": acts, "indices": indices, "W_dec": W_dec, "b_dec": b_dec}
    if all(isinstance(t, Tensor) for t in (acts, W_dec)):
        acts, W_dec, b_dec = _check.autocast(acts, W_dec, b_dec)
        named.update(acts=acts, W_dec=W_dec, b_dec=b_dec)
    _check.check_tensors(op, named, integer=("indices",))
    if W_dec.dim() != 2:
        expected = "of shape (d_sae, d_in)"
        raise ValueError(_check.mistake(op, "W_dec", expected, tuple(W_dec.shape), named))
    if acts.dim() == 0 or acts.shape != indices.shape:
        expected = "of indices' shape (..., k)"
        raise ValueError(_check.mistake(op, "acts", expected, tuple(acts.shape), named))
    if prefixes is not None:
        flat, flat_indices = (step(torch.reshape, t, (-1,)) for t in (acts, indices))
        # math.prod keeps a symbolic batch, which Size.numel() makes a number of
        first = step(_offsets, math.prod(acts.shape[:-1]), acts.shape[-1], indices.device)
        codes = {"acts": flat, "indices": flat_indices, "offsets": first}
        x_hat = decoded(op, "sparse_decode_prefixes", codes, given, given_b, *options)
        return step(torch.reshape, x_hat, (len(prefixes), *acts.shape[:-1], W_dec.shape[1]))
    _check.check_shape(op, named, "b_dec", (W_dec.shape[1],), "(d_in,)")
    _check.check_indices(op, indices, W_dec.shape[0], named)
    backend = choose(op, backend, acts)
    W_dec, grad_buffer = with_gradient_options(op, given, W_dec, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        return sparse_decode_reference(acts, indices, W_dec, b_dec)
    flat = contiguous(as_rows(acts))
    flat_indices = contiguous(as_rows(indices))
    W = laid_out(W_dec, backend)
    b = contiguous_if(b_dec)
    x_hat = decode(flat, flat_indices, W, b, backend, sparse_grad, grad_buffer)
    return as_given(x_hat, acts.shape[:-1])
