"""``topk_encode``: acts, indices = relu and positions of the k largest of x W_encᵀ + b_enc, per
row.

Fused: the matrix product is filtered panel by panel while it is in cache (or in the tile that made
it), so the (B, d_sae) pre-activations are never stored. The filter is exact: a value is dropped
only when k others are larger. Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._autograd import Function, save, total, tracked
from clipsteer.ops._dispatch import call, choose, exporting_to_onnx
from clipsteer.ops._lowlevel import PORTABLE
from clipsteer.ops._reference import rounded_once
from clipsteer.ops._sparse import (
    decode,
    gather_dot,
    weight_gradient,
    with_gradient_options,
)

__all__ = ["topk_encode", "topk_encode_reference"]


@rounded_once
def topk_encode_reference(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; ties go to the lower index, a NaN anywhere in a row makes its
    acts NaN."""
    pre = F.linear(x, W_enc, b_enc)  # (..., d_sae)
    # a stable sort orders equal values by index, and -0 + 0 is +0
    values, order = torch.sort(pre + 0.0, dim=-1, descending=True, stable=True)
    values = values[..., :k]
    indices = order[..., :k]
    return torch.relu(values.masked_fill(pre.isnan().any(-1, keepdim=True), float("nan"))), indices


def _for_onnx(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None,  # (d_sae,)
    *,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The same for ONNX, which has no stable sort, but whose TopK gives ties to the lower index."""
    pre = F.linear(x, W_enc, b_enc)  # (..., d_sae)
    values, indices = torch.topk(pre, k)
    return torch.relu(values.masked_fill(pre.isnan().any(-1, keepdim=True), float("nan"))), indices


class TopkEncode(Function):
    @staticmethod
    def forward(
        x,  # (B, d)
        W,  # (n, d)
        b,  # (n,) or None
        k,
        backend,
        options,
        grad_backend,
        sparse_grad,
        grad_buffer,  # (n, d) or None
    ):
        return call(backend, "topk_encode", x, W, b, k, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W = inputs[:2]
        acts, indices = output
        save(ctx, x, W, acts, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 9
        x, W, acts, indices = ctx.saved_tensors
        backend, sparse_grad, grad_buffer = ctx.options
        grad = torch.where(acts > 0, grad, 0)  # (B, k)
        d_x = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = decode(grad, indices, W, None, backend)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_W, d_b = weight_gradient(grad, indices, x, W, backend, sparse_grad, grad_buffer)
        needs = ctx.needs_input_grad
        return d_x, d_W if needs[1] else None, d_b if needs[2] else None, *[None] * 6

    @staticmethod
    def jvp(ctx, t_x, t_W, t_b, *options):
        x, W, acts, indices = ctx.saved_tensors
        backend = ctx.options[0]
        of_x = of_W = of_b = None
        if t_x is not None:
            of_x = gather_dot(t_x.contiguous(), indices, W, backend)
        if t_W is not None:
            of_W = gather_dot(x, indices, t_W.contiguous(), backend)
        if t_b is not None:
            of_b = t_b[indices]
        tangent = total(of_x, of_W, of_b)
        return (None if tangent is None else torch.where(acts > 0, tangent, 0)), None


def topk_encode(
    x: Tensor,  # (..., d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    k: int,
    backend: str = "auto",
    sparse_grad: bool = False,
    grad_buffer: Tensor | None = None,  # (d_sae, d_in)
    screen: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Encode to the k largest pre-activations of each row: ``relu(topk(x W_encᵀ + b_enc))``.

    Args:
        x: (..., d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype.
        b_enc: (d_sae,) or None. A decoder bias that is subtracted from x is folded in by the
            caller.
        k: how many, 1 ≤ k ≤ d_sae.
        backend: ``"auto" | "reference" | "cpp" | "triton" | "cuda"``; ``ops.explain`` says which
            can run. ``"auto"`` takes sparse_decode's for the gradient.
        sparse_grad: the gradient of ``W_enc`` is a sparse COO tensor of the rows in use, as in
            ``F.embedding``.
        grad_buffer: a kept (d_sae, d_in) buffer for the gradient of ``W_enc``; see
            ``sparse_decode``.
        screen: ``"auto" | "off"``. On CPUs with AMX or AVX512-VNNI the cpp backend rules most
            columns of a large float32 product out by int8 products and a proven bound of their
            error, and computes the rest in float32. The result is held to the same bound as
            without; only pre-activations closer than their rounding may change places, as between
            any two orders of summation. Its bits depend neither on the thread count nor on the
            other rows. Nothing is kept between calls.
            ``torch.ops.clipsteer_cpp.topk_encode_screened(x, W_enc, b_enc, k)`` (x of two
            dimensions) also returns how many columns of each row were computed in float32.

    Returns:
        acts (..., k) in descending order, not negative; indices (..., k) int64. Equal
        pre-activations go to the lower index on every backend. A row with a NaN pre-activation has
        NaN acts; its indices stay in range and unique. The gradient holds the index set fixed and
        is 0 where the pre-activation is not positive.

    Raises:
        ValueError: shapes, devices or k that do not fit.
        TypeError: not tensors, dtypes that differ outside autocast, k not an int.
        RuntimeError: the backend asked for cannot run here.

    Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3.
    """
    op = "topk_encode"
    given = W_enc
    named = {"x": x, "W_enc": W_enc, "b_enc": b_enc}
    if all(isinstance(t, Tensor) for t in (x, W_enc)):
        x, W_enc, b_enc = _check.autocast(x, W_enc, b_enc)
        named.update(x=x, W_enc=W_enc, b_enc=b_enc)
    _check.check_encoder(op, named, "...")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(_check.mistake(op, "k", "an int", type(k).__name__, named))
    if not 1 <= k <= W_enc.shape[0]:
        expected = f"in [1, d_sae = {W_enc.shape[0]}]"
        raise ValueError(_check.mistake(op, "k", expected, k, named))
    if screen not in ("auto", "off"):
        raise ValueError(f'{op}: screen must be "auto" or "off", got {screen!r}')
    asked = backend
    backend = choose(op, backend, x)
    W_enc, grad_buffer = with_gradient_options(op, given, W_enc, sparse_grad, grad_buffer, backend)
    if backend == "reference":
        plain = _for_onnx if exporting_to_onnx() else topk_encode_reference
        return plain(x, W_enc, b_enc, k=k)
    # math.prod keeps a symbolic batch, which Size.numel() makes a number of
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    W = W_enc.contiguous()
    b = None if b_enc is None else b_enc.contiguous()
    options = (screen == "auto",) if backend in ("cpp", PORTABLE) else ()
    if tracked(flat, W, b):
        # the gradient is made of sparse_decode's operations, which another backend may be faster at
        faster = choose("sparse_decode", asked, x)
        grad_backend = backend if faster == "reference" else faster
        gradient = (grad_backend, sparse_grad, grad_buffer)
        acts, indices = TopkEncode.run(flat, W, b, k, backend, options, *gradient)
    else:
        acts, indices = call(backend, "topk_encode", flat, W, b, k, *options)
    return acts.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)
