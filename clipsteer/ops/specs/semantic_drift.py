"""What ``semantic_drift`` may be off by.

With Δ = Σ p_i v_i, Σ p_i = 1, an error ε_i of each log-weight gives p'_i ∝ p_i e^{ε_i} and, as Σ
p_i (v_i − Δ) = 0, |Δ' − Δ| ≤ Σ |p'_i − p_i| |v_i − Δ|. From |ε_i| ≤ δ_i alone p'_i lies in [low_i,
high_i], high_i = min(1, e^{δ_i} p_i / Σ_j p_j e^{-δ_j}) and low_i its mirror image, so the bound
stays true, and finite, when the exponent makes δ useless: then it says no more than that Δ' is an
average of the rows that can be nearest. δ is the error of ‖old − μ‖²/2σ², expanded into three sums
of d products, which is relative to (‖old‖ + ‖μ‖)² and not to the distance: about d·u·(‖old‖ +
‖μ‖)²/2σ².
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from clipsteer.ops._bounds import (
    ACCUMULATE,
    HALVES,
    flushed,
    fraction_of_bound,
    operand_error,
    smallest_normal,
)
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.semantic_drift import semantic_drift, semantic_drift_reference
from clipsteer.ops.specs._shared import EXP

# What a product of two numbers is off by, relatively, that are sums of two bfloat16 each, rounded
# to nearest, without the product of the low parts: u² = 2⁻¹⁶ for either rest, u² for that product.
# A term passes through at most 16 additions of its part of a tile, half as many as there are rows
# where these are fewer, and three for every 32 rows: fewer than rows.
SPLIT = 3 * 2.0**-16


def depth(rows: int) -> int:
    """No backend adds more terms one after the other: within a tile, tile by tile of a part, part
    by part."""
    return min(rows, 512 + rows // 64)


def log_weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The log-weights, and what −‖·‖²/2σ² may be off by: (C, N) in float64."""
    old = inputs["old"].double()  # (N, d)
    mu = inputs["prototypes"].double()  # (C, d)
    dtype = inputs["old"].dtype
    u = ACCUMULATE[dtype]
    d = old.shape[1]
    width = 2**0.5 * inputs["sigma"]
    distance = torch.cdist(mu, old, compute_mode="donot_use_mm_for_euclid_dist")
    t = -(distance / width).square()
    a = old.abs() / width
    b = mu.abs() / width
    cross = b @ a.T
    size = a.square().sum(1) + b.square().sum(1, keepdim=True) + 2 * cross
    # d products, two sums of the three parts, κ and its rounding; then t − peak and the telescoped
    # peaks
    delta = (d + 6) * u * size
    delta = delta + 2 * operand_error(dtype) * cross
    delta = delta + 2 * flushed(dtype, d, b.sum(1, keepdim=True), a.sum(1))
    delta = delta + 4 * u * t.abs()
    log_floor = -math.inf
    if inputs["floor"]:
        log_floor = math.log(inputs["floor"])
        delta = delta + u * abs(log_floor)
    # a row at infinity has no weight whatever its distance is rounded to
    delta = torch.where(t == -math.inf, 0.0, delta)
    t = t.clamp(min=-torch.finfo(torch.float64).max)
    log_w = torch.logaddexp(t, torch.tensor(log_floor, dtype=torch.float64))
    return log_w, delta


def _unmoved(value: Tensor, mu: Tensor) -> bool:
    return torch.allclose(value, mu, rtol=0, atol=0, equal_nan=True)


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """The average is off by what the shares are, by its own sums, and by what underflows."""
    mu = inputs["prototypes"]  # (C, d)
    value = outputs["prototypes"]
    rows = inputs["old"].shape[0]
    if 0 in inputs["old"].shape or 0 in mu.shape:
        return {"prototypes": 0.0 if _unmoved(value, mu) else math.inf}
    u = ACCUMULATE[mu.dtype]
    half = mu.dtype in HALVES
    log_w, delta = log_weights(inputs)  # (C, N)
    # two exponentials; the sums are multiplied by one whenever a tile (of at least 64 rows) or a
    # part raises the peak; where halves are multiplied weights and movements are sums of two
    # bfloat16 each
    rescalings = rows // 32 + 1
    steps = (2 * EXP + 2 + (EXP + 1) * rescalings) * u + (2.0**-16 if half else 0.0)
    delta = delta + steps
    v = inputs["new"].double() - inputs["old"].double()  # (N, d)
    p = log_w.softmax(1)
    drift = p @ v  # (C, d)
    above = log_w + delta
    below = log_w - delta
    high = (above - below.logsumexp(1, keepdim=True)).exp().clamp(max=1.0)
    low = (below - above.logsumexp(1, keepdim=True)).exp()
    moves = torch.maximum(high - p, p - low)
    spread = []
    for share, mean in zip(moves, drift):
        apart = (v - mean).abs().nan_to_num(posinf=0.0)
        spread.append(share @ apart)
    # weights below the normal range are lost
    lost = 4 * smallest_normal(mu.dtype) * v.abs().sum(0)
    # each of the three products by pairs, of weights that are at most twice the largest, which is
    # at least 1
    weights = 2.0 * rows
    lost = lost + 3 * flushed(mu.dtype, rows, weights, v.abs().sum(0))
    error = fraction_of_bound(
        value,
        mu.double() + drift,
        high @ v.abs(),
        2 * depth(rows) + 4,  # the roundings of v, of a product and of both sums
        operand_error(mu.dtype) + (SPLIT if half else 0.0),
        (torch.stack(spread) + lost).nan_to_num(posinf=0.0),
    )
    return {"prototypes": error}


def _draw(case: Draw) -> Inputs:
    """Keys N, C, d; floor=1 has one. σ is such that a few rows share each prototype's weight.
    ``exact`` has a tiny σ: the nearest rows alone count, ties alike, so that sums of integers stay
    integers."""
    N, C, d = unpacked(case.shape, "N C d")
    old = case.tensor(N, d)
    step = case.tensor(N, d)
    return {
        "old": old,
        "new": old + step,
        "prototypes": case.tensor(C, d),
        "sigma": 2.0**-6 if case.exact else case.scale * (d / 4) ** 0.5,
        "floor": 1e-3 if case.shape.get("floor") and not case.exact else 0.0,
    }


@torch.no_grad()
def _plain(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
    sigma: float,
    floor: float,
    *,
    stable: bool,
) -> Tensor:
    """The best plain torch does over the whole (C, N) matrix, in place where it can be; ``stable``:
    by a softmax, safe from underflow but without a floor."""
    inverse = 1 / (2 * sigma**2)
    norms = old.square().sum(1).mul_(-inverse)
    # log-weights, up to a number for each prototype
    w = torch.addmm(norms, prototypes, old.T, alpha=2 * inverse)
    if stable:
        return prototypes + w.softmax(1) @ (new - old)
    norms = prototypes.square().sum(1, keepdim=True).mul_(inverse)
    w.sub_(norms).exp_().add_(floor)
    return prototypes + (w @ (new - old)) / w.sum(1, keepdim=True)


def _no_gradients(*_: Tensors) -> Errors:
    return {}


def _floor(shape: Shape) -> tuple[float, float]:
    N, C, d = unpacked(shape, "N C d")
    return 4.0 * N * C * d, 4.0 * (2 * N + 2 * C) * d


SPEC = OpSpec(
    name="semantic_drift",
    function=semantic_drift,
    reference=semantic_drift_reference,
    outputs=("prototypes",),
    differentiable=(),
    draw=_draw,
    check=check_values,
    check_grads=_no_gradients,
    shapes=sizes(
        "N C d floor",
        (37, 7, 24),
        (33, 5, 31, 1),
        (129, 9, 127),
        (1, 1, 1),
        (0, 3, 8),
        (300, 3, 32, 1),
        (31, 0, 8),
        (128, 129, 64),
    ),
    small_shape={"N": 5, "C": 3, "d": 4},
    repeat_shape={"N": 5000, "C": 40, "d": 48},
    bench_shapes={
        "N10k-C1000": {"N": 10_000, "C": 1000, "d": 768},
        "N50k-C1000": {"N": 50_000, "C": 1000, "d": 768},
    },
    gpu_bench_shapes={"N50k-C1000": {"N": 50_000, "C": 1000, "d": 768}},
    device_shapes=({"N": 5000, "C": 70, "d": 200, "floor": 1},),
    gate=("prototypes",),
    baselines={
        "addmm + exp + mm": partial(_plain, stable=False),
        "addmm + softmax + mm": partial(_plain, stable=True),
    },
    floor=_floor,
)

SPECS = (SPEC,)
