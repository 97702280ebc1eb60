"""How the arithmetic that is allowed for rounds, and what a value may be off by after one
operation of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._bounds import TF32_OPERAND, UNIT, accumulator

# exp and log in roundings: 1 for the reduced argument, 2 for the polynomial and its last step, 1
# for the scaling; what libraries promise for the other functions is no more
FUNCTION = 4


class Arithmetic(NamedTuple):
    """The arithmetic that values between inputs and outputs are computed in.

    ``unit`` is the unit roundoff of its sums, ``stored`` that of what one operation hands to the
    next, ``least`` and ``most`` the smallest normal and the largest number, ``operand`` the
    relative error of a product whose operands are rounded again (tensor cores in TF32 or bfloat16),
    ``dtype`` what holds its numbers exactly.
    """

    unit: float
    stored: float
    least: float
    most: float
    operand: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        *,
        accumulate: torch.dtype | None = None,
        fused: bool = True,
        products: str = "exact",
    ) -> Arithmetic:
        """For results in ``dtype``: sums in float32 (float64 for float64) or ``accumulate``.

        fused: nothing between is rounded to ``dtype``; a chain of operators that each write their
            result in it is not fused.
        products: their operands are taken as they are ("exact") or rounded to "tf32" or "bfloat16".
        """
        held = accumulate or accumulator(dtype)
        roundoff = {"exact": 0.0, "tf32": TF32_OPERAND, "bfloat16": 2.0**-8}
        if products not in roundoff:
            raise ValueError(f"products must be one of {tuple(roundoff)}, got {products!r}")
        one = roundoff[products]
        between = held if fused else dtype
        info = torch.finfo(between)
        operand = 2 * one + one * one
        return cls(UNIT[held], UNIT[between], info.smallest_normal, info.max, operand, between)

    def gamma(self, terms: int | Tensor) -> float | Tensor:
        """γ_n = n·u / (1 - n·u), the relative error of n roundings; infinite where n·u ≥ 1."""
        part = terms * self.unit
        if isinstance(part, Tensor):
            return torch.where(part < 1, part / (1 - part).clamp_min(self.unit), math.inf)
        return part / (1 - part) if part < 1 else math.inf

    def holds(self, value: Tensor) -> Tensor:
        """Where a float64 value is a number of this arithmetic (zero, or normal)."""
        same = value.to(self.dtype).double() == value
        return same & ((value == 0) | (value.abs() >= self.least))

    def rounded(
        self, value: Tensor, error: Tensor, roundings: int = 1, least: float = 0.0
    ) -> Tensor:
        """The error of an elementwise result, with the operation's own: none where exact operands
        (``error`` 0) give a number that it holds and one rounding makes it. A function may be as
        good only as at ``least``."""
        reach = value.abs().add_(error)
        share = self.gamma(roundings) + self.stored - self.unit
        own = (reach.clamp_min(least) if least else reach) * share
        own = own + self.least
        if roundings == 1 and value.numel() and not bool(error.amin() > 0):
            own = own.masked_fill((error == 0) & self.holds(value), 0.0)
        return self.limited(reach, error, own)

    def summed(self, size: Tensor, error: Tensor, terms: int | Tensor, whole: Tensor) -> Tensor:
        """The error of sums of ``terms`` numbers in any order: ``size`` sums their magnitudes with
        their errors, ``error`` what the terms bring. ``whole`` says where all terms are exact
        integers; their sums are exact up to 1 / stored."""
        own = (self.gamma(terms) + self.stored - self.unit) * size + terms * self.least
        exact = whole & (error == 0) & (size <= 1 / self.stored)
        return self.limited(size, error, torch.where(exact, 0.0, own))

    def limited(self, reach: Tensor, error: Tensor, own: Tensor) -> Tensor:
        """Both errors. Past the largest number nothing is known; infinities and NaN that the exact
        operands bring stay what they are."""
        if reach.numel() == 0 or bool(reach.amax() <= self.most):
            return error + own
        total = torch.where(reach <= self.most, error + own, math.inf)
        return torch.where(reach.isfinite(), total, error.nan_to_num(nan=0.0, posinf=math.inf))
