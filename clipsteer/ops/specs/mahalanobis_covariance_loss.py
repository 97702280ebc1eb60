"""How cases of ``mahalanobis_covariance_loss`` are drawn, and what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import Draw, Inputs, OpSpec, Shape, sizes, unpacked
from clipsteer.ops.mahalanobis_covariance_loss import (
    LowRankDiag,
    mahalanobis_covariance_loss,
    mahalanobis_covariance_loss_reference,
)
from clipsteer.ops.specs._shared import GROUPED_EDGES, without_rank
from clipsteer.ops.specs.mahalanobis_covariance_loss_bounds import check_grads, check_values


def _low_rank(*, U: Tensor, s: Tensor, diag: Tensor, **rows: Any) -> Tensor:
    """U (C, d, r), s (C, r), diag (C, d)."""
    return mahalanobis_covariance_loss(factor=LowRankDiag(U, s, diag), **rows)


def _low_rank_reference(*, U: Tensor, s: Tensor, diag: Tensor, **rows: Any) -> Tensor:
    """U (C, d, r), s (C, r), diag (C, d)."""
    return mahalanobis_covariance_loss_reference(factor=LowRankDiag(U, s, diag), **rows)


def _draw(case: Draw) -> Inputs:
    """Keys B, C, d, and r in low rank; plain=1 does not normalise. About one row in eight is
    ignored."""
    dtype = case.dtype
    generator = case.generator
    B, C, d = unpacked(case.shape, "B C d")
    r = case.shape.get("r")
    normalize = not case.shape.get("plain")
    scale = case.scale if normalize else min(case.scale, 1.0)  # squares have to stay in range
    new = case.tensor(B, d, scale=scale)
    old = case.tensor(B, d, scale=scale)
    labels = torch.randint(0, C, (B,), generator=generator)
    ignored = torch.rand(B, generator=generator) < 0.125
    labels = torch.where(ignored, -1, labels)
    inputs: Inputs = {"new": new, "old": old, "labels": labels}
    if r is None:
        factor = case.tensor(C, d, d, scale=d**-0.5)
        return inputs | {"factor": factor, "normalize": normalize}
    # I - U s Uᵀ with ‖U‖ near 1 and s in (0, 1/2): a precision in Woodbury's form
    inputs["U"] = case.tensor(C, d, r, scale=(d**0.5 + r**0.5) ** -1)
    s = -torch.rand(C, r, generator=generator).div(2).to(dtype)
    diag = (1 + torch.rand(C, d, generator=generator)).to(dtype)
    if case.exact:
        s = -torch.ones(C, r, dtype=dtype)
        diag = torch.full((C, d), 4.0, dtype=dtype)
    return inputs | {"s": s, "diag": diag, "normalize": normalize}


def _unit_rows(x: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


def _whitened(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    normalize: bool,
    *,
    squares: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    C: int,
) -> Tensor:
    """What one would write instead of the pair loop: each class's rows through its factor, then
    their distances."""
    new = _unit_rows(new, normalize)
    old = _unit_rows(old, normalize)
    total = new.new_zeros(())
    for c in range(C):
        rows = (labels == c).nonzero().squeeze(1)
        if len(rows) > 1:
            i, j = torch.triu_indices(len(rows), len(rows), 1)
            after = (squares(new[rows], i, j, c) + 1e-8).sqrt()
            before = (squares(old[rows], i, j, c) + 1e-8).sqrt()
            total = total + (before - after).abs().sum()
    return total / len(new)


def _vectorised(*, factor: Tensor, **rows: Any) -> Tensor:
    """factor (C, d, d)."""

    def squares(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        z = x @ factor[c]
        return (z[i] - z[j]).square().sum(-1)

    return _whitened(**rows, squares=squares, C=factor.shape[0])


def _vectorised_low_rank(*, U: Tensor, s: Tensor, diag: Tensor, **rows: Any) -> Tensor:
    """U (C, d, r), s (C, r), diag (C, d)."""

    def squares(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        p = x @ U[c]
        apart = (x[i] - x[j]).square()
        apart_in_U = (p[i] - p[j]).square()
        return apart @ diag[c] + apart_in_U @ s[c]

    return _whitened(**rows, squares=squares, C=U.shape[0])


def _pair_loop(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    factor: Tensor,  # (C, d, d)
    normalize: bool,
) -> Tensor:
    """The textbook's: class by class, pair by pair, a vector times a matrix for each distance."""
    new = _unit_rows(new, normalize)
    old = _unit_rows(old, normalize)

    def distance(x: Tensor, i: int, j: int, c: int) -> Tensor:
        square = ((x[i] - x[j]) @ factor[c]).square().sum()
        return (square + 1e-8).sqrt()

    total = new.new_zeros(())
    for c in labels[labels >= 0].unique().tolist():
        rows = (labels == c).nonzero().squeeze(1).tolist()
        for at, i in enumerate(rows):
            for j in rows[at + 1 :]:
                before = distance(old, i, j, c)
                after = distance(new, i, j, c)
                total = total + (before - after).abs()
    return total / len(new)


def _floor(shape: Shape) -> tuple[float, float]:
    B, C, d = unpacked(shape, "B C d")
    return 4.0 * B * d**2, 4.0 * (2 * B * d + C * d**2)


def _low_rank_floor(shape: Shape) -> tuple[float, float]:
    B, C, d, r = unpacked(shape, "B C d r")
    return 4.0 * B * d * r, 4.0 * (2 * B + C * (r + 1)) * d


_EDGES = sizes("B C d r plain", (7, 2, 33, 5), *GROUPED_EDGES)
# several blocks of rows a class, several tiles of columns
_ON_DEVICE = sizes("B C d r", (150, 6, 320, 40))
_BENCH = {
    "B48-C20": {"B": 48, "C": 20, "d": 768},
    "B256-C20": {"B": 256, "C": 20, "d": 768},
}
_LOW_RANK_BENCH = {"B256-C20-r64": {"B": 256, "C": 20, "d": 768, "r": 64}}
_COMMON: dict[str, Any] = {
    "outputs": ("loss",),
    "differentiable": ("new",),
    "draw": _draw,
    "check": check_values,
    "check_grads": check_grads,
    "exact": False,
}


SPEC = OpSpec(
    name="mahalanobis_covariance_loss",
    function=mahalanobis_covariance_loss,
    reference=mahalanobis_covariance_loss_reference,
    shapes=without_rank(_EDGES),
    device_shapes=without_rank(_ON_DEVICE),
    small_shape={"B": 6, "C": 2, "d": 3},
    repeat_shape={"B": 200, "C": 5, "d": 40},
    bench_shapes=_BENCH,
    gpu_bench_shapes=_BENCH,
    baselines={"vectorised": _vectorised, "pair loop": _pair_loop},
    floor=_floor,
    **_COMMON,
)
LOW_RANK_SPEC = OpSpec(
    name="mahalanobis_covariance_loss_low_rank",
    function=_low_rank,
    reference=_low_rank_reference,
    shapes=_EDGES,
    device_shapes=_ON_DEVICE,
    small_shape={"B": 6, "C": 2, "d": 3, "r": 2},
    repeat_shape={"B": 200, "C": 5, "d": 40, "r": 17},
    bench_shapes=_LOW_RANK_BENCH,
    gpu_bench_shapes=_LOW_RANK_BENCH,
    baselines={"vectorised": _vectorised_low_rank},
    floor=_low_rank_floor,
    **_COMMON,
)

SPECS = (SPEC, LOW_RANK_SPEC)
