"""``topk_encode``: acts, indices = relu and positions of the k largest of x W_encᵀ + b_enc, per
row; with a scale, of (x W_encᵀ + b_enc) · scale, and with columns, of these features alone.

Fused: the matrix product is filtered panel by panel while it is in cache (or in the tile that made
it), so the (B, d_sae) pre-activations are never stored. The filter is exact: a value is dropped
only when k others are larger. Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._calls import remembered
from clipsteer.ops._dispatch import call, choose, exporting_to_onnx
from clipsteer.ops._encoder import (
    named_by,
    pre_activations,
    readable,
    scaled,
    unscaled,
)
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._sparse import (
    decode,
    gather_dot,
    laid_out,
    sparse_outer,
    weight_gradient,
    with_gradient_options,
)
from clipsteer.ops._steps import as_given, as_rows, contiguous, contiguous_if

__all__ = ["topk_encode", "topk_encode_reference"]


@rounded_once
def topk_encode_reference(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    k: int,
    relu: bool = True,
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; ties go to the lower index (the earlier of ``columns``), a NaN
    anywhere in a row makes its acts NaN."""
    pre = pre_activations(x, W_enc, b_enc, scale, columns)
    # a stable sort orders equal values by index, and -0 + 0 is +0
    values, order = torch.sort(pre + 0.0, dim=-1, descending=True, stable=True)
    return _acts(pre, values[..., :k], relu), named_by(columns, order[..., :k])


def _acts(
    pre: Tensor,  # (..., m)
    values: Tensor,  # (..., k), the largest
    relu: bool,
) -> Tensor:
    acts = values.masked_fill(pre.isnan().any(-1, keepdim=True), float("nan"))
    return torch.relu(acts) if relu else acts


def _for_onnx(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None,  # (d_sae,)
    *,
    k: int,
    relu: bool,
    scale: Tensor | None,  # (d_sae,)
    columns: Tensor | None,  # (m,)
) -> tuple[Tensor, Tensor]:
    """The same for ONNX, which has no stable sort, but whose TopK gives ties to the lower index."""
    pre = pre_activations(x, W_enc, b_enc, scale, columns)
    values, indices = torch.topk(pre, k)
    return _acts(pre, values, relu), named_by(columns, indices)


class TopkEncode(Function):
    """Its first inputs are the low-level op's."""

    @staticmethod
    def forward(
        x,  # (B, d)
        W,  # (n, d), either way in memory
        b,  # (n,) or None
        k,
        screen,
        scale,  # (n,) or None
        columns,  # (m,) or None
        relu,
        backend,
        grad_backend,
        sparse_grad,
        grad_buffer,  # (n, d) or None
    ):
        return _low_level(backend, x, W, b, k, screen, scale, columns, relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, b, _, _, scale, _, ctx.relu = inputs[:8]
        acts, indices = output
        save(ctx, x, W, b, scale, acts, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.options = inputs[9:]

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 12
        x, W, b, scale, acts, indices = ctx.saved_tensors
        backend, sparse_grad, grad_buffer = ctx.options
        W = laid_out(W, backend)
        needs = ctx.needs_input_grad
        # (B, k)
        grad = torch.where(acts > 0, grad, 0) if ctx.relu else torch.where(acts.isnan(), 0, grad)
        d_x = d_W = d_b = d_scale = None
        if scale is not None and needs[5]:
            pre = _before_scale(ctx.relu, x, W, b, scale, acts, indices, backend)
            ones = x.new_ones(x.shape[0], 1)
            _, d_scale = sparse_outer((grad * pre).contiguous(), indices, ones, W.shape[0], backend)
        grad = scaled(grad, scale, indices).contiguous()
        if needs[0]:
            d_x = decode(grad, indices, W, None, backend)
        if needs[1] or needs[2]:
            d_W, d_b = weight_gradient(grad, indices, x, W, backend, sparse_grad, grad_buffer)
        d_W = d_W if needs[1] else None
        d_b = d_b if needs[2] else None
        return d_x, d_W, d_b, None, None, d_scale, *[None] * 6

    @staticmethod
    def jvp(ctx, t_x, t_W, t_b, *others):
        x, W, b, scale, acts, indices = ctx.saved_tensors
        backend = ctx.options[0]
        W = laid_out(W, backend)
        t_scale = others[2]
        of_x = of_W = of_b = of_scale = None
        if t_x is not None:
            of_x = gather_dot(t_x.contiguous(), indices, W, backend)
        if t_W is not None:
            of_W = gather_dot(x, indices, laid_out(t_W, backend), backend)
        if t_b is not None:
            of_b = t_b[indices]
        tangent = total(of_x, of_W, of_b)
        if tangent is not None:
            tangent = scaled(tangent, scale, indices)
        if t_scale is not None:
            pre = _before_scale(ctx.relu, x, W, b, scale, acts, indices, backend)
            of_scale = t_scale[indices] * pre
        tangent = total(tangent, of_scale)
        if tangent is None:
            return None, None
        alive = acts > 0 if ctx.relu else ~acts.isnan()
        return torch.where(alive, tangent, 0), None


def _before_scale(
    relu: bool,
    x: Tensor,  # (B, d)
    W: Tensor,  # (n, d)
    b: Tensor | None,  # (n,)
    scale: Tensor,  # (n,)
    acts: Tensor,  # (B, k)
    indices: Tensor,  # (B, k)
    backend: str,
) -> Tensor:
    """x W_encᵀ + b_enc of the codes: (B, k)."""
    if relu:
        return unscaled(acts, scale, indices)
    pre = gather_dot(x, indices, W, backend)
    return pre if b is None else pre + rows_of(b, indices)


def _low_level(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    # the CUDA library knows no options
    return call(backend, "topk_encode", *(arguments[:4] if backend == "cuda" else arguments))


@remembered
def topk_encode(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    k: int,
    relu: bool = True,
    scale: Tensor | None = None,  # (d_sae,)
    columns: Tensor | None = None,  # (m,)
    backend: str = "auto",
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,  # (d_sae, d_in)
    screen: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Encode to the k largest pre-activations of each row: ``relu(topk(x W_encᵀ + b_enc))``.

    Args:
        x: (..., d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype. The transpose of a
            contiguous (d_in, d_sae) is read where it lies, and its gradient lies so, too.
        b_enc: (d_sae,) or None. A decoder bias that is subtracted from x is folded in by the
            caller.
        k: how many, 1 ≤ k ≤ d_sae (or the number of ``columns``).
        relu: False leaves the k largest pre-activations as they are, negative ones among them.
        scale: (d_sae,) or None, finite, of any sign: what is compared, and returned, is
            (x W_encᵀ + b_enc) · scale.
        columns: (m,) int64 or None: only these features are looked at, where they lie. Indices are
            the features' own numbers in ``W_enc``, equal pre-activations go to the earlier of
            ``columns``, and gradients have the shapes of all of ``W_enc``, ``b_enc``, ``scale``.
        backend: ``"auto" | "reference" | "cpp" | "triton" | "cuda"``; ``ops.explain`` says which
            can run. ``"auto"`` takes sparse_decode's for the gradient.
        sparse_grad: the gradient of ``W_enc`` is a sparse COO tensor of the rows in use, as in
            ``F.embedding``.
        grad_buffer: a kept (d_sae, d_in) buffer for the gradient of ``W_enc``; see
            ``sparse_decode``.
        screen: ``"auto" | "off"``. On CPUs with AMX or AVX512-VNNI the cpp backend rules most
            columns of a large product, but for float64, out by int8 products and a proven bound of
            their error, and computes the rest in float32. Few rows of bfloat16, or many winners of
            them, are screened by products of pairs where the CPU has AVX512-BF16. The result is
            held to the same bound as without; only pre-activations closer than their rounding may
            change places, as between any two orders of summation. Its bits depend neither on the
            thread count nor on the other rows. Nothing is kept between calls.
            ``torch.ops.clipsteer_cpp.topk_encode_screened(x, W_enc, b_enc, k)`` (x of two
            dimensions; ``pairs=True`` for pairs) also returns how many columns of each row were
            computed in float32.

    Returns:
        acts (..., k) in descending order, not negative unless ``relu=False``; indices (..., k)
        int64. Equal pre-activations go to the lower index on every backend. A row with a NaN
        pre-activation has NaN acts; its indices stay in range and unique. The gradient holds the
        index set fixed and, with ``relu``, is 0 where the pre-activation is not positive.

    Raises:
        ValueError: shapes, devices, k or columns that do not fit.
        TypeError: not tensors, dtypes that differ outside autocast, k not an int.
        RuntimeError: the backend asked for cannot run here.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
    """
    op = "topk_encode"
    given = W_enc
    if all(isinstance(t, Tensor) for t in (x, W_enc)):
        x, W_enc, b_enc, scale = _check.autocast(x, W_enc, b_enc, scale)
    named = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "scale": scale, "columns": columns}
    _check.check_encoder(op, named, "...")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(_check.mistake(op, "k", "an int", type(k).__name__, named))
    most = W_enc.shape[0] if columns is None else columns.shape[0]
    if not 1 <= k <= most:
        what = "d_sae" if columns is None else "the number of columns"
        raise ValueError(_check.mistake(op, "k", f"in [1, {what} = {most}]", k, named))
    if screen not in ("auto", "off"):
        raise ValueError(f'{op}: screen must be "auto" or "off", got {screen!r}')
    asked = backend
    plain = relu and scale is None and columns is None
    backend = choose(op if plain else "topk_encode_options", backend, x)
    W_enc, grad_buffer = with_gradient_options(op, given, W_enc, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        definition = _for_onnx if exporting_to_onnx() else topk_encode_reference
        return definition(x, W_enc, b_enc, k=k, relu=relu, scale=scale, columns=columns)
    flat = contiguous(as_rows(x))
    W = readable(W_enc, backend)
    b, scale, columns = (contiguous_if(t) for t in (b_enc, scale, columns))
    arguments = (flat, W, b, k, screen == "auto", scale, columns, relu)
    if tracked(flat, W, b, scale):
        # the gradient is made of sparse_decode's operations, which another backend may be faster at
        faster = choose("sparse_decode", asked, x)
        grad_backend = backend if faster == "reference" else faster
        acts, indices = TopkEncode.run(*arguments, backend, grad_backend, sparse_grad, grad_buffer)
    else:
        acts, indices = _low_level(backend, *arguments)
    return as_given(acts, x.shape[:-1]), as_given(indices, x.shape[:-1])
