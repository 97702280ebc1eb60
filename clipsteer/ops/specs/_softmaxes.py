"""The softmaxes over a batch's pairs, both sides, and what a sweep may be off by.

S is a sum of D products, off by δS ≤ (D + 6)·u·|rows||cols|ᵀ; t = (S − S_ii)·s is off by δ ≤ (δS +
δS_ii)·s and its own roundings. A sum of exponentials of t' ∈ [t − δ, t + δ] has its logarithm in
[lse(t − δ), lse(t + δ)], and what rises with it stays in the image of that interval. A weight
exp(t − u) is then off by a factor of at most exp(δ + δu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._bounds import ACCUMULATE, HALVES, flushed, operand_error, smallest_normal
from clipsteer.ops.specs._shared import EXP


def finite(x: Tensor) -> Tensor:
    """What is not finite says nothing of an error."""
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class Similarities:
    """S (B, B) of rows and cols (B, D) in float64, and its error."""

    def __init__(self, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> None:
        self.unit = ACCUMULATE[dtype]
        self.operand = operand_error(dtype)
        self.dtype = dtype
        # weights on tensor cores and on tiles are sums of two halves
        self.split = 2.0**-15 if dtype in HALVES else 0.0
        D = rows.shape[1]
        self.S = rows @ cols.T
        self.size = rows.abs() @ cols.abs().T
        lost = flushed(dtype, D, rows.abs().sum(1, keepdim=True), cols.abs().sum(1))
        self.off = ((D + 6) * self.unit + self.operand) * self.size + D * smallest_normal(dtype)
        self.off = self.off + lost

    def lost(self, weights: Tensor, features: Tensor, share: float = 1.0) -> Any:
        """What Σ_j w_ij x_j of ``weights`` (B, B), |w| and what they are off by, may lose where w /
        share is multiplied as two bfloat16 numbers, see ``flushed``. The first is w cut off, and
        what is left, below 2^-7 of it, is rounded to the second with ω of its sign added, lest an
        infinity be multiplied by 0: off by 2^-16·|w| + ω."""
        each = 2 * finite(weights.sum(1, keepdim=True)) / share
        # ω where it is added, ω where a number below it counts as 0
        partners = 2 * finite(features.abs().sum(0))
        return share * flushed(self.dtype, 2 * len(features), each, partners)


class Sides(Similarities):
    """t of both sides, its error δ, and log-sums over the other pairs: (2, B, B) or (2, B)."""

    def __init__(self, rows: Tensor, cols: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(rows, cols, dtype)
        u = self.unit
        self.B = rows.shape[0]
        self.scale = scale
        self.own = torch.eye(self.B, dtype=torch.bool)

        def both(x: Tensor) -> Tensor:
            return torch.stack([x, x.T]) + x.diagonal().unsqueeze(1)

        S = self.S
        t = (torch.stack([S, S.T]) - S.diagonal().unsqueeze(1)) * scale
        delta = both(self.off) * scale + 6 * u * both(S.abs()) * scale
        # a pair at infinity has no weight, or all of it, whatever it is rounded to
        self.delta = torch.where(t.isinf(), 0.0, delta).nan_to_num(nan=0.0)
        self.far = t.abs().nan_to_num(posinf=0.0, nan=0.0)
        self.t = t.masked_fill(self.own, -torch.inf)
        self.lse = self.t.logsumexp(2)
        peak = finite(self.t.amax(2))
        # a term's distance from the peak, the exponential, B sums, a rescaling for each tile of 16,
        # the logarithm
        self.step = self.delta + 2 * u * (self.far + peak.abs().unsqueeze(2))
        self.steps = (self.B + (EXP + 2) * (self.B / 16 + 1) + 2 * EXP + 4) * u
        self.lse_low = (self.t - self.step).logsumexp(2) - self.steps
        self.lse_high = (self.t + self.step).logsumexp(2) + self.steps


class Softmaxes(Sides):
    """u = log(1 + Σ exp t), the cross-entropy of a side's own pair, and its weights (2, B, B)."""

    def __init__(self, rows: Tensor, cols: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(rows, cols, scale, dtype)
        zero = torch.zeros_like(self.lse)
        # what the log-sum and log(1 + exp) are rounded to
        slack = 8 * self.unit * (finite(self.lse).abs() + 1)
        self.u = torch.logaddexp(self.lse, zero)
        low = torch.logaddexp(self.lse_low - slack, zero)
        high = torch.logaddexp(self.lse_high + slack, zero)
        off = torch.maximum(high - self.u, self.u - low) + 2 * EXP * self.unit * self.u
        self.u_off = off.nan_to_num(nan=0.0, posinf=0.0)
        u = self.u.unsqueeze(2)
        self.q = (self.t.masked_fill(self.own, 0.0) - u).exp()
        rounding = self.unit * (2 * self.far + 2 * u.abs() + 2 * EXP + 4)
        relative = torch.where(self.own, 0.0, self.delta) + self.u_off.unsqueeze(2) + rounding
        self.relative = relative
        self.q_off = self.q * torch.expm1(relative)
        # 1 − q_ii, as the exponential of a difference of log-sums
        self.others = (self.lse - self.u).exp()
        logs = finite(self.lse).abs() + finite(self.u).abs()
        lse_off = torch.maximum(self.lse_high - self.lse, self.lse - self.lse_low)
        spread = lse_off.nan_to_num(0.0, posinf=0.0) + slack + self.u_off
        self.others_off = self.others * torch.expm1(spread + self.unit * (2 * logs + EXP + 4))
