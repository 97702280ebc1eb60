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
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import ACCUMULATE, OpSpec, draw, fraction_of_bound, operand_error
from clipsteer.ops.semantic_drift import semantic_drift, semantic_drift_reference

# e^x in roundings: 1 for the reduced argument, 2 for the polynomial and its last step, 1 for the
# scaling.
EXP = 4


def depth(rows: int) -> int:
    """No backend adds more terms one after the other: within a tile, tile by tile of a part, part
    by part."""
    return min(rows, 512 + rows // 64)


def log_weights(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """−‖·‖²/2σ², its log-weight, and what the former may be off by: (C, N) in float64."""
    old = inputs["old"].double()
    mu = inputs["prototypes"].double()
    u = ACCUMULATE[inputs["old"].dtype]
    d = old.shape[1]
    width = 2**0.5 * inputs["sigma"]
    t = -(torch.cdist(mu, old, compute_mode="donot_use_mm_for_euclid_dist") / width).square()
    a = old.abs() / width
    b = mu.abs() / width
    cross = b @ a.T
    size = a.square().sum(1) + b.square().sum(1, keepdim=True) + 2 * cross
    # d products, two sums of the three parts, κ and its rounding; then t − peak and the telescoped
    # peaks
    delta = (d + 6) * u * size + 2 * operand_error(inputs["old"].dtype) * cross + 4 * u * t.abs()
    floor = math.log(inputs["floor"]) if inputs["floor"] else -math.inf
    delta = delta + (u * abs(floor) if inputs["floor"] else 0.0)
    # a row at infinity has no weight whatever its distance is rounded to
    far = t == -math.inf
    t = t.clamp(min=-torch.finfo(torch.float64).max)
    return (
        t,
        torch.logaddexp(t, torch.tensor(floor, dtype=torch.float64)),
        torch.where(far, 0.0, delta),
    )


def check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    mu = inputs["prototypes"]
    value = outputs["prototypes"]
    rows = inputs["old"].shape[0]
    if 0 in inputs["old"].shape or 0 in mu.shape:
        return {
            "prototypes": 0.0
            if torch.allclose(value, mu, rtol=0, atol=0, equal_nan=True)
            else math.inf
        }
    u = ACCUMULATE[mu.dtype]
    half = mu.dtype in (torch.float16, torch.bfloat16)
    t, log_w, delta = log_weights(inputs)
    # two exponentials; the sums are multiplied by one whenever a tile (of at least 64 rows) or a
    # part raises the peak; on tensor cores weights and movements are sums of two bfloat16 each
    steps = (2 * EXP + 2 + (EXP + 1) * (rows // 32 + 1)) * u + (2.0**-16 if half else 0.0)
    delta = delta + steps
    v = inputs["new"].double() - inputs["old"].double()
    p = log_w.softmax(1)
    drift = p @ v
    truth = mu.double() + drift
    high = (log_w + delta - (log_w - delta).logsumexp(1, keepdim=True)).exp().clamp(max=1.0)
    low = (log_w - delta - (log_w + delta).logsumexp(1, keepdim=True)).exp()
    moves = torch.maximum(high - p, p - low)
    spread = torch.stack(
        [m @ (v - mean).abs().nan_to_num(posinf=0.0) for m, mean in zip(moves, drift)]
    )
    size = high @ v.abs()
    # weights below the normal range are lost
    lost = (
        4
        * torch.finfo(torch.float64 if mu.dtype == torch.float64 else torch.float32).tiny
        * v.abs().sum(0)
    )
    extra = operand_error(mu.dtype) + (2.0**-15 if half else 0.0)
    # the roundings of v, of a product and of both sums
    terms = 2 * depth(rows) + 4
    return {
        "prototypes": fraction_of_bound(
            value,
            truth,
            size,
            terms,
            extra,
            (spread + lost).nan_to_num(posinf=0.0),
        )
    }


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    """Keys N, C, d; floor=1 has one. σ is such that a few rows share each prototype's weight.
    ``exact`` has a tiny σ: the nearest rows alone count, ties alike, so that sums of integers stay
    integers."""
    N = shape["N"]
    C = shape["C"]
    d = shape["d"]
    old, step = (draw((N, d), dtype, generator, scale, exact) for _ in range(2))
    prototypes = draw((C, d), dtype, generator, scale, exact)
    sigma = 2.0**-6 if exact else scale * (d / 4) ** 0.5
    floor = 1e-3 if shape.get("floor") and not exact else 0.0
    return {"old": old, "new": old + step, "prototypes": prototypes, "sigma": sigma, "floor": floor}


@torch.no_grad()
def _whole(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float, floor: float) -> Tensor:
    """addmm + exp + mm over the whole (C, N) matrix, in place where it can be: the best plain torch
    does."""
    inverse = 1 / (2 * sigma**2)
    w = torch.addmm(old.square().sum(1).mul_(-inverse), prototypes, old.T, alpha=2 * inverse)
    w.sub_(prototypes.square().sum(1, keepdim=True).mul_(inverse)).exp_().add_(floor)
    return prototypes + (w @ (new - old)) / w.sum(1, keepdim=True)


@torch.no_grad()
def _softmax(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float, floor: float) -> Tensor:
    """The same, safe from underflow (floor 0)."""
    inverse = 1 / (2 * sigma**2)
    log_w = torch.addmm(old.square().sum(1).mul_(-inverse), prototypes, old.T, alpha=2 * inverse)
    return prototypes + log_w.softmax(1) @ (new - old)


SPEC = OpSpec(
    name="semantic_drift",
    function=semantic_drift,
    reference=semantic_drift_reference,
    outputs=("prototypes",),
    differentiable=(),
    make=_make,
    check=check_values,
    check_grads=lambda *_: {},
    shapes=(
        {"N": 37, "C": 7, "d": 24},
        {"N": 33, "C": 5, "d": 31, "floor": 1},
        {"N": 129, "C": 9, "d": 127},
        {"N": 1, "C": 1, "d": 1},
        {"N": 0, "C": 3, "d": 8},
        {"N": 300, "C": 3, "d": 32, "floor": 1},
        {"N": 31, "C": 0, "d": 8},
        {"N": 128, "C": 129, "d": 64},
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
    baselines={"addmm + exp + mm": _whole, "addmm + softmax + mm": _softmax},
    floor=lambda s: (4.0 * s["N"] * s["C"] * s["d"], 4.0 * (2 * s["N"] + 2 * s["C"]) * s["d"]),
)

SPECS = (SPEC,)
