"""``jumprelu_encode``: codes pre · 1[pre > θ] of pre = x W_encᵀ + b_enc, with a gradient for θ.

The derivative of a jump is a delta; it is estimated by a rectangle K of width ε around θ:

    ∂ JumpReLU / ∂θ = -(θ / ε) K((pre - θ) / ε),    ∂ 1[pre > θ] / ∂θ = -(1 / ε) K((pre - θ) / ε)

Fused like ``threshold_encode``, whose codes above θ - ε/2 are all that either formula speaks of:
the (B, d_sae) pre-activations are never stored. Source: Rajamanoharan et al. 2024 (arXiv
2407.14435), equations 11 and 12.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._autograd import tracked
from clipsteer.ops._bounds import HALVES
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._encoder import readable
from clipsteer.ops._ragged import SparseCodes, code_rows
from clipsteer.ops._reference import rounded_once, rows_of
from clipsteer.ops._steps import contiguous, contiguous_if
from clipsteer.ops.threshold_encode import check_arguments, codes_where, threshold_encode

__all__ = ["JumpReLUCodes", "jumprelu", "jumprelu_encode", "jumprelu_encode_reference"]


class JumpReLUCodes(NamedTuple):
    """Codes of B rows, as ``SparseCodes`` are; those within the rectangle and below the threshold
    are there with value 0, since the threshold's gradient is made of theirs."""

    values: Tensor  # (m,) pre where it is above its threshold, else 0
    indices: Tensor  # (m,) int64, ascending in each row
    offsets: Tensor  # (B + 1,) int64, from 0
    active: Tensor  # (m,) 1 where above, else 0; its sum is L0, with a gradient for the threshold

    @property
    def codes(self) -> SparseCodes:
        """What ``ragged_decode`` takes."""
        return SparseCodes(self.values, self.indices, self.offsets)


def jumprelu(
    pre: Tensor,  # (...)
    threshold: Tensor,  # broadcasts with pre
    bandwidth: float | Tensor,  # ()
    above: Tensor | None = None,  # (...) bool
) -> tuple[Tensor, Tensor]:
    """pre where it is above its threshold, and whether it is (1 or 0), element by element.

    Gradients of any order, forward and reverse: those of the formulas above for the threshold, the
    jump held fixed for pre. NaN stays. ``above``: which of pre are above θ - ε/2, where they were
    looked at before they were rounded.
    """
    dtype = pre.dtype
    fixed = threshold.detach()
    # in pre's precision, as codes are selected
    level = fixed.to(dtype)
    below = pre <= level
    if not tracked(pre, threshold):
        return torch.where(below, 0, pre), (~below).to(dtype)
    half = bandwidth / 2
    above = pre > level - half if above is None else above
    near = above & (pre < level + half)
    if dtype in HALVES:
        pre = pre.float()
        threshold = threshold.float()
        fixed = fixed.float()
    # exactly 0, with the rectangle's gradient
    step = torch.where(near, threshold - fixed, 0) / bandwidth
    jump = step * torch.where(near, threshold / 2 + fixed / 2, 0)
    values = torch.where(below, 0, pre) - jump
    return values.to(dtype), ((~below).to(step.dtype) - step).to(dtype)


def jumped(
    codes: SparseCodes,
    threshold: Tensor,  # () or (d_sae,)
    bandwidth: float,
) -> JumpReLUCodes:
    """Codes above threshold - bandwidth / 2 as jumprelu has them."""
    # in float32 the gradients of halves are summed without another rounding
    wide = threshold.float() if threshold.dtype in HALVES else threshold
    which = codes.indices if wide.dim() else torch.zeros_like(codes.indices)
    # padding is no code, whatever the threshold of feature 0
    there = code_rows(codes) < codes.offsets.shape[0] - 1
    level = rows_of(wide.reshape(-1), which)
    values, active = jumprelu(codes.values, level, bandwidth, there)
    return JumpReLUCodes(values, codes.indices, codes.offsets, torch.where(there, active, 0))


@rounded_once
def jumprelu_encode_reference(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    threshold: Tensor,  # () or (d_sae,)
    bandwidth: float,
    capacity: int | None = None,
) -> JumpReLUCodes:
    """The definition in plain torch."""
    pre = F.linear(x, W_enc, b_enc)
    codes = codes_where(pre, pre > threshold.detach() - bandwidth / 2, capacity)
    return jumped(codes, threshold, bandwidth)


@remembered
def jumprelu_encode(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None = None,  # (d_sae,)
    *,
    threshold: Tensor,  # () or (d_sae,)
    bandwidth: float,
    capacity: int | None = None,
    backend: str = "auto",
    sparse_grad: bool = False,
) -> JumpReLUCodes:
    """Encode to all pre-activations that are larger than a threshold, which has a gradient.

    Args:
        x: (B, d_in) activations, float32, bfloat16, float16 or (reference, cpp) float64.
        W_enc: (d_sae, d_in) dictionary, a feature a row, of ``x``'s dtype.
        b_enc: (d_sae,) or None.
        threshold: one for all features, or one a feature; compared strictly. Not negative.
        bandwidth: ε, the width of the rectangle, in units of the pre-activations; positive.
        capacity, backend, sparse_grad: as in ``threshold_encode``.

    Returns ``JumpReLUCodes`` of all pre-activations above threshold - ε/2. Decode
    ``result.codes``; ``result.active.sum() / B`` is L0, a penalty. The gradients of x, W_enc and
    b_enc hold the set of codes fixed; that of the threshold is the rectangle's estimate of both
    outputs, whose second derivatives are those of the formulas.

    Raises:
        ValueError: shapes, devices, a bandwidth or a capacity that do not fit.
        TypeError: not tensors, or dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), equations 4, 11 and 12.
    """
    op = "jumprelu_encode"
    if not isinstance(threshold, Tensor):
        got = type(threshold).__name__
        raise TypeError(f"{op}: threshold must be a tensor, as it has a gradient, got {got}")
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"{op}: bandwidth must be positive and finite, got {bandwidth}")
    given = (x, W_enc, b_enc, threshold)
    if isinstance(x, Tensor) and isinstance(W_enc, Tensor):
        given = _check.autocast(*given)
    named: dict[str, Any] = dict(zip(("x", "W_enc", "b_enc", "threshold"), given))
    check_arguments(op, named | {"scale": None, "columns": None}, capacity)
    threshold = given[-1]
    plain = isinstance(bandwidth, (int, float)) and not (sparse_grad or tracked(*given))
    if plain and choose(op, backend, given[0]) == "cpp":
        return JumpReLUCodes(*_in_one(*given, bandwidth, -1 if capacity is None else capacity))
    codes = threshold_encode(
        x,
        W_enc,
        b_enc,
        threshold=step(_lowered, threshold, bandwidth),
        relu=False,
        capacity=capacity,
        backend=backend,
        sparse_grad=sparse_grad,
    )
    return step(_jumped, *codes, threshold, bandwidth)


def _in_one(
    x: Tensor,  # (B, d_in)
    W_enc: Tensor,  # (d_sae, d_in)
    b_enc: Tensor | None,  # (d_sae,)
    threshold: Tensor,  # () or (d_sae,)
    bandwidth: float,
    capacity: int,
) -> tuple[Tensor, ...]:
    """All four tensors from one low-level op, where none of them has a gradient."""
    W = readable(W_enc, "cpp")
    rest = (contiguous_if(b_enc), contiguous(threshold), bandwidth, capacity)
    return cast(tuple[Tensor, ...], call("cpp", "jumprelu_codes", contiguous(x), W, *rest))


def _lowered(threshold: Tensor, bandwidth: float) -> Tensor:
    return threshold - bandwidth / 2


def _jumped(
    values: Tensor,  # (m,)
    indices: Tensor,  # (m,)
    offsets: Tensor,  # (B + 1,)
    threshold: Tensor,  # () or (d_sae,)
    bandwidth: float,
) -> JumpReLUCodes:
    return jumped(SparseCodes(values, indices, offsets), threshold, bandwidth)
