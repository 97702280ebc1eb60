"""How cases of ``mahalanobis_covariance_loss`` are drawn, and what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import Inputs, OpSpec, Shape, draw, sizes
from clipsteer.ops.mahalanobis_covariance_loss import (
    LowRankDiag,
    mahalanobis_covariance_loss,
    mahalanobis_covariance_loss_reference,
)
from clipsteer.ops.specs.mahalanobis_covariance_loss_bounds import check_grads, check_values


def _low_rank(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    U: Tensor,  # (C, d, r)
    s: Tensor,  # (C, r)
    diag: Tensor,  # (C, d)
    *,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    factor = LowRankDiag(U, s, diag)
    return mahalanobis_covariance_loss(new, old, labels, factor, backend=backend, **options)


def _low_rank_reference(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    U: Tensor,  # (C, d, r)
    s: Tensor,  # (C, r)
    diag: Tensor,  # (C, d)
    **options: Any,
) -> Tensor:
    factor = LowRankDiag(U, s, diag)
    return mahalanobis_covariance_loss_reference(new, old, labels, factor, **options)


def _make(
    shape: Shape,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> Inputs:
    """Keys B, C, d, and r in low rank; plain=1 does not normalise. About one row in eight is
    ignored."""
    B = shape["B"]
    C = shape["C"]
    d = shape["d"]
    r = shape.get("r")
    normalize = not shape.get("plain")
    size = scale if normalize else min(scale, 1.0)  # squares have to stay in range
    new = draw((B, d), dtype, generator, size, exact)
    old = draw((B, d), dtype, generator, size, exact)
    labels = torch.randint(0, C, (B,), generator=generator)
    ignored = torch.rand(B, generator=generator) < 0.125
    labels = torch.where(ignored, -1, labels)
    inputs: Inputs = {"new": new, "old": old, "labels": labels}
    if r is None:
        factor = draw((C, d, d), dtype, generator, d**-0.5, exact)
        return inputs | {"factor": factor, "normalize": normalize}
    # I - U s Uᵀ with ‖U‖ near 1 and s in (0, 1/2): a precision in Woodbury's form
    inputs["U"] = draw((C, d, r), dtype, generator, (d**0.5 + r**0.5) ** -1, exact)
    s = -torch.rand(C, r, generator=generator).div(2).to(dtype)
    diag = (1 + torch.rand(C, d, generator=generator)).to(dtype)
    if exact:
        s = -torch.ones(C, r, dtype=dtype)
        diag = torch.full((C, d), 4.0, dtype=dtype)
    return inputs | {"s": s, "diag": diag, "normalize": normalize}


def _unit_rows(x: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


def _whitened(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    squares: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    C: int,
    normalize: bool,
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


def _vectorised(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    factor: Tensor,  # (C, d, d)
    normalize: bool,
) -> Tensor:
    def square(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        z = x @ factor[c]
        return (z[i] - z[j]).square().sum(-1)

    return _whitened(new, old, labels, square, factor.shape[0], normalize)


def _vectorised_low_rank(
    new: Tensor,  # (B, d)
    old: Tensor,  # (B, d)
    labels: Tensor,  # (B,)
    U: Tensor,  # (C, d, r)
    s: Tensor,  # (C, r)
    diag: Tensor,  # (C, d)
    normalize: bool,
) -> Tensor:
    def square(x: Tensor, i: Tensor, j: Tensor, c: int) -> Tensor:
        p = x @ U[c]
        apart = (x[i] - x[j]).square()
        apart_in_U = (p[i] - p[j]).square()
        return apart @ diag[c] + apart_in_U @ s[c]

    return _whitened(new, old, labels, square, U.shape[0], normalize)


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
    B = shape["B"]
    d = shape["d"]
    return 4.0 * B * d**2, 4.0 * (2 * B * d + shape["C"] * d**2)


def _low_rank_floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    d = shape["d"]
    r = shape["r"]
    return 4.0 * B * d * r, 4.0 * (2 * B + shape["C"] * (r + 1)) * d


_EDGES = sizes(
    "B C d r plain",
    (7, 2, 33, 5),
    (33, 5, 31, 8),
    (4, 9, 127, 129),
    (1, 1, 1, 1, 1),
    (0, 2, 8, 4),
    (129, 2, 32, 33, 1),
    (31, 1, 129, 32),
    (32, 3, 128, 64),
    (31, 2, 203, 197),
)
# several blocks of rows a class, several tiles of columns
_ON_DEVICE = sizes("B C d r", (150, 6, 320, 40))
_COMMON: dict[str, Any] = {
    "outputs": ("loss",),
    "differentiable": ("new",),
    "make": _make,
    "check": check_values,
    "check_grads": check_grads,
    "exact": False,
}


def _dense(shape: Shape) -> Shape:
    return {name: size for name, size in shape.items() if name != "r"}


SPEC = OpSpec(
    name="mahalanobis_covariance_loss",
    function=mahalanobis_covariance_loss,
    reference=mahalanobis_covariance_loss_reference,
    shapes=tuple(map(_dense, _EDGES)),
    device_shapes=tuple(map(_dense, _ON_DEVICE)),
    small_shape={"B": 6, "C": 2, "d": 3},
    repeat_shape={"B": 200, "C": 5, "d": 40},
    bench_shapes={
        "B48-C20": {"B": 48, "C": 20, "d": 768},
        "B256-C20": {"B": 256, "C": 20, "d": 768},
    },
    gpu_bench_shapes={
        "B48-C20": {"B": 48, "C": 20, "d": 768},
        "B256-C20": {"B": 256, "C": 20, "d": 768},
    },
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
    bench_shapes={"B256-C20-r64": {"B": 256, "C": 20, "d": 768, "r": 64}},
    gpu_bench_shapes={"B256-C20-r64": {"B": 256, "C": 20, "d": 768, "r": 64}},
    baselines={"vectorised": _vectorised_low_rank},
    floor=_low_rank_floor,
    **_COMMON,
)

SPECS = (SPEC, LOW_RANK_SPEC)
