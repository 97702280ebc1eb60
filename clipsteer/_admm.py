"""The non-negative lasso for many targets over one dictionary: batched ADMM, finished exactly on the support it finds.

    w* = argmin over w >= 0 of ‖wC - z‖² + λ Σ w          C (n, e), z (e,)

ADMM (Boyd et al. 2011, section 6.4; as SpLiCE uses it, Bhalla et al. 2024, arXiv 2402.10376) splits w into x = v:

    x = (2CCᵀ + ρI)⁻¹(2Cz + ρ(v - u)),   v = relu(x + u - λ/ρ),   u = u + x - v

v and u are the two signs of one variable, p = x + u - λ/ρ before its relu: v = relu(p), u = min(p, 0) + λ/ρ. With
P = 2CCᵀ(2CCᵀ + ρI)⁻¹ a step over-relaxed by α (section 3.4.3) is then two products and one pass:

    p ← αd + leaky_relu(p, 1 - α) - α|p|P,   d = (2zCᵀ - λ)(2CCᵀ + ρI)⁻¹,   P = CA

A = 2Cᵀ(2CCᵀ + ρI)⁻¹ = (CᵀC + ρ/2 I)⁻¹Cᵀ (Woodbury) comes from one Cholesky factor of size min(n, e) for all rows.

ADMM finds the support soon and its values slowly. So now and then the values on the support are solved for, in float64,
and a row is done when its w passes the optimality conditions: gradient + λ is 0 where w > 0 and not negative elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# bytes that the iterates of one block of rows may take, and rows that are solved on their supports at once
_BLOCK_BYTES = 256 << 20
_GROUP = 32
_CHECK_EVERY = 20
_RELAXATION = 1.7
_JITTER = 1e-10


class Decomposition(NamedTuple):
    """Sparse non-negative codes, and how optimal they are.

    Attributes:
        weights: (B, n), none negative, exactly 0 off the support.
        violation: (B,) the largest entry of |gradient + λ| on the support and of its negative part elsewhere; with unit
            rows the distance of the objective from its minimum is at most violation · (Σ w + Σ w*).
        converged: (B,) whether violation <= tol; the other rows are what max_iterations steps gave.
    """

    weights: Tensor
    violation: Tensor
    converged: Tensor

    @property
    def l0(self) -> Tensor:
        """(B,) concepts in use."""
        return (self.weights > 0).sum(-1)


def _checked(z: Tensor, C: Tensor, l1: float | Tensor, rho: float, tol: float, max_iterations: int) -> Tensor:
    shapes = f"z is {tuple(z.shape)}, C {tuple(C.shape)}"
    if z.ndim != 2 or C.ndim != 2 or z.shape[1] != C.shape[1] or 0 in C.shape:
        raise ValueError(f"nonnegative_lasso: expected z (B, e) and C (n, e) with n, e >= 1; {shapes}")
    if z.dtype != C.dtype or z.dtype not in (torch.float32, torch.float64) or z.device != C.device:
        got = f"z is {z.dtype} on {z.device}, C {C.dtype} on {C.device}"
        raise TypeError(f"nonnegative_lasso: z and C must share float32 or float64 and a device; {got}")
    if not (rho > 0 and tol > 0 and max_iterations >= 1):
        got = f"rho = {rho}, tol = {tol}, max_iterations = {max_iterations}"
        raise ValueError(f"nonnegative_lasso: rho, tol and max_iterations must be positive, got {got}")
    penalty = torch.as_tensor(l1, dtype=z.dtype, device=z.device)
    if penalty.shape not in ((), (len(z),)) or not bool((penalty >= 0).all() & penalty.isfinite().all()):
        raise ValueError(f"nonnegative_lasso: l1 must be finite, not negative, one or one a row; got {l1!r}; {shapes}")
    if not bool(z.isfinite().all() & C.isfinite().all()):
        raise ValueError(f"nonnegative_lasso: z and C must be finite; {shapes}")
    return penalty.expand(len(z))


@torch.no_grad()
def nonnegative_lasso(
    z: Tensor, C: Tensor, l1: float | Tensor, *, rho: float = 5.0, tol: float = 1e-6, max_iterations: int = 2000
) -> Decomposition:
    """w* = argmin over w >= 0 of ‖wC - z‖² + λ Σ w, for every row of z.

    Args:
        z: (B, e) targets, float32 or float64; B may be 0. C: (n, e) dictionary, a concept a row.
        l1: λ, one number or one a row, (B,). Row b is all zero exactly when λ_b >= 2 max_i ⟨C_i, z_b⟩.
        rho: ADMM's penalty; it changes the number of steps, not the answer.
        tol: how far the optimality conditions may be missed (see `Decomposition.violation`), on the scale of unit rows.
        max_iterations: of ADMM; rows that have not met `tol` by then are returned as they are and marked.

    Deterministic; rows are solved in blocks, so that beyond the result at most about 256 MB are held. The work of a
    step is 4·B·n·e operations over the rows not yet done. Where the minimiser is not unique, one is returned.

    Raises:
        ValueError: shapes, values that are not finite, a negative λ. TypeError: dtypes or devices.
    """
    penalty = _checked(z, C, l1, rho, tol, max_iterations)
    n = len(C)
    # reduced precision that a caller allows elsewhere has no place in a linear solve
    with torch.autocast(z.device.type, enabled=False):
        A, a = _factor(C, rho)
        right = (C @ A,) if n <= 2 * C.shape[1] else (C, A)
        weights, violation = z.new_zeros(len(z), n), z.new_zeros(len(z))
        for rows in torch.arange(len(z), device=z.device).split(max(1, _BLOCK_BYTES // (8 * n * z.element_size()))):
            d = torch.addmm(torch.outer(penalty[rows], -a), z[rows], A)
            _solve(weights, violation, rows, z, C, penalty, d, right, tol, max_iterations)
    return Decomposition(weights, violation, violation <= tol)


def _factor(C: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """A (e, n) and a (n,) with d = zA - λa, from one Cholesky factor of the smaller side, in float64."""
    n, e = C.shape
    wide = C.double()
    small = 2 * (wide @ wide.T if n <= e else wide.T @ wide)
    factor = torch.linalg.cholesky(small.diagonal_scatter(small.diagonal() + rho))
    if n <= e:
        A = 2 * torch.cholesky_solve(wide, factor).T
        a = torch.cholesky_solve(wide.new_ones(n, 1), factor)[:, 0]
    else:
        A = 2 * torch.cholesky_solve(wide.T.contiguous(), factor)
        a = (1 - wide.sum(0) @ A) / rho
    return A.to(C.dtype), a.to(C.dtype)


def _solve(
    weights: Tensor, violation: Tensor, rows: Tensor, z: Tensor, C: Tensor, penalty: Tensor, d: Tensor,
    right: Sequence[Tensor], tol: float, max_iterations: int,
) -> None:  # fmt: skip
    """Fill in the given rows of weights and violation; rows leave the iteration when they are done."""
    d.mul_(_RELAXATION)
    p = torch.zeros_like(d)
    for step in range(1, max_iterations + 1):
        left = p.abs() if len(right) == 1 else p.abs() @ right[0]
        p = torch.nn.functional.leaky_relu(p, 1 - _RELAXATION).add_(d).addmm_(left, right[-1], alpha=-_RELAXATION)
        if step % _CHECK_EVERY and step < max_iterations:
            continue
        w, missed = _on_support(p.relu(), z[rows], C, penalty[rows])
        done = missed <= tol if step < max_iterations else torch.ones_like(missed, dtype=torch.bool)
        weights[rows[done]], violation[rows[done]] = w[done], missed[done]
        if bool(done.all()):
            return
        if bool(done.any()):
            rows, p, d = rows[~done], p[~done], d[~done]


def _minimise(w: Tensor, D: Tensor, z: Tensor, penalty: Tensor) -> Tensor:
    """Minimiser over the concepts D (b, k, e) in use, from w (b, k) >= 0, in float64; zeros of w stay zero.

    Newton steps, each as far as the first weight that would turn negative; that one leaves for good.
    """
    for _ in range(w.shape[1]):
        on = (w > 0).double()
        used = D * on[..., None]
        short = (used @ (z - (w[:, None] @ used)[:, 0])[..., None])[..., 0] - on * penalty / 2
        # where concepts depend on each other, the tiny term keeps the step small
        factor, failed = torch.linalg.cholesky_ex(used @ used.mT + torch.diag_embed(1 - on + _JITTER))
        step = torch.cholesky_solve(short[..., None], factor)[..., 0] * on
        step = torch.where(failed[:, None] == 0, step, 0)
        share = torch.where(w + step < 0, w / -step, 1.0)  # (b, k), below 1 where a weight would turn negative
        first = share.amin(1, keepdim=True)
        w = torch.where((share == first) & (first < 1), 0, w + first * step).clamp_min(0)
        if bool((first == 1).all()):
            break
    return w


def _on_support(v: Tensor, z: Tensor, C: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The minimiser on the support of every row of v (v itself where that has more than 2e), and its violation."""
    w, residual = v.clone(), torch.empty_like(z)
    count = (v > 0).sum(1)
    order = count.argsort(stable=True)
    solvable = order[: int((count <= 2 * C.shape[1]).sum())]
    for first in range(0, len(solvable), _GROUP):
        rows = solvable[first : first + _GROUP]  # alike in size, so that padding costs little
        most = int(count[rows[-1]])
        values, index = v[rows].topk(most)
        target = z[rows].double()
        D = C[index].double()  # (b, most, e)
        solved = _minimise(values.double(), D, target, penalty[rows, None].double())
        residual[rows] = (target - (solved[:, None] @ D)[:, 0]).to(z.dtype)
        w[rows] = torch.zeros_like(v[rows]).scatter_(1, index, solved.to(v.dtype))
    rest = order[len(solvable) :]
    residual[rest] = z[rest] - v[rest] @ C
    slack = torch.addmm(penalty[:, None], residual, C.T, alpha=-2)
    return w, torch.where(w > 0, slack.abs(), (-slack).clamp_min(0)).amax(1)
