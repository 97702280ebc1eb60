"""The non-negative lasso for many targets over one dictionary, solved exactly by active sets.

    w* = argmin over w >= 0 of ‖wC - z‖² + λ Σ w          C (n, e), z (e,)

The optimality conditions: slack = λ - 2(z - wC)Cᵀ is 0 where w > 0 and not negative elsewhere. From
w = 0, each round lets the concepts enter that miss them most, and minimises over those in use:
Newton steps, each as far as the first weight that would turn negative, which then leaves (Lawson &
Hanson 1974, chapter 23; here several concepts enter at a time, and all rows move at once). The
objective falls in every round, so that no set of concepts comes back. A round costs one product
with the dictionary, and a sparse row needs few; the ADMM of SpLiCE (Bhalla et al. 2024, arXiv
2402.10376) needs two products a step and hundreds of steps, and ends near the zeros that are exact
here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# for a block of rows against the whole dictionary
_BLOCK_BYTES = 256 << 20
# for the concepts in use by a group of rows
_GROUP_BYTES = 32 << 20
_ENTER = 8
# of the diagonal of a Gram matrix: concepts that depend on each other share a weight rather than
# fail
_JITTER = 1e-11


class Decomposition(NamedTuple):
    """Sparse non-negative codes, and how optimal they are.

    Attributes:
        weights: (B, n), none negative, exactly 0 off the support.
        violation: (B,) by how much the optimality conditions are missed: the largest |slack| on the
            support or negative slack elsewhere. The objective is at most violation · (Σ w + Σ w*)
            above its minimum.
        converged: (B,) whether violation <= tol; the other rows are the best that max_iterations
            rounds gave.
    """

    weights: Tensor
    violation: Tensor
    converged: Tensor

    @property
    def l0(self) -> Tensor:
        """(B,) concepts in use."""
        return (self.weights > 0).sum(-1)


def _checked(
    z: Tensor,  # (B, e)
    C: Tensor,  # (n, e)
    l1: float | Tensor,  # () or (B,)
    tol: float,
    max_iterations: int,
) -> Tensor:
    """λ of every row, (B,)."""
    shapes = f"z is {tuple(z.shape)}, C {tuple(C.shape)}"
    if z.ndim != 2 or C.ndim != 2 or z.shape[1] != C.shape[1] or 0 in C.shape:
        raise ValueError(
            f"nonnegative_lasso: expected z (B, e) and C (n, e) with n, e >= 1; {shapes}"
        )
    is_alike = z.dtype == C.dtype and z.device == C.device
    if not is_alike or z.dtype not in (torch.float32, torch.float64):
        got = f"z is {z.dtype} on {z.device}, C {C.dtype} on {C.device}"
        raise TypeError(
            f"nonnegative_lasso: z and C must share float32 or float64 and a device; {got}"
        )
    if not (tol > 0 and max_iterations >= 1):
        raise ValueError(
            f"nonnegative_lasso: tol > 0 and max_iterations >= 1, got {tol} and {max_iterations}"
        )
    penalty = torch.as_tensor(l1, dtype=z.dtype, device=z.device)
    is_valid = (penalty >= 0) & penalty.isfinite()
    if penalty.shape not in ((), (len(z),)) or not bool(is_valid.all()):
        raise ValueError(
            f"nonnegative_lasso: l1 must be finite, not negative, one or one a row; got {l1!r}; "
            f"{shapes}"
        )
    if not bool(z.isfinite().all() & C.isfinite().all()):
        raise ValueError(f"nonnegative_lasso: z and C must be finite; {shapes}")
    return penalty.expand(len(z))


@torch.no_grad()
def nonnegative_lasso(
    z: Tensor,  # (B, e)
    C: Tensor,  # (n, e)
    l1: float | Tensor,  # () or (B,)
    *,
    tol: float = 1e-6,
    max_iterations: int = 200,
) -> Decomposition:
    """w* = argmin over w >= 0 of ‖wC - z‖² + λ Σ w, for every row of z.

    Args:
        z: (B, e) targets, float32 or float64; B may be 0. C: (n, e) dictionary, a concept a row.
        l1: λ, one number or one a row, (B,). Row b is all zero exactly when λ_b >= 2 max_i ⟨C_i,
            z_b⟩.
        tol: by how much the optimality conditions may be missed, on the scale of unit rows; float32
            cannot do much better than the default, float64 can.
        max_iterations: rounds, each of one product (B, e) × (e, n) over the rows not yet done. A
            sparse row takes about a quarter as many rounds as it has concepts. Made for sparse
            rows: with hundreds of concepts in use, a row takes a second.

    Deterministic. About 300 MB are held beyond the result, whatever B. Where several w are optimal,
    one is returned.

    Raises:
        ValueError: shapes, values that are not finite, a negative λ.
        TypeError: dtypes or devices.
    """
    penalty = _checked(z, C, l1, tol, max_iterations)
    weights = z.new_zeros(len(z), len(C))
    violation = z.new_zeros(len(z))
    size = max(1, _BLOCK_BYTES // (4 * C[:, 0].nbytes))
    # reduced precision that a caller allows elsewhere has no place here
    with torch.autocast(z.device.type, enabled=False):
        for rows in torch.arange(len(z), device=z.device).split(size):
            _solve(weights, violation, rows, z, C, penalty, tol, max_iterations)
    return Decomposition(weights, violation, violation <= tol)


def _solve(
    weights: Tensor,  # (B, n), filled in
    violation: Tensor,  # (B,), filled in
    rows: Tensor,  # (b,) which to do
    z: Tensor,  # (B, e)
    C: Tensor,  # (n, e)
    penalty: Tensor,  # (B,)
    tol: float,
    rounds: int,
) -> None:
    """Fill in some rows of weights and violation. A row leaves when it is done."""
    # concepts in use (b, k) and their weights; where a weight is 0 the place is free
    index = rows.new_zeros(len(rows), 0)
    w = z.new_zeros(len(rows), 0, dtype=torch.float64)
    residual = z[rows]  # (b, e)
    for remaining in range(rounds, -1, -1):
        slack = torch.addmm(penalty[rows, None], residual, C.T, alpha=-2)  # (b, n)
        missed = _missed(slack, index, w)
        done = missed <= tol if remaining else torch.ones_like(missed, dtype=torch.bool)
        if bool(done.any()):
            zeros = slack[done].zero_()
            weights[rows[done]] = zeros.scatter_add_(1, index[done], w[done].to(z.dtype))
            violation[rows[done]] = missed[done]
            rest = ~done
            rows, index, w, slack = (x[rest] for x in (rows, index, w, slack))
        if not len(rows):
            return
        # those in use do not enter twice, whatever rounding says
        taken = torch.where(w > 0, torch.inf, 0.0)
        slack.scatter_add_(1, index, taken.to(z.dtype))
        count = min(max(_ENTER, w.shape[1] // 4), len(C))
        worst, entering = slack.topk(count, largest=False)
        on = torch.cat([w > 0, worst < -tol], 1)
        index = torch.cat([index, entering], 1)
        w = torch.cat([w, torch.zeros_like(worst, dtype=torch.float64)], 1)
        index, w, residual = _minimise(index, w, on, z[rows], C, penalty[rows])


def _missed(
    slack: Tensor,  # (b, n)
    index: Tensor,  # (b, k)
    w: Tensor,  # (b, k)
) -> Tensor:
    """By how much each row misses the optimality conditions, (b,)."""
    missed = (-slack).amax(1).clamp_min(0)
    if not w.shape[1]:
        return missed
    in_use = slack.gather(1, index).abs() * (w > 0)
    return torch.maximum(missed, in_use.amax(1))


def _minimise(
    index: Tensor,  # (b, k)
    w: Tensor,  # (b, k)
    on: Tensor,  # (b, k)
    z: Tensor,  # (b, e)
    C: Tensor,  # (n, e)
    penalty: Tensor,  # (b,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise over the concepts that are on: their indices and weights (b, k), and the residual z
    - wC (b, e)."""
    on, places = on.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, places)
    w = w.gather(1, places)
    residual = torch.empty_like(z)
    count = on.sum(1)
    order = count.argsort(stable=True)  # groups of like size, so that padding costs little
    row_bytes = 8 * C.shape[1] * max(1, int(count.max()))
    for rows in order.split(max(1, _GROUP_BYTES // row_bytes)):
        k = int(count[rows[-1]])
        D = C[index[rows, :k]].double()  # (g, k, e)
        target = z[rows].double()  # (g, e)
        linear = (D @ target[..., None])[..., 0]
        linear = linear - penalty[rows, None].double() / 2
        best = _newton(w[rows, :k], on[rows, :k], D @ D.mT, linear)
        w[rows, :k] = best
        fitted = (best[:, None] @ D)[:, 0]
        residual[rows] = (target - fitted).to(z.dtype)
    k = int((w > 0).sum(1).max()) if w.shape[1] else 0
    w, places = w.sort(dim=1, descending=True, stable=True)
    return index.gather(1, places)[:, :k], w[:, :k], residual


def _newton(
    w: Tensor,  # (g, k)
    on: Tensor,  # (g, k)
    gram: Tensor,  # (g, k, k)
    linear: Tensor,  # (g, k)
) -> Tensor:
    """argmin over w >= 0 of w·gram·w - 2 w·linear with w zero where not on, from a w that is.

    As in Lawson & Hanson, a weight that leaves does not come back in the same round; at least one
    that has just entered stays, since the step descends.
    """
    k = w.shape[1]
    # above the rounding of a k × k factorisation, so that it exists
    largest = gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    ridge = (_JITTER + k * k * 2.0**-52) * largest  # (g, 1)
    for _ in range(k + 1):
        free = on.double()
        short = free * (linear - (gram @ w[..., None])[..., 0])
        within = gram * free[:, :, None] * free[:, None]
        diagonal = torch.where(on, ridge, 1.0)
        factor, failed = torch.linalg.cholesky_ex(within + torch.diag_embed(diagonal))
        newton = torch.cholesky_solve(short[..., None], factor)[..., 0] * free
        step = torch.where(failed[:, None] == 0, newton, 0.0)
        # below 1 where a weight would turn negative
        share = torch.where(w + step < 0, w / -step, 1.0)
        first = share.amin(1, keepdim=True)
        leaving = (share == first) & (first < 1)
        w = torch.where(leaving, 0.0, w + first * step).clamp_min(0)
        on = on & ~leaving
        if bool((first == 1).all()):
            break
    return w
