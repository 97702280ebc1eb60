"""``sparse_decode``: x_hat = Σ_j acts_j · W_dec[indices_j] + b_dec, a gather that never builds the
dense code.

Fused: the gathered rows are summed as they are read, so the (B, k, d_in) intermediate does not
exist. Its gradients, ``gather_dot`` (for acts) and ``sparse_outer`` (for the dictionary), are sums
of the same kind, and the three are closed under differentiation: every derivative of any order runs
on the same kernels. Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
"""

from __future__ import annotations

import math

from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import choose
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._sparse import check_gradient_options as check_gradient_options
from clipsteer.ops._sparse import decode, with_gradient_options
from clipsteer.ops._sparse import gather_dot as gather_dot
from clipsteer.ops._sparse import sparse_outer as sparse_outer
from clipsteer.ops._sparse import weight_gradient as weight_gradient

__all__ = ["sparse_decode", "sparse_decode_reference"]


@rounded_once
def sparse_decode_reference(
    acts: Tensor,  # (..., k)
    indices: Tensor,  # (..., k)
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
) -> Tensor:
    """The definition in plain torch; any leading shape, any float dtype, twice differentiable."""
    x_hat = (acts.unsqueeze(-1) * rows_of(W_dec, indices)).sum(-2)
    return x_hat if b_dec is None else x_hat + b_dec


def sparse_decode(
    acts: Tensor,  # (..., k)
    indices: Tensor,  # (..., k)
    W_dec: Tensor,  # (d_sae, d_in)
    b_dec: Tensor | None = None,  # (d_in,)
    *,
    backend: str = "auto",
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,
) -> Tensor:
    """Decode sparse codes: ``x_hat[b] = Σ_j acts[b, j] · W_dec[indices[b, j]] + b_dec`` (duplicate
    indices add up).

    Args:
        acts: (..., k) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        indices: (..., k) int64 feature numbers in [0, d_sae).
        W_dec: (d_sae, d_in) dictionary, a feature a row, of ``acts``' dtype.
        b_dec: (d_in,) or None.
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
        (..., d_in), rounded once from float32 accumulation for half precisions. All gradients, of
        any order (with ``sparse_grad`` and ``grad_buffer``: of the first), are exact derivatives
        and repeat bit for bit.

    Raises:
        ValueError: shapes, devices or indices that do not fit (on a GPU indices are checked only
            under ``CLIPSTEER_CHECK_INDICES=1``, because the check synchronises; compiled code
            raises IndexError).
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
    """
    op = "sparse_decode"
    given = W_dec
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
    _check.check_shape(op, named, "b_dec", (W_dec.shape[1],), "(d_in,)")
    _check.check_indices(op, indices, W_dec.shape[0], named)
    backend = choose(op, backend, acts)
    W_dec, grad_buffer = with_gradient_options(op, given, W_dec, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        return sparse_decode_reference(acts, indices, W_dec, b_dec)
    # math.prod keeps a symbolic batch, which Size.numel() makes a number of
    shape = (math.prod(acts.shape[:-1]), acts.shape[-1])
    flat = acts.reshape(shape).contiguous()
    flat_indices = indices.reshape(shape).contiguous()
    W = W_dec.contiguous()
    b = None if b_dec is None else b_dec.contiguous()
    x_hat = decode(flat, flat_indices, W, b, backend, sparse_grad, grad_buffer)
    return x_hat.reshape(*acts.shape[:-1], W_dec.shape[1])
