"""``sparse_decode``: x_hat = Σ_j acts_j · W_dec[indices_j] + b_dec, a gather that never builds the
dense code.

Fused: the gathered rows are summed as they are read, so the (B, k, d_in) intermediate does not
exist. Its gradients, ``gather_dot`` (for acts) and ``sparse_outer`` (for the dictionary), are sums
of the same kind, and the three are closed under differentiation: every derivative of any order runs
on the same kernels. Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import call, choose, tracked
from clipsteer.ops._reference import rounded_once, rows_of

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


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        acts,  # (B, k)
        indices,  # (B, k)
        W,  # (n, d)
        b,  # (d,) or None
        backend,
        sparse_grad,
        grad_buffer,
    ):
        ctx.save_for_backward(acts, indices, W)
        ctx.options = backend, sparse_grad, grad_buffer
        return call(backend, "sparse_decode", acts, indices, W, b)

    @staticmethod
    def backward(ctx, grad):
        acts, indices, W = ctx.saved_tensors
        backend, sparse_grad, grad_buffer = ctx.options
        grad = grad.contiguous()
        d_acts = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_acts = gather_dot(grad, indices, W, backend)
        if ctx.needs_input_grad[2]:
            d_W, _ = weight_gradient(acts, indices, grad, W, backend, sparse_grad, grad_buffer)
        if ctx.needs_input_grad[3]:
            d_b = grad.sum(0)
        return d_acts, None, d_W, d_b, None, None, None


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rows,  # (B, d)
        indices,  # (B, k)
        W,  # (n, d)
        backend,
    ):
        ctx.save_for_backward(rows, indices, W)
        ctx.backend = backend
        return call(backend, "gather_dot", rows, indices, W)

    @staticmethod
    def backward(ctx, grad):
        rows, indices, W = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = d_W = None
        if ctx.needs_input_grad[0]:
            d_rows = decode(grad, indices, W, None, ctx.backend)
        if ctx.needs_input_grad[2]:
            d_W, _ = sparse_outer(grad, indices, rows, W.shape[0], ctx.backend)
        return d_rows, None, d_W, None


class _SparseOuter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        coeff,  # (B, k)
        indices,  # (B, k)
        rows,  # (B, d)
        n,
        backend,
    ):
        ctx.save_for_backward(coeff, indices, rows)
        ctx.backend = backend
        return call(backend, "sparse_outer", coeff, indices, rows, n)

    @staticmethod
    def backward(ctx, grad_W, grad_b):
        coeff, indices, rows = ctx.saved_tensors
        grad_W = grad_W.contiguous()
        d_coeff = d_rows = None
        if ctx.needs_input_grad[0]:
            d_coeff = gather_dot(rows, indices, grad_W, ctx.backend) + rows_of(grad_b, indices)
        if ctx.needs_input_grad[2]:
            d_rows = decode(coeff, indices, grad_W, None, ctx.backend)
        return d_coeff, None, d_rows, None, None


def decode(
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    W: Tensor,  # (n, d)
    b: Tensor | None,  # (d,)
    backend: str,
) -> Tensor:
    """Σ_j acts_bj W[indices_bj] + b: (B, d); contiguous inputs, nothing checked."""
    if tracked(acts, W):
        return _SparseDecode.apply(acts, indices, W, b, backend, False, None)
    return call(backend, "sparse_decode", acts, indices, W, b)


def gather_dot(
    rows: Tensor,  # (B, d)
    indices: Tensor,  # (B, k)
    W: Tensor,  # (n, d)
    backend: str,
) -> Tensor:
    """⟨rows_b, W[indices_bj]⟩: (B, k)."""
    if tracked(rows, W):
        return _GatherDot.apply(rows, indices, W, backend)
    return call(backend, "gather_dot", rows, indices, W)


def sparse_outer(
    coeff: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    rows: Tensor,  # (B, d)
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Segment sums Σ coeff·rows and Σ coeff over the pairs of each feature: (n, d), (n,)."""
    if tracked(coeff, rows):
        return _SparseOuter.apply(coeff, indices, rows, n, backend)
    return call(backend, "sparse_outer", coeff, indices, rows, n)


def weight_gradient(
    coeff: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    rows: Tensor,  # (B, d)
    W: Tensor,  # (n, d)
    backend: str,
    sparse: bool,
    buffer: Tensor | None,  # (n, d)
) -> tuple[Tensor, Tensor]:
    """``sparse_outer`` as the caller wants it: dense, row-sparse, or written into a kept buffer."""
    n = W.shape[0]
    if (sparse or buffer is not None) and tracked(coeff, rows):
        what = "sparse_grad and grad_buffer give first derivatives only"
        raise RuntimeError(f"{what}; leave them out to go further")
    if sparse:
        features, compact = torch.unique(indices, return_inverse=True)
        d_W, d_b = call(
            backend,
            "sparse_outer",
            coeff,
            compact.contiguous(),
            rows,
            features.numel(),
        )
        d_W = torch.sparse_coo_tensor(
            features[None],
            d_W,
            (n, rows.shape[1]),
            is_coalesced=True,
            check_invariants=False,
        )
        return d_W, torch.zeros(n, dtype=d_b.dtype, device=d_b.device).index_copy(0, features, d_b)
    if buffer is not None and not torch.compiler.is_compiling() and not _holds_gradient(buffer, W):
        d_b = rows.new_empty(n)
        call(backend, "sparse_outer_out", coeff, indices, rows, buffer.detach(), d_b)
        return buffer.detach(), d_b
    return sparse_outer(coeff, indices, rows, n, backend)


def _holds_gradient(buffer: Tensor, W: Tensor) -> bool:
    """Whether the gradient of an earlier backward pass still lives in ``buffer``: then it has to be
    added to."""
    return W.is_leaf and W.grad is not None and W.grad.data_ptr() == buffer.data_ptr()


def check_gradient_options(
    op: str,
    W: Tensor,  # (d_sae, d_in)
    sparse_grad: bool,
    grad_buffer: Tensor | None,  # (d_sae, d_in)
    backend: str,
) -> None:
    """ValueError or RuntimeError where the two options do not fit the dictionary or the backend."""
    if grad_buffer is not None:
        if sparse_grad:
            raise ValueError(f"{op}: sparse_grad and grad_buffer exclude each other")
        fits = grad_buffer.shape == W.shape and grad_buffer.dtype == W.dtype
        fits = fits and grad_buffer.device == W.device and grad_buffer.is_contiguous()
        if not fits:
            expected = f"{tuple(W.shape)} {W.dtype} on {W.device}"
            got = f"{tuple(grad_buffer.shape)} {grad_buffer.dtype} on {grad_buffer.device}"
            like = f"contiguous and like the dictionary, {expected}"
            raise ValueError(f"{op}: grad_buffer must be {like}, got {got}")
        if grad_buffer.requires_grad:
            raise ValueError(f"{op}: grad_buffer must not require a gradient")
    if backend == "reference" and (sparse_grad or grad_buffer is not None):
        raise RuntimeError(
            f"{op}: sparse_grad and grad_buffer need a compiled backend, and this call runs on "
            '"reference"; leave them out, or see clipsteer env for how to get one'
        )


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
            returned as; keep it from step to step to avoid the page faults of a fresh one. Each
            dictionary and each use of it in one step needs its own. While ``W_dec.grad`` still
            lives in it (gradients are accumulated), a fresh tensor is added to it. Ignored under
            ``torch.compile``.

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
    check_gradient_options(op, W_dec, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        return sparse_decode_reference(acts, indices, W_dec, b_dec)
    shape = (acts.shape[:-1].numel(), acts.shape[-1])
    flat = acts.reshape(shape).contiguous()
    flat_indices = indices.reshape(shape).contiguous()
    W = W_dec.contiguous()
    b = None if b_dec is None else b_dec.contiguous()
    x_hat = _SparseDecode.apply(flat, flat_indices, W, b, backend, sparse_grad, grad_buffer)
    return x_hat.reshape(*acts.shape[:-1], W_dec.shape[1])
