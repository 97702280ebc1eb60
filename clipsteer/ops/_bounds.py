"""How far a result may be from the exact one: units of roundoff, and the a priori bound."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from clipsteer.kernels._precision import tf32_allowed

# Unit roundoff of the output, and of the arithmetic that accumulates it (halves accumulate in
# float32).
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
ACCUMULATE = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
}
HALVES = (torch.float16, torch.bfloat16)
TF32_OPERAND = 2.0**-10


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the sums of ``dtype`` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def smallest_normal(dtype: torch.dtype) -> float:
    """Of the arithmetic that accumulates ``dtype``: what is smaller may be lost."""
    return torch.finfo(accumulator(dtype)).smallest_normal


def flushed(dtype: torch.dtype, terms: Any, a: Any, b: Any) -> Any:
    """What a sum of ``terms`` products, Σ a_i b_i, may lose for good where a processor multiplies
    bfloat16 numbers by pairs (VDPBF16PS, TDPBF16PS), Σ|a| and Σ|b| given; 0 in any other dtype.

    A product of two of them is exact in float32. Whether both are added to each other first or to
    the sum one after the other, every addition is rounded to nearest and no term passes through
    more of them than there are terms: (terms + 1)·u of Σ|a||b| holds as for any order. But
    operands, products and sums below ω, the smallest normal number, count as 0 whatever the
    processor is set to. An operand costs at most ω times its partner; a product, a pair's sum and
    the sum with it cost ω each, and the latter two come once a pair: at most 2ω a term.

    Tiles (TDPBF16PS) take 16 pairs at a time, a part: even and odd products are added apart, each
    by a fused step, then both to each other and these to the sum. The first step and the first sum
    are exact: a term of m parts passes through at most 15 + 1 + (m − 1) additions, of a single part
    of p pairs through p, never more than there are terms. A step costs at most ω in place of its
    product. The two additions after it cost ω each, once a part, and of a part of one term only the
    last can cost anything, where its step did not: at most 2ω a term, too.
    """
    if dtype != torch.bfloat16:
        return 0.0
    return smallest_normal(dtype) * (2 * terms + a + b)


_ON_GPU = ContextVar("results were computed on a GPU", default=False)


@contextlib.contextmanager
def measured_on(device: Any) -> Iterator[None]:
    """What is checked inside was computed on ``device``: only a GPU's float32 products may have
    rounded operands."""
    token = _ON_GPU.set(torch.device(device).type != "cpu")
    try:
        yield
    finally:
        _ON_GPU.reset(token)


def operand_error(dtype: torch.dtype) -> float:
    """Relative error of a product when tensor cores may round float32 operands to TF32."""
    if dtype != torch.float32 or not _ON_GPU.get() or not tf32_allowed():
        return 0.0
    return 2 * TF32_OPERAND + TF32_OPERAND**2


def fraction_of_bound(
    value: Tensor,
    truth: Tensor,
    magnitude: Tensor,
    terms: Any,
    extra: float = 0.0,
    absolute: Any = 0.0,
) -> float:
    """Worst |value - truth| over its bound e + u(|truth| + e), e = g·m + ``absolute`` + tiny, where
    g = (terms + 1)·unit + ``extra``: what is computed is off by e, and is then rounded itself.

    ``truth`` and ``magnitude`` (the same sum taken over absolute values) are float64; ``terms``
    counts the products of each sum, ``absolute`` is what is known beside them: what underflow may
    add beyond one smallest number a term, or how far apart admissible results are. A NaN or an
    infinity has to stand exactly where the truth has one.
    """
    if value.numel() == 0:
        return 0.0
    u = UNIT[value.dtype]
    unit = ACCUMULATE[value.dtype]
    value64 = value.double()
    info = torch.finfo(value.dtype)
    count = torch.as_tensor(terms, dtype=torch.float64)
    g = (count + 1) * unit + extra
    gm = g * magnitude
    # one product may underflow per term, and the result itself may be subnormal
    off = gm + absolute
    bound = off + u * (truth.abs() + off) + smallest_normal(value.dtype) * (count + 2)
    if value.dtype == torch.float16:
        bound = bound + info.smallest_normal * info.eps
    error = (value64 - truth).abs() / bound
    # Past the largest finite number (of the sum or of a partial sum) an infinity is right, of the
    # sum's sign; of the other sign, or a NaN, only where parts of both signs can pass it.
    largest = min(info.max, torch.finfo(accumulator(value.dtype)).max) * (1 - u)
    reach = torch.where(magnitude.isfinite(), magnitude * (1 + g), 0.0)
    agrees = value64.isinf() & (value64.sign() == truth.sign())
    overflowed = agrees & (reach >= largest)
    overflowed |= ~value64.isfinite() & (reach >= 2 * largest)
    same = (value64 == truth) | overflowed
    same |= value64.isnan() & truth.isnan()
    error = torch.where(same, 0.0, error)
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max())
