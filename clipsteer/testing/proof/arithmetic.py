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
# of the argument of what is made of exp: libraries take exp2 of it times log2(e), both rounded
ARGUMENT = 2


class Arithmetic(NamedTuple):
    """The arithmetic that values between inputs and outputs are computed in.

    ``unit`` is the unit roundoff of its sums, ``stored`` that of what one operation hands to the
    next, ``least`` and ``most`` the smallest normal and the largest number, ``operand`` the
    relative error of a product whose operands are rounded again (tensor cores in TF32 or bfloat16),
    ``dtype`` what holds its numbers exactly. Without ``exact`` no operation counts as free of
    error because its result is such a number: another grouping of the operations may not be so
    lucky.
    """

    unit: float
    stored: float
    least: float
    most: float
    operand: float
    dtype: torch.dtype
    exact: bool = True
    given: float = 0.0  # relative error of the inputs themselves

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        *,
        accumulate: torch.dtype | None = None,
        fused: bool = True,
        products: str = "exact",
        inputs: torch.dtype | None = None,
    ) -> Arithmetic:
        """For results in ``dtype``: sums in float32 (float64 for float64) or ``accumulate``.

        fused: nothing between is rounded to ``dtype``; a chain of operators that each write their
            result in it is not fused.
        products: their operands are taken as they are ("exact") or rounded to "tf32" or "bfloat16".
        inputs: floating inputs are rounded to this dtype first; by default they are exact.
        """
        held = accumulate or accumulator(dtype)
        roundoff = {"exact": 0.0, "tf32": TF32_OPERAND, "bfloat16": 2.0**-8}
        if products not in roundoff:
            raise ValueError(f"products must be one of {tuple(roundoff)}, got {products!r}")
        one = roundoff[products]
        between = held if fused else dtype
        info = torch.finfo(between)
        operand = 2 * one + one * one
        given = 0.0 if inputs is None else UNIT[inputs]
        least, most = info.smallest_normal, info.max
        return cls(UNIT[held], UNIT[between], least, most, operand, between, given=given)

    def gamma(self, terms: int | Tensor) -> float | Tensor:
        """γ_n = n·u / (1 - n·u), the relative error of n roundings; infinite where n·u ≥ 1."""
        part = terms * self.unit
        if isinstance(part, Tensor):
            return torch.where(part < 1, part / (1 - part).clamp_min(self.unit), math.inf)
        return part / (1 - part) if part < 1 else math.inf

    def constant(self, number: float) -> float:
        """The error of a number of the definition's own text, which this arithmetic rounds."""
        if not math.isfinite(number) or float(torch.tensor(number, dtype=self.dtype)) == number:
            return 0.0
        return self.stored * abs(number) + self.least * (abs(number) < self.least)

    def rounded(
        self,
        value: Tensor,
        error: Tensor | None,
        roundings: int = 1,
        least: float = 0.0,
        *,
        sure: bool = False,
    ) -> tuple[Tensor, bool]:
        """The error of an elementwise result, with the operation's own, and whether no element is
        exact. Exact are those that exact operands (``error`` 0, or None; ``sure``: there are none)
        make of one rounding where the arithmetic holds the result. A function may be as good only
        as at ``least``."""
        share = self.gamma(roundings) + self.stored - self.unit
        own = value.abs().double()
        if error is not None:
            own += error
        if least:
            own.clamp_min_(least)
        own.mul_(share).add_(self.least)
        exact = None
        may_be = self.exact and roundings == 1 and value.numel() > 0 and not sure
        if may_be and (error is None or not bool(error.amin() > 0)):
            exact = self.holds(value)
            if exact is not None and error is not None:
                exact &= error == 0
        if exact is not None:
            own.masked_fill_(exact, 0.0)
        total = own if error is None else own + error
        # far below the largest number: what follows would change nothing
        if value.numel() and not bool(total.amax() <= share * self.most / 2):
            total = self.limited(value, torch.zeros_like(own) if error is None else error, own)
        return total, exact is None

    def holds(self, value: Tensor) -> Tensor | None:
        """Where a float64 value is a number of this arithmetic (zero, or normal); None: nowhere."""
        same = value.to(self.dtype).double() == value
        if not bool(same.any()):
            return None
        return same & ((value == 0) | (value.abs() >= self.least))

    def summed(self, size: Tensor, error: Tensor, terms: int | Tensor, whole: Tensor) -> Tensor:
        """The error of sums of ``terms`` numbers in any order: ``size`` sums their magnitudes with
        their errors, ``error`` what the terms bring. ``whole`` says where all terms are exact
        integers; their sums are exact up to 1 / stored."""
        own = size * (self.gamma(terms) + self.stored - self.unit)
        own += terms * self.least
        if self.exact and bool(whole.any()):
            exact = whole & (error == 0) & (size <= 1 / self.stored)
            own = own.masked_fill(exact, 0.0)
        return self.limited(size, error, own)

    def limited(self, reach: Tensor, error: Tensor, own: Tensor) -> Tensor:
        """Both errors of what lies within ``reach`` of 0. Past the largest number nothing is known;
        infinities and NaN that the exact operands bring stay what they are."""
        total = error + own
        farthest = reach.abs().add_(total)
        if farthest.numel() == 0 or bool(farthest.amax() <= self.most):
            return total
        total = torch.where(farthest <= self.most, total, math.inf)
        return torch.where(reach.isfinite(), total, error.nan_to_num(nan=0.0, posinf=math.inf))
