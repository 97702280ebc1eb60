"""What ``mahalanobis_covariance_loss`` may be off by: every distance in float64 with the error of
its roundings.

A distance is the norm, with weights w, of the difference of two rows of y, where y = xL (w = 1) or
y = [x, xU] (w = [diag, s]) of rows x moved by an origin of their class. Let e_i bound |error of
y_i| elementwise, ‖·‖ be the norm with weights |w|, ρ_i = ‖e_i‖, N the norm of the true difference.
Its square q is then off by Δq ≤ 2N(ρ_i + ρ_j) + (ρ_i + ρ_j)² + (n + 4)u(N + ρ_i + ρ_j)², and D =
sqrt(q⁺ + 1e-8) by ΔD ≤ Δq / (D + the least D) + 2uD: linear in the roundings however near the two
rows are, which a Gram matrix's q = y_i² - 2 y_i·y_j + y_j² is not.

|D_old − D_new| has a kink. A pair whose difference is within the error of its two distances may
pull with any strength in [−1, 1]: the admissible gradients are an interval around the sum of the
other pairs. The same holds for a pair whose square is within Δq of 0 from above or below, where the
maximum with 0 has a kink.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._bounds import (
    ACCUMULATE,
    HALVES,
    UNIT,
    fraction_of_bound,
    operand_error,
    smallest_normal,
)
from clipsteer.ops._spec import Errors, Inputs, Tensors, in_float64

FLOOR = 1e-8


class Distances(NamedTuple):
    """Of the n rows of a class, each to each, on one side (new or old)."""

    D: Tensor  # (n, n)
    error: Tensor  # (n, n), of D
    q: Tensor  # (n, n), the squares
    off: Tensor  # (n, n), of q
    difference: Tensor  # (n, n, columns), of the rows of y
    e: Tensor  # (n, columns), of y
    w: Tensor  # (columns,)


class Truth:
    """A drawn case in float64; ``classes`` lists the rows of every class that has a pair."""

    def __init__(self, inputs: Inputs) -> None:
        self.dtype = inputs["new"].dtype
        wide = in_float64(inputs)
        self.labels = wide["labels"]
        self.normalize = wide["normalize"]
        self.B, self.d = wide["new"].shape
        self.low_rank = "U" in wide
        self.factor = wide["U"] if self.low_rank else wide["factor"]
        self.weights = torch.cat([wide["diag"], wide["s"]], -1) if self.low_rank else None
        self.u = ACCUMULATE[self.dtype]
        half = UNIT[self.dtype] if self.dtype in HALVES else 0.0
        # products on tensor cores: TF32, or a vector computed inside as the sum of two halves
        self.extra = operand_error(self.dtype) + half**2
        self.scale: list[Tensor] = []
        self.sides: list[Tensor] = []
        for name in ("new", "old"):
            norm = torch.linalg.vector_norm(wide[name], dim=-1, keepdim=True)
            scale = torch.ones_like(norm)
            if self.normalize:
                scale = torch.where(norm > 0, 1 / norm, 0.0)
            self.scale.append(scale)
            self.sides.append(wide[name] * scale)
        self.classes: list[tuple[int, Tensor]] = []
        for c in range(self.factor.shape[0]):
            rows = (self.labels == c).nonzero().squeeze(1)
            if len(rows) > 1:
                self.classes.append((c, rows))
        # of a norm: d squares under a root, and the root; a row's numbers share it
        self.of_norm = (self.d / 2 + 2) * self.u if self.normalize else 0.0

    def project(self, x: Tensor, W: Tensor) -> Tensor:
        """y of rows x."""
        return torch.cat([x, x @ W], -1) if self.low_rank else x @ W

    def back(self, v: Tensor, W: Tensor) -> Tensor:
        """The transpose of ``project``."""
        if not self.low_rank:
            return v @ W.mT
        return v[..., : self.d] + v[..., self.d :] @ W.mT

    def rows(self, side: int, c: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """y of a class's rows, and e."""
        x = self.sides[side][at]
        W = self.factor[c]
        u = self.u
        centred = x - x[:1]
        stored = 3 * u * (x.abs() + x[:1].abs())  # the quotient and the difference to the origin
        tiny = smallest_normal(self.dtype)
        products = ((self.d + 2) * u + self.extra) * (centred.abs() + stored)
        error = (stored + products + 2 * tiny) @ W.abs()
        error = error + self.d * tiny
        y = self.project(x, W)
        if self.low_rank:
            error = torch.cat([stored + tiny, error], -1)
        return y - y[:1], error + self.of_norm * (y.abs() + y[:1].abs())

    def distances(self, side: int, c: int, at: Tensor) -> Distances:
        """What the definition finds between the rows ``at`` of class c, and how far it is off."""
        y, e = self.rows(side, c, at)
        columns = y.shape[1]
        w = torch.ones(columns, dtype=torch.float64)
        if self.weights is not None:
            w = self.weights[c]
        difference = y.unsqueeze(1) - y
        N2 = (difference.square() * w.abs()).sum(-1)
        q = (difference.square() * w).sum(-1)
        rho = (e.square() * w.abs()).sum(-1).sqrt()
        both = rho.unsqueeze(1) + rho
        N = N2.sqrt()
        off = 2 * N * both + both.square() + (columns + 4) * self.u * (N + both).square()
        D = (q.clamp(min=0) + FLOOR).sqrt()
        least = ((q - off).clamp(min=0) + FLOOR).sqrt()
        error = off / (D + least) + 4 * self.u * D
        return Distances(D, error, q, off, difference, e, w)


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """Every distance's error, the roundings of the terms and of their sum, and the result's own."""
    t = Truth(inputs)
    truth = torch.zeros((), dtype=torch.float64)
    bound = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    terms = 0
    for c, at in t.classes:
        new = t.distances(0, c, at)
        old = t.distances(1, c, at)
        upper = torch.ones(len(at), len(at), dtype=torch.bool).triu(1)
        change = (old.D - new.D).abs()[upper]
        error = (old.error + new.error)[upper]
        truth = truth + change.sum() / t.B
        bound = bound + error.sum() / t.B
        size = size + (change + error).sum() / t.B
        terms += len(change)
    value = outputs["loss"].reshape(1)
    if not truth.isfinite():
        # which of infinity and NaN depends on what is subtracted first
        return {"loss": 0.0 if not value.isfinite().any() else math.inf}
    found = fraction_of_bound(
        value,
        truth.reshape(1),
        size.reshape(1),
        terms + 2,
        0.0,
        bound,
    )
    return {"loss": found}


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """The middle of what is admissible, its half width, and the way back through the norms."""
    t = Truth(inputs)
    g = grad_out["loss"].double()
    truth = torch.zeros(t.B, t.d, dtype=torch.float64)
    bound = torch.zeros_like(truth)
    size = torch.zeros_like(truth)
    for c, at in t.classes:
        truth[at], bound[at], size[at] = _class_gradient(t, c, at)
    if t.normalize:
        x = t.sides[0]
        scale = t.scale[0]

        def around(v: Tensor) -> Tensor:
            return (v + x.abs() * (x.abs() * v).sum(-1, keepdim=True)) * scale

        truth = (truth - x * (x * truth).sum(-1, keepdim=True)) * scale
        # x's own roundings count twice, its product's d terms once
        bound = around(bound) + (3 * t.of_norm + (t.d + 8) * t.u) * around(size)
        size = around(size)
    found = fraction_of_bound(
        grads["new"],
        g * truth,
        g.abs() * size,
        2.0,  # times the cotangent, and the store
        0.0,
        g.abs() * bound,
    )
    return {"new": found}


def _class_gradient(t: Truth, c: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d) of d loss / d rows: the middle of what is admissible, half its width, and the size of
    what is summed."""
    new = t.distances(0, c, at)
    old = t.distances(1, c, at)
    W = t.factor[c]
    n = len(at)
    u = t.u
    w = new.w
    change = new.D - old.D
    # of 1 / D: what the error makes of it, D being at least sqrt(1e-8) on every backend
    least = (new.D - new.error).clamp(min=0.999 * FLOOR**0.5)
    relative = new.error / least + 4 * u
    free = change.abs() <= new.error + old.error + 4 * u * (new.D + old.D)
    free |= new.q.abs() <= new.off
    free.fill_diagonal_(False)
    pulls = (new.q > 0) & ~free
    strength = torch.where(pulls, change.sign(), 0.0) / (new.D * t.B)
    strength.fill_diagonal_(0)
    most = (pulls | free).double() * (1 + relative) / (new.D * t.B)
    most.fill_diagonal_(0)
    middle = torch.zeros(n, t.d, dtype=torch.float64)
    width = torch.zeros_like(middle)
    size = torch.zeros_like(middle)
    for i in range(n):
        difference = new.difference[i]  # (n, columns)
        e = new.e[i] + new.e
        reach = difference.abs() + e
        pull = most[i, :, None]  # (n, 1)
        summed = (pull * reach).sum(0) * w.abs()
        off = pull * (e + (relative[i, :, None] + (n + 4) * u) * reach)
        middle[i] = t.back((strength[i, :, None] * difference).sum(0) * w, W)
        kinks = t.back(difference[free[i]] * w, W).abs()
        kinks = (most[i, free[i], None] * kinks).sum(0)
        size[i] = t.back(summed, W.abs())
        products = ((W.shape[1] + 3) * u + t.extra) * size[i]
        width[i] = kinks + t.back(off.sum(0) * w.abs(), W.abs()) + products
    return middle, width, size
