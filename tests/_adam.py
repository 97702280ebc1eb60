"""One step of Adam on a matrix in float64, with what any order of the same sums in less precision may be off by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-8


def step_and_bounds(
    W: Tensor,  # (n, d) before the step; rows of norm 1 or 0 where unit
    moments: tuple[Tensor, Tensor],  # (n, d) each, before the step
    grad: Tensor,  # (n, d)
    step: int,  # counted from 1
    lr: float,
    unit: bool,
    factor: float = 1.0,
    rounded: bool = False,  # the decay rates are rounded to W's precision, and powers are of a powf
) -> dict[str, tuple[Tensor, Tensor]]:
    """{"exp_avg", "exp_avg_sq", "weight"}: what it is after the step and the error that W's precision allows, (n, d).

    u is the unit roundoff. A sum of d products is off by d u of the sum of their sizes in any order (Higham, Accuracy
    and Stability, 3.1); the norm of a row by (d / 2 + 2) u of itself. So the gradient's part along a row, in which a
    sum and, in a kernel that divides by the norm, two norms take part, is off by (2 d + 9) u |w| Σ |g w|, and by as
    much as the row's norm is off 1. The rest counts roundings: a constant, a product and a sum for each term. A
    quotient's error is what its denominator may fall by. Of W in float64 what is computed here is off by as much again.
    """
    d = W.shape[1]
    u = torch.finfo(W.dtype).eps / (1 if W.dtype == torch.float64 else 2)
    beta1, beta2 = 0.9, 0.999
    w, m, v, g = (t.double() for t in (W, *moments, grad))
    g = g * factor
    g_error = u * g.abs()
    if unit:
        sizes = (g * w).abs().sum(1, keepdim=True)
        along = (g * w).sum(1, keepdim=True)
        square = w.square().sum(1, keepdim=True)
        off = (square - 1).abs() * (along * w).abs()
        g_error = g_error + (2 * d + 9) * u * w.abs() * sizes + off + 2 * u * (g.abs() + (along * w).abs())
        g = g - along * w / torch.where(square > 0, square, 1.0)
    m_error = (1 - beta1) * g_error + 4 * u * (m.abs() + (1 - beta1) * (g.abs() + m.abs()))
    v_error = (1 - beta2) * (2 * g.abs() * g_error + g_error.square()) + 4 * u * (v + (1 - beta2) * g.square())
    # u of beta is u beta / (1 - beta) of 1 - beta; beta^t, off by t u and a powf's 8 u, is worst at t = 1
    rates = [9 * u * beta / (1 - beta) if rounded else 0.0 for beta in (beta1, beta2)]
    m_error, v_error = m_error + rates[0] * g.abs() * (1 - beta1), v_error + rates[1] * g.square() * (1 - beta2)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
    rate, scale = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    divisor = v.sqrt() / scale + EPS
    least = (v - v_error).clamp_min(0).sqrt() / scale * (1 - 4 * u) + EPS * (1 - u)
    change = rate * m / divisor
    most = rate * (m.abs() + m_error) / least
    change_error = rate * m_error / least + rate * m.abs() * (1 / least - 1 / divisor)
    change_error = change_error + (6 * u + rates[0] + rates[1] / 2) * most
    # |exp_avg| ≤ 7.3 sqrt(exp_avg_sq) whatever the gradients were (Cauchy and Schwarz): so far apart two steps can be
    furthest = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) * scale * rate
    change_error = change_error.clamp_max(2 * furthest * (1 + 8 * u))
    after, after_error = w - change, change_error + 2 * u * (w.abs() + change.abs())
    if unit:
        norm = after.norm(dim=1, keepdim=True)
        norm_error = after_error.norm(dim=1, keepdim=True)
        live = norm > 0  # a row of zeros stays
        norm = torch.where(live, norm, 1.0)
        moved = after_error + after.abs() / norm * norm_error
        after_error = moved / (norm - norm_error).clamp_min(1e-300) + (d / 2 + 5) * u * after.abs() / norm
        after = after / norm
    return {"exp_avg": (m, m_error), "exp_avg_sq": (v, v_error), "weight": (after, after_error)}


def assert_step(
    found: dict[str, Tensor],  # (n, d) each, as step_and_bounds names them
    expected: dict[str, tuple[Tensor, Tensor]],
    name: str,
) -> None:
    for key, (truth, bound) in expected.items():
        error = (found[key].detach().cpu().double() - truth).abs()
        smallest = torch.finfo(found[key].dtype).smallest_normal
        worst = float((error / (bound + smallest)).max())
        assert worst <= 1, (name, key, worst)


def norm_bound(W: Tensor) -> float:
    """By how much a row of W (n, d) that was divided by its norm, and the norm that a test takes of it, may miss 1."""
    return (W.shape[1] + 8) * torch.finfo(W.dtype).eps / 2
