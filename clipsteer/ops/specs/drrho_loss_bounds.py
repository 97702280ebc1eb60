"""What ``drrho_loss`` may be off by: that of u's log-sums (see ``_softmaxes``) and, for the
gradients, of sums of weights exp(t − u) times features. u rises with its log-sum, and stays in the
image of that one's interval.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import Errors, Inputs, Tensors, in_float64
from clipsteer.ops.specs._shared import EXP
from clipsteer.ops.specs._softmaxes import Sides


class Truth(Sides):
    """A drawn case in float64: per side (image, text) t, its error δ, u and its error, all
    (2, B, B) or (2, B)."""

    def __init__(self, inputs: Inputs) -> None:
        wide = in_float64(inputs)
        self.image = wide["image"]  # (B, d)
        self.text = wide["text"]  # (B, d)
        self.tau = wide["temperature"]
        self.gamma = wide["gamma"]
        self.eps = wide["eps"]
        self.rho = wide["rho"]
        self.past = wide["u"]  # (2, B) or None
        rows = self.image
        cols = self.text
        if wide["ref_image"] is not None:
            rows = torch.cat([rows, -wide["ref_image"]], 1)
            cols = torch.cat([cols, wide["ref_text"]], 1)
        super().__init__(rows, cols, 1 / self.tau, inputs["image"].dtype)
        self._averages()

    def _averages(self) -> None:
        """u and its error."""
        u = self.unit
        self.u = self.averaged(self.lse)
        low = self.averaged(self.lse_low)
        high = self.averaged(self.lse_high)
        sizes = self.lse.abs().nan_to_num(posinf=0.0) + math.log(self.B)
        sizes = 8 * u * (sizes + self.u.abs() + 1)
        if self.eps > 0:
            sizes = sizes + 4 * u * abs(math.log(self.eps))
        if self.past is not None:
            past = self.past.nan_to_num(0.0).abs()
            sizes = sizes + 4 * u * (past + abs(math.log(self.gamma)))
        off = torch.maximum(high - self.u, self.u - low) + sizes
        self.u_off = off.nan_to_num(nan=0.0, posinf=0.0)

    def averaged(self, lse: Tensor) -> Tensor:
        """u of log-sums (2, B)."""
        eps = torch.full_like(lse, self.eps)
        log_G = torch.logaddexp(lse - math.log(self.B), eps.log())
        past = torch.full_like(lse, torch.nan) if self.past is None else self.past
        gamma = torch.full_like(past, self.gamma)
        share = torch.where(past.isnan(), 1.0, gamma)
        kept = past.nan_to_num(0.0) + (1 - share).log()
        return torch.logaddexp(kept, log_G + share.log())

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp(t − u) / 2B² of both sides, its error, and t with 0 where a pair is its own:
        (2, B, B)."""
        u = self.u.unsqueeze(2)
        w = (self.t - u).exp() / (2 * self.B**2)
        t = self.t.masked_fill(self.own, 0.0)
        rounding = self.unit * (2 * t.abs() + 2 * u.abs() + 2 * EXP + 4)
        off = self.delta + self.u_off.unsqueeze(2) + rounding
        return w, w * torch.expm1(off), t


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """u within the image of its interval; the loss is τ times a mean of it."""
    x = Truth(inputs)
    loss = x.tau * (x.u.mean(1).sum() / 2 + x.rho)
    size = x.tau * (x.u.abs().mean(1).sum() / 2 + abs(x.rho))
    off = x.tau * x.u_off.mean(1).sum() / 2
    error = fraction_of_bound(
        outputs["loss"].reshape(1),
        loss.reshape(1),
        size.reshape(1),
        2 * x.B + 6,
        0.0,
        off.nan_to_num(nan=0.0, posinf=0.0),
    )
    u_error = fraction_of_bound(outputs["u"], x.u, x.u.abs(), 2, 0.0, x.u_off)
    return {"u": u_error, "loss": error}


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Sums of weights times features; a pair's own weight is minus the sum of the others."""
    x = Truth(inputs)
    g = grad_out["loss"].double()
    found = {}
    w, off, t = x.weights()
    P = w[0] + w[1].T
    P_off = off[0] + off[1].T
    own = w.sum(2).sum(0)
    own_off = off.sum(2).sum(0) + (x.B + 4) * x.unit * w.sum(2).sum(0)
    # a sum of B weights in log space, then out of it
    logs = x.lse.abs() + x.u.abs()
    logs = logs.nan_to_num(neginf=0.0, posinf=0.0).amax(0)
    own_off = own_off + own * x.unit * logs * 2
    full = P - own.diag()
    full_off = P_off + own_off.diag()
    size = P + own.diag()
    for name, left, left_off, sizes, right in (
        ("image", full, full_off, size, x.text),
        ("text", full.T, full_off.T, size.T, x.image),
    ):
        if name not in grads:
            continue
        lost = x.lost(sizes + left_off, right, 0.5 / x.B**2)
        found[name] = fraction_of_bound(
            grads[name],
            g * (left @ right),
            g.abs() * ((sizes + left_off) @ right.abs()),
            2 * x.B + 8,
            x.operand + x.split,
            g.abs() * (left_off @ right.abs() + lost),
        )
    if "temperature" in grads:
        truth = x.u.mean(1).sum() / 2 + x.rho - (w * t).sum()
        size = x.u.abs().mean(1).sum() / 2 + abs(x.rho) + (w * t.abs()).sum()
        moment_off = off * (t.abs() + x.delta) + w * x.delta
        bound = x.u_off.mean(1).sum() / 2 + moment_off.sum()
        found["temperature"] = fraction_of_bound(
            grads["temperature"].reshape(1),
            (g * truth).reshape(1),
            (g.abs() * size).reshape(1),
            2 * x.B + 16,
            0.0,
            g.abs() * bound,
        )
    return found
