"""Differentiable sums over sparse codes; the low-level ops of ``csrc/cpu/sparse_decode.cpp``.

``decode``, ``gather_dot`` and ``sparse_outer`` are closed under differentiation, so derivatives of
any order, forward and reverse, run on the same kernels. Nothing is checked here.

A dictionary (n, d) may lie as (d, n) where a backend takes that (``laid_out``); then its dense
gradient lies so, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._buffer import claimed
from clipsteer.ops._calls import in_full, transformed
from clipsteer.ops._dispatch import call
from clipsteer.ops._lowlevel import PORTABLE
from clipsteer.ops._reference import rows_of
from clipsteer.ops._steps import contiguous


def lies_across(W: Tensor) -> bool:
    """Whether a dictionary (n, d) lies as (d, n), as the weight of a linear layer does."""
    return not W.is_contiguous() and W.t().is_contiguous()


def laid_out(W: Tensor, backend: str) -> Tensor:
    """A dictionary (n, d) as the kernels of a backend read it: those of the CPU in both layouts."""
    if backend in ("cpp", PORTABLE) and lies_across(W):
        return W
    return contiguous(W)


class SparseDecode(Function):
    """``decode``, with the options that its dictionary's gradient has."""

    @staticmethod
    def forward(
        acts,  # (B, k)
        indices,  # (B, k)
        W,  # (n, d)
        b,  # (d,) or None
        backend,
        sparse_grad,
        grad_buffer,  # (n, d) or None
    ):
        return call(backend, "sparse_decode", acts, indices, W, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        acts, indices, W, _, *options = inputs
        save(ctx, acts, indices, W)
        ctx.options = options

    @staticmethod
    def backward(ctx, grad):
        acts, indices, W = ctx.saved_tensors
        backend, sparse_grad, grad_buffer = ctx.options
        grad = grad.contiguous()
        d_acts = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_acts = gather_dot(grad, indices, W, backend)
        if ctx.needs_input_grad[2]:
            d_W, _ = weight_gradient(
                acts, indices, grad, W, backend, sparse_grad, grad_buffer, bias=False
            )
        if ctx.needs_input_grad[3]:
            d_b = grad.sum(0)
        return d_acts, None, d_W, d_b, None, None, None

    @staticmethod
    def jvp(ctx, t_acts, _, t_W, t_b, *options):
        acts, indices, W = ctx.saved_tensors
        backend = ctx.options[0]
        of_acts = of_W = of_b = None
        if t_acts is not None:
            of_acts = decode(t_acts.contiguous(), indices, W, None, backend)
        if t_W is not None:
            of_W = decode(acts, indices, laid_out(t_W, backend), None, backend)
        if t_b is not None:
            of_b = t_b.expand(acts.shape[0], -1)
        return total(of_acts, of_W, of_b)


class GatherDot(Function):
    @staticmethod
    def forward(
        rows,  # (B, d)
        indices,  # (B, k)
        W,  # (n, d)
        backend,
    ):
        return call(backend, "gather_dot", rows, indices, W)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad):
        rows, indices, W = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = d_W = None
        if ctx.needs_input_grad[0]:
            d_rows = decode(grad, indices, W, None, ctx.backend)
        if ctx.needs_input_grad[2]:
            d_W, _ = sparse_outer(grad, indices, rows, W.shape[0], ctx.backend, lies_across(W))
        return d_rows, None, d_W, None

    @staticmethod
    def jvp(ctx, t_rows, _, t_W, *options):
        rows, indices, W = ctx.saved_tensors
        of_rows = of_W = None
        if t_rows is not None:
            of_rows = gather_dot(t_rows.contiguous(), indices, W, ctx.backend)
        if t_W is not None:
            of_W = gather_dot(rows, indices, laid_out(t_W, ctx.backend), ctx.backend)
        return total(of_rows, of_W)


class SparseOuter(Function):
    @staticmethod
    def forward(
        coeff,  # (B, k)
        indices,  # (B, k)
        rows,  # (B, d)
        n,
        across,
        backend,
    ):
        return call(backend, "sparse_outer", coeff, indices, rows, n, *across_if(across))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.n, ctx.across, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad_W, grad_b):
        coeff, indices, rows = ctx.saved_tensors
        grad_W = laid_out(grad_W, ctx.backend)
        d_coeff = d_rows = None
        if ctx.needs_input_grad[0]:
            d_coeff = gather_dot(rows, indices, grad_W, ctx.backend) + rows_of(grad_b, indices)
        if ctx.needs_input_grad[2]:
            d_rows = decode(coeff, indices, grad_W, None, ctx.backend)
        return d_coeff, None, d_rows, None, None, None

    @staticmethod
    def jvp(ctx, t_coeff, _, t_rows, *others):
        coeff, indices, rows = ctx.saved_tensors
        options = (ctx.n, ctx.backend, ctx.across)
        of_coeff = of_rows = (None, None)
        if t_coeff is not None:
            of_coeff = sparse_outer(t_coeff.contiguous(), indices, rows, *options)
        if t_rows is not None:
            of_rows = sparse_outer(coeff, indices, t_rows.contiguous(), *options)
        t_db = torch.zeros_like(of_rows[1]) if of_coeff[1] is None else of_coeff[1]
        return total(of_coeff[0], of_rows[0]), t_db


def decode(
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    W: Tensor,  # (n, d)
    b: Tensor | None,  # (d,)
    backend: str,
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,  # (n, d)
) -> Tensor:
    """Σ_j acts_bj W[indices_bj] + b: (B, d); contiguous inputs, nothing checked."""
    if tracked(acts, W, b):
        return SparseDecode.run(acts, indices, W, b, backend, sparse_grad, grad_buffer)
    return call(backend, "sparse_decode", acts, indices, W, b)


def gather_dot(
    rows: Tensor,  # (B, d)
    indices: Tensor,  # (B, k)
    W: Tensor,  # (n, d)
    backend: str,
) -> Tensor:
    """⟨rows_b, W[indices_bj]⟩: (B, k)."""
    if tracked(rows, W):
        return GatherDot.run(rows, indices, W, backend)
    return call(backend, "gather_dot", rows, indices, W)


def across_if(across: bool) -> tuple[bool, ...]:
    """What segment sums take after their other arguments; the CUDA library knows no layouts."""
    return (True,) if across else ()


def sparse_outer(
    coeff: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    rows: Tensor,  # (B, d)
    n: int,
    backend: str,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """Segment sums Σ coeff·rows and Σ coeff over the pairs of each feature: (n, d), which lies as
    (d, n) if ``across``, and (n,)."""
    if tracked(coeff, rows):
        return SparseOuter.run(coeff, indices, rows, n, across, backend)
    return call(backend, "sparse_outer", coeff, indices, rows, n, *across_if(across))


def weight_gradient(
    coeff: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    rows: Tensor,  # (B, d)
    W: Tensor,  # (n, d)
    backend: str,
    sparse: bool,
    buffer: Tensor | None,  # (n, d)
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``sparse_outer`` as the caller wants it: dense, row-sparse, or written into a kept buffer;
    a dense one in the layout of ``W``. Without ``bias`` nobody asks for the second sum."""
    found = optional_gradient(
        "sparse_outer", coeff, indices, (rows,), W.shape[0], backend, sparse, buffer, bias
    )
    if found is not None:
        return found
    return sparse_outer(coeff, indices, rows, W.shape[0], backend, lies_across(W))


def optional_gradient(
    low_level: str,
    coeff: Tensor,  # (B, k) or (m,)
    indices: Tensor,  # (B, k) or (m,)
    others: tuple[Tensor, ...],  # the rows (R, d) and, before them, of pairs the row (m,) of each
    n: int,
    backend: str,
    sparse: bool,
    buffer: Tensor | None,  # (n, d)
    bias: bool = True,
) -> tuple[Tensor, Tensor | None] | None:
    """Segment sums by a low-level op, of the rows in use alone or in a kept buffer; None where
    neither is asked for, or the buffer is taken."""
    rows = others[-1]
    if torch.compiler.is_compiling() or transformed():
        buffer = None
    # kernels of GPUs write by rows alone
    if backend != "cpp" and buffer is not None and not buffer.is_contiguous():
        buffer = None
    if (sparse or buffer is not None) and tracked(coeff, rows):
        what = "sparse_grad and grad_buffer give first derivatives only"
        raise RuntimeError(f"{what}; leave them out to go further")
    if sparse:
        features, d_W, d_b = _of_used(low_level, coeff, indices, others, n, backend)
        size = (n, rows.shape[1])
        # ascending, each once
        known = {"is_coalesced": True, "check_invariants": False}
        d_W = torch.sparse_coo_tensor(features, d_W, size, **known)
        if not bias:
            return d_W, None
        return d_W, d_b.new_zeros(n).index_copy_(0, features[0], d_b)
    if buffer is not None and (d_W := claimed(buffer)) is not None:
        d_b = rows.new_empty(n)
        call(backend, f"{low_level}_out", coeff, indices, *others, d_W, d_b)
        return d_W, d_b
    return None


def _of_used(
    low_level: str,
    coeff: Tensor,  # (B, k) or (m,)
    indices: Tensor,  # (B, k) or (m,)
    others: tuple[Tensor, ...],
    n: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The features in use, ascending (1, u), and their segment sums (u, d) and (u,)."""
    if backend == "cpp":
        return call(backend, f"{low_level}_used", coeff, indices, *others, n)
    features, compact = torch.unique(indices, return_inverse=True)
    sums = call(backend, low_level, coeff, compact.contiguous(), *others, len(features))
    return (features[None], *sums)


class _Cast(Function):
    """A dictionary in autocast's dtype; its gradient comes back as it was asked for."""

    @staticmethod
    def forward(
        W,  # (n, d)
        cast,  # the same in another dtype
        grad_buffer,  # (n, d), of W's dtype, or None
    ):
        return cast.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        W, cast, ctx.grad_buffer = inputs
        ctx.dtype = W.dtype
        ctx.cast_dtype = cast.dtype

    @staticmethod
    def backward(ctx, grad):
        if grad.is_sparse:  # which torch's own cast refuses
            d_W = torch.sparse_coo_tensor(
                grad._indices(),
                grad._values().to(ctx.dtype),
                grad.shape,
                is_coalesced=grad.is_coalesced(),
                check_invariants=False,
            )
            return d_W, None, None
        buffer = ctx.grad_buffer
        if buffer is not None and not grad.requires_grad and (d_W := claimed(buffer)) is not None:
            return d_W.copy_(grad), None, None
        return grad.to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx, t_W, *others):
        return None if t_W is None else t_W.to(ctx.cast_dtype)


def check_gradient_options(
    op: str,
    W: Tensor,  # (d_sae, d_in)
    sparse_grad: bool,
    grad_buffer: Tensor | None,  # (d_sae, d_in)
    backend: str,
    given: Tensor | None = None,  # (d_sae, d_in)
) -> None:
    """ValueError or RuntimeError where the two options do not fit the dictionary or the backend;
    ``given`` is the dictionary where ``W`` is what autocast made of it."""
    dtypes = [W.dtype] if given is None or given.dtype == W.dtype else [given.dtype, W.dtype]
    if grad_buffer is not None:
        if sparse_grad:
            raise ValueError(f"{op}: sparse_grad and grad_buffer exclude each other")
        fits = grad_buffer.shape == W.shape and grad_buffer.dtype in dtypes
        lies = grad_buffer.is_contiguous() or (lies_across(grad_buffer) and lies_across(W))
        fits = fits and grad_buffer.device == W.device and lies
        if not fits:
            expected = f"{tuple(W.shape)} {dtypes[0]} on {W.device}"
            if len(dtypes) > 1:
                expected += f" (or {W.dtype}, which autocast makes of it)"
            got = f"{tuple(grad_buffer.shape)} {grad_buffer.dtype} on {grad_buffer.device}"
            layout = "contiguous, or laid out as the dictionary" if lies_across(W) else "contiguous"
            like = f"{layout} and like the dictionary, {expected}"
            raise ValueError(f"{op}: grad_buffer must be {like}, got {got}")
        if grad_buffer.requires_grad:
            raise ValueError(f"{op}: grad_buffer must not require a gradient")
    if backend == "reference" and (sparse_grad or grad_buffer is not None):
        raise RuntimeError(
            f"{op}: sparse_grad and grad_buffer need a compiled backend, and this call runs on "
            '"reference"; leave them out, or see clipsteer env for how to get one'
        )
    source = W if given is None else given
    if sparse_grad and lies_across(source):
        in_full()  # a tensor's history is not of its kind
    if sparse_grad and source.grad_fn is not None and lies_across(source):
        raise RuntimeError(
            f"{op}: torch takes no row-sparse gradient through a transposition; leave sparse_grad "
            "out, or keep the dictionary as (d_sae, d_in)"
        )
    if sparse_grad and transformed():
        raise RuntimeError(
            f"{op}: torch.func takes no sparse gradients; leave sparse_grad out, on any backend"
        )


def with_gradient_options(
    op: str,
    given: Tensor,  # (d_sae, d_in)
    W: Tensor,  # (d_sae, d_in)
    sparse_grad: bool,
    grad_buffer: Tensor | None,  # (d_sae, d_in)
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The dictionary and the buffer that the op itself takes, once both options are checked.

    Where ``W`` is what autocast made of ``given``, its gradient has to be cast back: sparse ones as
    well, and into a buffer of ``given``'s dtype.
    """
    if not sparse_grad and grad_buffer is None:
        return W, None
    check_gradient_options(op, W, sparse_grad, grad_buffer, backend, given)
    cast_back = grad_buffer is None or grad_buffer.dtype != W.dtype
    if W.dtype == given.dtype or not cast_back:
        return W, grad_buffer
    return _Cast.run(given, W, grad_buffer), None
