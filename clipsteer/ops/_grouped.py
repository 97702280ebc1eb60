"""Differentiable products of rows with the matrix of their group; the low-level ops of
``csrc/cpu/conceptor_project.cpp``.

Row b belongs to group ``index[b]`` (None: all to the only one). ``matmul``, ``outer`` and
``low_rank`` are closed under differentiation, so derivatives of any order run on the same kernels.
Halves keep β and s, and every sum over rows of a product of two stored vectors, in float32. Nothing
is checked here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._dispatch import call
from clipsteer.ops._reference import rows_of
from clipsteer.ops._steps import contiguous_if


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_rows(t: Tensor, index: Tensor | None) -> Tensor:
    """A group's row of ``t`` for each row of the batch, or one that broadcasts."""
    return t if index is None else rows_of(t, index)


def _centred(x: Tensor, index: Tensor | None, mean: Tensor | None) -> Tensor:
    return x if mean is None else x - _of_rows(mean, index)


class Matmul(Function):
    @staticmethod
    def forward(
        x,  # (B, m)
        W,  # (K, m, n)
        index,  # (B,) or None
        beta,  # (K,) or None
        mean,  # (K, m) or None
        transpose,
        backend,
    ):
        return call(backend, "grouped_matmul", x, W, index, beta, mean, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, transpose, backend = inputs
        save(ctx, *tensors)
        ctx.options = transpose, backend

    @staticmethod
    def backward(ctx, grad):
        x, W, index, beta, mean = ctx.saved_tensors
        transpose, backend = ctx.options
        need_x, need_W, _, need_beta, need_mean, *_ = ctx.needs_input_grad
        d_x = d_W = d_beta = d_mean = None
        centred = _centred(x, index, mean) if need_W or need_beta else x
        if beta is not None and (need_W or need_beta):
            of_rows = _of_rows(beta.unsqueeze(-1), index)  # (B, 1) or (1, 1)
        if need_beta:
            plain = matmul(grad, W, index, None, None, not transpose, backend)
            plain = plain.to(beta.dtype)
            dots = (plain * centred.to(beta.dtype)).sum(-1, keepdim=True)
            d_beta = group_sum(dots, index, W.shape[0], backend).squeeze(-1)
            d_x = (plain * of_rows).to(x.dtype)
        elif need_x or need_mean:
            d_x = matmul(grad, W, index, beta, None, not transpose, backend)
        if need_mean:
            d_mean = _mean_gradient(grad, d_x, index, mean, backend)
        if need_W:
            scaled = grad if beta is None else (grad * of_rows).to(x.dtype)
            pair = (scaled, centred) if transpose else (centred, scaled)
            d_W = outer(*pair, index, W.shape[0], backend)
        return d_x if need_x else None, d_W, None, d_beta, d_mean, None, None

    @staticmethod
    def jvp(ctx, t_x, t_W, _, t_beta, t_mean, *options):
        x, W, index, beta, mean = ctx.saved_tensors
        transpose, backend = ctx.options
        t_x, of_mean = _moved(t_x, t_mean, index, x.shape[0])
        centred = _centred(x, index, mean)
        of_x = of_W = of_beta = None
        if t_x is not None:
            of_x = matmul(t_x, W, index, beta, None, transpose, backend)
        if t_W is not None:
            of_W = matmul(centred, t_W, index, beta, None, transpose, backend)
        if t_beta is not None:
            of_beta = matmul(centred, W, index, t_beta, None, transpose, backend)
        return total(of_x, of_W, of_beta, of_mean)


class Outer(Function):
    @staticmethod
    def forward(
        a,  # (B, m)
        b,  # (B, n)
        index,  # (B,) or None
        groups,
        backend,
    ):
        return call(backend, "grouped_outer", a, b, index, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.groups, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad):
        a, b, index = ctx.saved_tensors
        d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_a = matmul(b, grad, index, None, None, True, ctx.backend)
        if ctx.needs_input_grad[1]:
            d_b = matmul(a, grad, index, None, None, False, ctx.backend)
        return d_a, d_b, None, None, None

    @staticmethod
    def jvp(ctx, t_a, t_b, *options):
        a, b, index = ctx.saved_tensors
        of_a = None if t_a is None else outer(t_a, b, index, ctx.groups, ctx.backend)
        of_b = None if t_b is None else outer(a, t_b, index, ctx.groups, ctx.backend)
        return total(of_a, of_b)


class LowRank(Function):
    @staticmethod
    def forward(
        x,  # (B, d)
        U,  # (K, d, r)
        s,  # (K, r)
        index,  # (B,) or None
        mean,  # (K, d) or None
        backend,
    ):
        return call(backend, "low_rank_project", x, U, s, index, mean)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx, grad):
        x, U, s, index, mean = ctx.saved_tensors
        need_x, need_U, need_s, _, need_mean, _ = ctx.needs_input_grad
        d_x = d_U = d_s = d_mean = None
        if need_x or need_mean:
            d_x = low_rank(grad, U, s, index, None, ctx.backend)
        if need_mean:
            d_mean = _mean_gradient(grad, d_x, index, mean, ctx.backend)
        if need_U or need_s:
            rows = x.shape[0]
            K = U.shape[0]
            wide = compute_dtype(x.dtype)
            # x and the gradient take the same way through U: one product for both
            both = torch.cat([_centred(x, index, mean), grad])
            twice = None if index is None else torch.cat([index, index])
            in_U = matmul(both, U, twice, None, None, False, ctx.backend)  # (2 B, r)
            in_U = in_U.to(wide)
            p = in_U[:rows]
            q = in_U[rows:]
            if need_s:
                d_s = group_sum(p * q, index, K, ctx.backend).to(s.dtype)
            if need_U:
                partners = torch.cat([q, p]) * _of_rows(s, twice)
                d_U = outer(both, partners.to(x.dtype), twice, K, ctx.backend)
        return d_x if need_x else None, d_U, d_s, None, d_mean, None

    @staticmethod
    def jvp(ctx, t_x, t_U, t_s, _, t_mean, *options):
        x, U, s, index, mean = ctx.saved_tensors
        backend = ctx.backend
        t_x, of_mean = _moved(t_x, t_mean, index, x.shape[0])
        centred = _centred(x, index, mean)
        of_x = of_s = left = right = None
        if t_x is not None:
            of_x = low_rank(t_x, U, s, index, None, backend)
        if t_s is not None:
            of_s = low_rank(centred, U, t_s, index, None, backend)
        if t_U is not None:
            of_rows = _of_rows(s, index)

            def between(V: Tensor) -> Tensor:
                """s ∘ Vᵀ x: (B, r)."""
                inner = matmul(centred, V, index, None, None, False, backend)
                return (inner * of_rows).to(x.dtype)

            left = matmul(between(U), t_U, index, None, None, True, backend)
            right = matmul(between(t_U), U, index, None, None, True, backend)
        return total(of_x, of_s, left, right, of_mean)


def _moved(
    t_x: Tensor | None,  # (B, d)
    t_mean: Tensor | None,  # (K, d)
    index: Tensor | None,  # (B,)
    rows: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Tangents of x − μ and of the μ that is added again: (B, d) each."""
    if t_mean is None:
        return t_x, None
    of_mean = _of_rows(t_mean, index).expand(rows, -1)
    return (-of_mean if t_x is None else t_x - of_mean), of_mean


def _mean_gradient(
    grad: Tensor,  # (B, d)
    d_x: Tensor,  # (B, d)
    index: Tensor | None,  # (B,)
    mean: Tensor,  # (K, d)
    backend: str,
) -> Tensor:
    wide = compute_dtype(grad.dtype)
    moved = grad.to(wide) - d_x.to(wide)
    return group_sum(moved, index, mean.shape[0], backend).to(mean.dtype)


def matmul(
    x: Tensor,  # (B, m)
    W: Tensor,  # (K, m, n)
    index: Tensor | None,  # (B,)
    beta: Tensor | None,  # (K,)
    mean: Tensor | None,  # (K, m)
    transpose: bool,
    backend: str,
) -> Tensor:
    """β_k (x_b − μ_k) W_k + μ_k, W_kᵀ if ``transpose``: (B, n)."""
    args = (*map(contiguous_if, (x, W, index, beta, mean)), transpose)
    if tracked(x, W, beta, mean):
        return Matmul.run(*args, backend)
    return call(backend, "grouped_matmul", *args)


def outer(
    a: Tensor,  # (B, m)
    b: Tensor,  # (B, n)
    index: Tensor | None,  # (B,)
    groups: int,
    backend: str,
) -> Tensor:
    """Σ over the rows of each group of a_b ⊗ b_b, in ascending order: (K, m, n)."""
    args = (*map(contiguous_if, (a, b, index)), groups)
    if tracked(a, b):
        return Outer.run(*args, backend)
    return call(backend, "grouped_outer", *args)


def group_sum(v: Tensor, index: Tensor | None, groups: int, backend: str) -> Tensor:
    """Σ of each group's rows: (B, n) → (K, n)."""
    ones = v.new_ones(v.shape[0], 1)
    return outer(ones, v, index, groups, backend).squeeze(1)


def low_rank(
    x: Tensor,  # (B, d)
    U: Tensor,  # (K, d, r)
    s: Tensor,  # (K, r), of x's or a wider dtype
    index: Tensor | None,  # (B,)
    mean: Tensor | None,  # (K, d)
    backend: str,
) -> Tensor:
    """U_k (s_k ∘ U_kᵀ(x_b − μ_k)) + μ_k: (B, d)."""
    args = tuple(map(contiguous_if, (x, U, s, index, mean)))
    if tracked(x, U, s, mean):
        return LowRank.run(*args, backend)
    return call(backend, "low_rank_project", *args)
