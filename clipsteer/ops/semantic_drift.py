"""``semantic_drift``: μ_c += Σ_i w_ci (new_i − old_i) / Σ_i w_ci with w_ci = exp(−‖old_i −
μ_c‖²/2σ²) + floor.

Prototypes follow the rows around them as a network changes. Fused: rows stream past in tiles; a
product of prototypes and rows gives the distances, each prototype keeps its largest log-weight and
sums relative to it, a second product adds the tile's movement. So nothing underflows, and no N×C
matrix is ever whole. A statistic, without gradient. Source: Yu et al. 2020 (SDC, arXiv 2004.00440),
equations 8–10; Wu et al. 2025 (arXiv 2502.07560), the floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import remembered, step
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._steps import contiguous

__all__ = ["semantic_drift", "semantic_drift_reference"]

MEDIAN_ROWS = 4096


def reference_sums(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
    scale: Tensor,  # (3,), of _scale
) -> tuple[Tensor, Tensor, Tensor]:
    unit, kappa, log_floor = scale.unbind()
    old = old.double()
    mu = prototypes.double()
    # differences first: no cancellation, and no N×C×d
    distance = torch.cdist(mu, old, compute_mode="donot_use_mm_for_euclid_dist") * unit  # (C, N)
    log_w = (-kappa * distance.square()).clamp(min=-torch.finfo(torch.float64).max)
    log_w = torch.logaddexp(log_w, log_floor)
    peak = log_w.amax(1)
    w = (log_w - peak.unsqueeze(1)).exp()
    return peak, w.sum(1), w @ (new.double() - old)


@torch.no_grad()
def semantic_drift_reference(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
    sigma: float | str = 1.0,
    floor: float = 0.0,
) -> Tensor:
    """The definition in plain torch: a softmax over rows of −‖old_i − μ_c‖²/2σ² (floor 0), all in
    float64."""
    if 0 in old.shape or 0 in prototypes.shape:
        return prototypes.clone()
    width = median_sigma(old, prototypes) if isinstance(sigma, str) else sigma
    scale = _scale(width, floor, old.dtype, old.device)
    return moved_by(prototypes, *reference_sums(old, new, prototypes, scale))


def moved_by(
    prototypes: Tensor,  # (C, d)
    peak: Tensor,  # (C,)
    total: Tensor,  # (C,)
    moved: Tensor,  # (C, d)
) -> Tensor:
    """μ + moved/total, in float64 so that it is rounded once."""
    drift = moved.double() / total.double().unsqueeze(1)
    return (prototypes.double() + drift).to(prototypes.dtype)


def median_sigma(
    old: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
) -> Tensor:
    """σ with σ² = ½·median of ‖old_i − μ_c‖², over every prototype and the first 4,096 rows: a
    float64 scalar.

    Neither is empty. Of an even number of distances the lower middle one is taken; where it is 0, σ
    is the smallest normal number, so that only rows on a prototype count for it.
    """
    rows = old[:MEDIAN_ROWS].to(torch.promote_types(old.dtype, torch.float32))
    means = prototypes.to(rows.dtype)
    # squares of numbers up to 1 neither overflow nor, where it matters, underflow
    unit = torch.maximum(rows.abs().amax(), means.abs().amax())
    unit = unit.clamp(min=torch.finfo(rows.dtype).tiny)
    median = torch.cdist(rows / unit, means / unit).flatten().median()
    half = median.double() * 0.5**0.5
    return (half * unit.double()).clamp(min=torch.finfo(torch.float64).tiny)


def _scale(
    sigma: float | Tensor,
    floor: float,
    dtype: torch.dtype,  # of the rows
    device: torch.device,
) -> Tensor:
    """[unit, κ, log floor] (3,) float64 on the device: κ (unit·‖·‖)² = ‖·‖²/2σ², unit a power of
    two, ½ ≤ κ ≤ 2.

    In units of about √2 σ no distance that counts overflows or underflows, and scaling is exact.
    """
    if not isinstance(sigma, Tensor):
        sigma = torch.full((), sigma, dtype=torch.float64, device=device)
    width = sigma * 2**0.5
    # float32 reaches 2^±126
    limit = 1000 if dtype == torch.float64 else 126
    power = width.log2().round().clamp(-limit, limit)
    unit = torch.ldexp(torch.ones_like(power), -power)
    log_floor = torch.full((), floor, dtype=torch.float64, device=device).log()
    # a width below the smallest unit counts as that
    kappa = (1 / unit / width).square().clamp(max=2)
    return torch.stack([unit, kappa, log_floor])


def drift_sums(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
    sigma: float | str | Tensor,
    floor: float,
    backend: str,
    op: str = "drift_sums",
) -> Any:
    """What a batch says: the largest log-weight (C,), and Σ w (C,) and Σ w (new − old) (C, d)
    relative to it; or what another low-level ``op`` makes of the same arguments."""
    if isinstance(sigma, str):
        sigma = step(median_sigma, old, prototypes)
    scale = step(_scale, sigma, floor, old.dtype, old.device)
    inputs = (contiguous(old), contiguous(new), contiguous(prototypes), scale)
    if backend == "reference":
        return reference_sums(*inputs)
    return call(backend, op, *inputs)


def check_arguments(
    op: str,
    old: Any,  # (N, d)
    new: Any,  # (N, d)
    prototypes: Any,  # (C, d)
    sigma: Any,
    floor: Any,
) -> None:
    """ValueError or TypeError of ``op`` where the arguments of ``semantic_drift`` do not fit."""
    named = {"old": old, "new": new, "prototypes": prototypes}
    _check.check_tensors(op, named)
    if old.dim() != 2:
        raise ValueError(_check.mistake(op, "old", "of shape (N, d)", tuple(old.shape), named))
    _check.check_shape(op, named, "new", tuple(old.shape), "old's (N, d)")
    if prototypes.dim() != 2 or prototypes.shape[1] != old.shape[1]:
        expected = f"of shape (C, d = {old.shape[1]})"
        raise ValueError(_check.mistake(op, "prototypes", expected, tuple(prototypes.shape), named))
    for name, value in (("sigma", sigma), ("floor", floor)):
        if isinstance(value, bool) or not isinstance(value, (int, float, str, torch.SymFloat)):
            raise TypeError(_check.mistake(op, name, "a number", type(value).__name__, named))
    if isinstance(sigma, str):
        if sigma != "median":
            expected = 'a number or "median"'
            raise ValueError(_check.mistake(op, "sigma", expected, repr(sigma), named))
    elif not 0 < sigma < float("inf"):
        raise ValueError(_check.mistake(op, "sigma", "positive and finite", sigma, named))
    if isinstance(floor, str) or not 0 <= floor < float("inf"):
        expected = "a finite number of at least 0"
        raise ValueError(_check.mistake(op, "floor", expected, repr(floor), named))


@remembered
@torch.no_grad()
def semantic_drift(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
    sigma: float | str = 1.0,
    floor: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Move class prototypes by the drift of the rows near them.

    The rows are those of this process; ``continual.DriftAccumulator`` joins those of several, and
    of several batches.

    Args:
        old: (N, d) features of some images under the old network, float32, bfloat16, float16 or
            (reference, cpp) float64.
        new: (N, d) features of the SAME images, in the same order, under the new network.
        prototypes: (C, d) class means under the old network.
        sigma: width of the Gaussian, in the features' unit; SDC takes 0.3 (0.2 on CIFAR-100) for
            unit-norm features, MACIL 1. ``"median"``: σ² is half the median of ‖old_i − μ_c‖² over
            c and the first min(N, 4096) rows, for features that are not normalised.
        floor: added to every weight; 0 makes the weights exactly a softmax over rows, MACIL takes
            1e-5.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        (C, d), of the prototypes' dtype, without gradient; N = 0 returns the prototypes. Never NaN
        while sums of new − old are finite, however far the rows are: distances saturate at about
        4e18 σ in float32 (the reference: 1e154 σ), and rows beyond that count as equally far. Extra
        memory is O((tile + C)·d). Autocast leaves the op alone.

    Raises:
        ValueError: shapes or devices that do not fit, sigma not positive, floor negative.
        TypeError: not tensors, not floating point, or dtypes that differ.
        RuntimeError: the backend asked for cannot run here.

    Source: Yu et al. 2020 (arXiv 2004.00440); Wu et al. 2025 (arXiv 2502.07560).
    """
    check_arguments("semantic_drift", old, new, prototypes, sigma, floor)
    backend = choose("semantic_drift", backend, old)
    if 0 in old.shape or 0 in prototypes.shape:
        return prototypes.clone()
    if backend == "cpp":  # the whole in one call
        return drift_sums(old, new, prototypes, sigma, floor, backend, "moved_prototypes")
    sums = drift_sums(old, new, prototypes, sigma, floor, backend)
    return step(moved_by, prototypes, *sums)
