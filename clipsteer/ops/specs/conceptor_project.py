"""How cases of ``conceptor_project`` are drawn, and what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import Draw, Inputs, OpSpec, Shape, sizes, unpacked
from clipsteer.ops.conceptor_project import LowRank, conceptor_project, conceptor_project_reference
from clipsteer.ops.specs._shared import GROUPED_EDGES, without_rank
from clipsteer.ops.specs.conceptor_project_bounds import check_grads, check_values


def _low_rank(*, U: Tensor, s: Tensor, **rows: Any) -> Tensor:
    """U (K, d, r), s (K, r)."""
    return conceptor_project(C=LowRank(U, s), **rows)


def _low_rank_reference(*, U: Tensor, s: Tensor, **rows: Any) -> Tensor:
    """U (K, d, r), s (K, r)."""
    return conceptor_project_reference(C=LowRank(U, s), **rows)


def _draw(case: Draw) -> Inputs:
    """Keys B, K, d, and r in low rank; plain=1 leaves out β and μ, and K=1 the index."""
    B, K, d = unpacked(case.shape, "B K d")
    r = case.shape.get("r")
    inputs: Inputs = {"h": case.tensor(B, d)}
    if r is None:
        inputs["C"] = case.tensor(K, d, d, scale=1.0)
    else:
        inputs["U"] = case.tensor(K, d, r, scale=1.0)
        inputs["s"] = case.tensor(K, r, scale=1.0)
    inputs["index"] = None if K == 1 else torch.randint(0, K, (B,), generator=case.generator)
    if case.shape.get("plain"):
        return inputs | {"beta": 1.0, "mean": None}
    inputs["beta"] = case.tensor(K, scale=1.0)
    inputs["mean"] = case.tensor(K, d)
    return inputs


def _grouped_loop(
    h: Tensor,  # (B, d)
    factors: tuple[Tensor, ...],  # each (K, ...)
    product: Callable[..., Tensor],
    index: Tensor | None,  # (B,)
    beta: float | Tensor,  # (K,)
    mean: Tensor | None,  # (K, d)
) -> Tensor:
    out = torch.empty_like(h)
    # C[k] would make a gradient of C's full size for every k
    for k, part in enumerate(zip(*(f.unbind(0) for f in factors))):
        rows = slice(None) if index is None else (index == k).nonzero().squeeze(1)
        y = product(h[rows] if mean is None else h[rows] - mean[k], *part)
        if isinstance(beta, Tensor):
            y = y * beta[k]
        elif beta != 1:
            y = y * beta
        out[rows] = y if mean is None else y + mean[k]
    return out


def _dense_product(x: Tensor, C: Tensor) -> Tensor:
    return x @ C.T


def _low_rank_product(x: Tensor, U: Tensor, s: Tensor) -> Tensor:
    return (x @ U * s) @ U.T


def _loop(*, C: Tensor, **rows: Any) -> Tensor:
    """C (K, d, d)."""
    return _grouped_loop(factors=(C,), product=_dense_product, **rows)


def _low_rank_loop(*, U: Tensor, s: Tensor, **rows: Any) -> Tensor:
    """U (K, d, r), s (K, r)."""
    return _grouped_loop(factors=(U, s), product=_low_rank_product, **rows)


def _one_product(*, h: Tensor, C: Tensor, **_: Any) -> Tensor:
    """As many operations in one GEMM: the wrong answer unless K = 1, and the time to stay near."""
    return h @ C[0].T


def _floor(shape: Shape) -> tuple[float, float]:
    B, K, d = unpacked(shape, "B K d")
    return 2.0 * B * d**2, 4.0 * (2 * B * d + K * d**2)


def _low_rank_floor(shape: Shape) -> tuple[float, float]:
    B, K, d, r = unpacked(shape, "B K d r")
    return 4.0 * B * d * r, 4.0 * (2 * B * d + K * (d + 1) * r)


_EDGES = sizes("B K d r plain", (7, 3, 33, 5), *GROUPED_EDGES)
# several blocks of rows a group and several tiles of columns, small ones with β and μ and large
# ones without; more than one launch's rank
_ON_DEVICE = sizes(
    "B K d r plain",
    (300, 4, 384, 64),
    (600, 4, 384, 64, 1),
    (70, 2, 200, 300),
)
_COMMON: dict[str, Any] = {
    "outputs": ("h_new",),
    "draw": _draw,
    "check": check_values,
    "check_grads": check_grads,
    "rows": ("h", "index"),
    "optional": ("mean",),
    "scalable": ("h", "mean"),
}


SPEC = OpSpec(
    name="conceptor_project",
    function=conceptor_project,
    reference=conceptor_project_reference,
    differentiable=("h", "C", "beta", "mean"),
    shapes=without_rank(_EDGES),
    device_shapes=without_rank(_ON_DEVICE),
    small_shape={"B": 4, "K": 2, "d": 3},
    repeat_shape={"B": 300, "K": 5, "d": 40},
    bench_shapes={"B1024-K16": {"B": 1024, "K": 16, "d": 768, "plain": 1}},
    gpu_bench_shapes={"B4096-K16": {"B": 4096, "K": 16, "d": 768, "plain": 1}},
    # A gathered C for each row would take 2.4 GB here.
    baselines={"loop": _loop, "one GEMM": _one_product},
    floor=_floor,
    **_COMMON,
)
LOW_RANK_SPEC = OpSpec(
    name="conceptor_project_low_rank",
    function=_low_rank,
    reference=_low_rank_reference,
    differentiable=("h", "U", "s", "beta", "mean"),
    shapes=_EDGES,
    device_shapes=_ON_DEVICE,
    small_shape={"B": 4, "K": 2, "d": 3, "r": 2},
    repeat_shape={"B": 300, "K": 5, "d": 40, "r": 17},
    bench_shapes={
        "B1024-K16-r64": {"B": 1024, "K": 16, "d": 768, "r": 64, "plain": 1},
        "B1024-K16-r64-mean": {"B": 1024, "K": 16, "d": 768, "r": 64},
    },
    gpu_bench_shapes={"B4096-K16-r64": {"B": 4096, "K": 16, "d": 768, "r": 64, "plain": 1}},
    baselines={"loop": _low_rank_loop, "gather + bmm": _low_rank_reference},
    floor=_low_rank_floor,
    **_COMMON,
)

SPECS = (SPEC, LOW_RANK_SPEC)
