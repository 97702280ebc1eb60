"""What ``conceptor_project`` may be off by: values and gradients in float64, and the roundings on
the way, counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipsteer.ops._bounds import (
    HALVES,
    UNIT,
    flushed,
    fraction_of_bound,
    operand_error,
    smallest_normal,
)
from clipsteer.ops._spec import Errors, Inputs, Tensors, in_float64


class Truth:
    """A drawn case in float64. Both forms are the matrices C with a magnitude: |C|, or
    |U||s||U|ᵀ."""

    def __init__(self, inputs: Inputs) -> None:
        wide = in_float64(inputs)
        self.dtype = inputs["h"].dtype
        self.low_rank = "U" in inputs
        if self.low_rank:
            U = wide["U"]  # (K, d, r)
            s = wide["s"]  # (K, r)
            self.U = U
            self.s = s
            self.r = U.shape[2]
            self.C = U * s.unsqueeze(1) @ U.mT
            self.size = U.abs() * s.abs().unsqueeze(1) @ U.abs().mT
        else:
            self.C = wide["C"]  # (K, d, d)
            self.size = self.C.abs()
        self.K, self.d = self.C.shape[:2]
        h = wide["h"]  # (B, d)
        self.index = wide["index"]  # (B,)
        if self.index is None:
            self.index = torch.zeros(h.shape[0], dtype=torch.int64)
        self.beta = wide["beta"]  # (K,)
        if not isinstance(self.beta, Tensor):
            self.beta = torch.full((self.K,), self.beta, dtype=torch.float64)
        self.mean = wide["mean"]  # (K, d)
        if self.mean is None:
            self.mean = torch.zeros(self.K, self.d, dtype=torch.float64)
        self.x = h - self.mean[self.index]
        self.counts = torch.bincount(self.index, minlength=self.K).double()
        # What a stored or multiplied number may lose for good: products below the normal range, and
        # half of the spacing of float16's smallest numbers.
        self.lost = smallest_normal(self.dtype) * (self.d + 1)
        if self.dtype == torch.float16:
            self.lost += 2.0**-25

    def apply(self, matrices: Tensor, rows: Tensor) -> Tensor:
        """Each row through its group's matrix."""
        out = rows.new_zeros(rows.shape[0], matrices.shape[1])
        for k in self.index.unique().tolist():
            own = self.index == k
            out[own] = rows[own] @ matrices[k].mT
        return out

    def reach(self, matrices: Tensor, rows: Tensor, lost: float) -> Tensor:
        """|Rows|, each number larger by ``lost``, through the magnitudes of their group's matrix,
        and what products of pairs lose."""
        out = self.apply(matrices, rows.abs() + lost)
        if not lost:
            return out
        sizes = rows.abs().sum(-1, keepdim=True)
        return out + flushed(self.dtype, rows.shape[1], sizes, matrices.sum(-1)[self.index])

    def through(self, rows: Tensor, lost: float, *, transposed: bool = False) -> Tensor:
        """The same through |C|; in low rank with what is lost in each of the r numbers."""
        size = self.size.mT if transposed else self.size
        if not self.low_rank:
            return self.reach(size, rows, lost)
        out = self.apply(size, rows.abs() + lost)
        if not lost:
            return out
        sizes = rows.abs().sum(-1, keepdim=True)
        inner = flushed(self.dtype, self.d, sizes, self.U.abs().sum(1)[self.index])
        return out + self.apply(self.U.abs(), lost + self.s.abs()[self.index] * inner)

    def project(self, rows: Tensor) -> Tensor:
        """C rows, in the order of the definition: with an infinity among the rows it matters."""
        if not self.low_rank:
            return self.apply(self.C, rows)
        return self.apply(self.U, self.s[self.index] * self.apply(self.U.mT, rows))

    def total(self, rows: Tensor) -> Tensor:
        """The sum of each group's rows."""
        zeros = torch.zeros(self.K, *rows.shape[1:], dtype=torch.float64)
        return zeros.index_add(0, self.index, rows)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ a ⊗ b over each group's rows."""
        groups = [self.index == k for k in range(self.K)]
        return torch.stack([a[rows].T @ b[rows] for rows in groups])

    def outer_reach(self, a: Tensor, b: Tensor, lost: float) -> Tensor:
        """The same of |a| and |b|, each number larger by ``lost``, and with what products of pairs
        lose."""
        out = self.outer(a.abs() + lost, b.abs() + lost)
        if not lost:
            return out
        left = self.total(a.abs()).unsqueeze(2)
        right = self.total(b.abs()).unsqueeze(1)
        return out + flushed(self.dtype, self.counts[:, None, None], left, right)

    def error(
        self,
        value: Tensor,
        truth: Tensor,
        size: Callable[[float], Tensor],
        roundings: int | Tensor,
        stored: int,
        products: int,
    ) -> float:
        """``size(lost)`` is the magnitude when every |vector| on the way is larger by ``lost``. Of
        the ``roundings``, ``stored`` are of vectors that a half stores between kernels;
        ``products`` of inner products may take TF32, or halves in two parts, for a vector that is
        computed inside."""
        unit = UNIT[self.dtype] if self.dtype in HALVES else 0.0
        extra = stored * unit + products * (operand_error(self.dtype) + unit**2)
        magnitude = size(0.0)
        absolute = size(self.lost) - magnitude
        return fraction_of_bound(value, truth, magnitude, roundings - 1, extra, absolute)


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """Roundings: h − μ, d of a product's sum, β if it is a number, times β, and + μ; in low rank r
    of the second sum and one more, as it is times s and s is times β. The r-vector and h − μ are
    not rounded to halves (Triton's tensor cores take them as the sum of two)."""
    t = Truth(inputs)
    beta = t.beta[t.index, None]
    mu = t.mean[t.index]
    truth = beta * t.project(t.x) + mu
    roundings = t.d + t.r + 5 if t.low_rank else t.d + 4
    products = 2 if t.low_rank else 1

    def size(lost: float) -> Tensor:
        return beta.abs() * t.through(t.x, lost) + mu.abs()

    return {"h_new": t.error(outputs["h_new"], truth, size, roundings, 0, products)}


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """The stored vectors are h − μ, the product Cᵀg that β's and μ's gradients share, and in low
    rank Uᵀ(h − μ), Uᵀg and their products with s."""
    t = Truth(inputs)
    g = grad_out["h_new"].double()
    beta = t.beta[t.index, None]
    d_x = beta * t.apply(t.C.mT, g)
    roundings = t.d + 1 + (t.r + 2 if t.low_rank else 0)
    stored = 0 if t.low_rank else 1

    def size_x(lost: float) -> Tensor:
        return beta.abs() * t.through(g, lost, transposed=True) + lost

    def size_mean(lost: float) -> Tensor:
        return t.total(g.abs() + size_x(lost))

    found = {"h": t.error(grads["h"], d_x, size_x, roundings, stored, 2)}
    if "mean" in grads:
        truth = t.total(g - d_x)
        terms = roundings + 1 + t.counts[:, None]
        found["mean"] = t.error(grads["mean"], truth, size_mean, terms, 2, 2)
    return found | (_low_rank_grads(t, g, grads) if t.low_rank else _dense_grads(t, g, grads))


def _dense_grads(t: Truth, g: Tensor, grads: Tensors) -> Errors:
    """Of C and β."""
    x = t.x
    beta = t.beta[t.index, None]

    def size_C(lost: float) -> Tensor:
        return t.outer_reach(beta * g, x, lost)

    def size_beta(lost: float) -> Tensor:
        product = t.reach(t.size.mT, g, lost) + lost
        return t.total((product * (x.abs() + lost)).sum(-1))

    truth = t.outer(beta * g, x)
    terms = t.counts[:, None, None] + 2
    found = {"C": t.error(grads["C"], truth, size_C, terms, 2, 1)}
    if "beta" in grads:
        truth = t.total((t.apply(t.C.mT, g) * x).sum(-1))
        terms = 2 * t.d + t.counts + 1
        found["beta"] = t.error(grads["beta"], truth, size_beta, terms, 2, 1)
    return found


def _low_rank_grads(t: Truth, g: Tensor, grads: Tensors) -> Errors:
    """Of U, s and β: sums over the rows of p ∘ q with p = Uᵀx, q = Uᵀg."""
    x = t.x
    p = t.apply(t.U.mT, x)
    q = t.apply(t.U.mT, g)
    pq = t.total(p * q)
    strength = t.beta[t.index, None] * t.s[t.index]
    counts = t.counts[:, None]

    def into(v: Tensor, lost: float) -> Tensor:
        return t.reach(t.U.abs().mT, v, lost) + lost

    def size_pq(lost: float) -> Tensor:
        return t.total(into(x, lost) * into(g, lost))

    def size_s(lost: float) -> Tensor:
        return t.beta.abs()[:, None] * size_pq(lost)

    def size_U(lost: float) -> Tensor:
        a = strength.abs() * into(g, lost)
        b = strength.abs() * into(x, lost)
        return t.outer_reach(x, a, lost) + t.outer_reach(g, b, lost)

    def size_beta(lost: float) -> Tensor:
        return (t.s.abs() * size_pq(lost)).sum(-1)

    terms = 2 * t.d + counts + 4
    found = {"s": t.error(grads["s"], t.beta[:, None] * pq, size_s, terms, 3, 2)}
    truth = t.outer(x, strength * q) + t.outer(g, strength * p)
    terms = t.d + 2 * counts[:, None] + 4
    found["U"] = t.error(grads["U"], truth, size_U, terms, 3, 2)
    if "beta" in grads:
        truth = (t.s * pq).sum(-1)
        terms = 2 * t.d + t.counts + t.r + 4
        found["beta"] = t.error(grads["beta"], truth, size_beta, terms, 3, 2)
    return found
