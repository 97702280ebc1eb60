"""How cases of ``conceptor_project`` are drawn, and what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import Inputs, OpSpec, Shape, draw, sizes
from clipsteer.ops.conceptor_project import LowRank, conceptor_project, conceptor_project_reference
from clipsteer.ops.specs.conceptor_project_bounds import check_grads, check_values


def _low_rank(
    h: Tensor,  # (B, d)
    U: Tensor,  # (K, d, r)
    s: Tensor,  # (K, r)
    index: Tensor | None,  # (B,)
    *,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    return conceptor_project(h, LowRank(U, s), index, backend=backend, **options)


def _low_rank_reference(
    h: Tensor,  # (B, d)
    U: Tensor,  # (K, d, r)
    s: Tensor,  # (K, r)
    index: Tensor | None,  # (B,)
    **options: Any,
) -> Tensor:
    return conceptor_project_reference(h, LowRank(U, s), index, **options)


def _make(
    shape: Shape,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> Inputs:
    """Keys B, K, d, and r in low rank; plain=1 leaves out β and μ, and K=1 the index."""
    B = shape["B"]
    K = shape["K"]
    d = shape["d"]
    r = shape.get("r")
    inputs: Inputs = {"h": draw((B, d), dtype, generator, scale, exact)}
    if r is None:
        inputs["C"] = draw((K, d, d), dtype, generator, 1.0, exact)
    else:
        inputs["U"] = draw((K, d, r), dtype, generator, 1.0, exact)
        inputs["s"] = draw((K, r), dtype, generator, 1.0, exact)
    inputs["index"] = None if K == 1 else torch.randint(0, K, (B,), generator=generator)
    if shape.get("plain"):
        return inputs | {"beta": 1.0, "mean": None}
    inputs["beta"] = draw((K,), dtype, generator, 1.0, exact)
    inputs["mean"] = draw((K, d), dtype, generator, scale, exact)
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


def _loop(
    h: Tensor,  # (B, d)
    C: Tensor,  # (K, d, d)
    index: Tensor | None,  # (B,)
    **options: Any,
) -> Tensor:
    return _grouped_loop(h, (C,), _dense_product, index, **options)


def _low_rank_loop(
    h: Tensor,  # (B, d)
    U: Tensor,  # (K, d, r)
    s: Tensor,  # (K, r)
    index: Tensor | None,  # (B,)
    **options: Any,
) -> Tensor:
    return _grouped_loop(h, (U, s), _low_rank_product, index, **options)


def _one_product(
    h: Tensor,  # (B, d)
    C: Tensor,  # (K, d, d)
    index: Tensor | None,  # (B,)
    *,
    beta: float | Tensor,
    mean: Tensor | None,
) -> Tensor:
    """As many operations in one GEMM: the wrong answer unless K = 1, and the time to stay near."""
    return h @ C[0].T


def _floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    d = shape["d"]
    return 2.0 * B * d**2, 4.0 * (2 * B * d + shape["K"] * d**2)


def _low_rank_floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    d = shape["d"]
    r = shape["r"]
    return 4.0 * B * d * r, 4.0 * (2 * B * d + shape["K"] * (d + 1) * r)


_EDGES = sizes(
    "B K d r plain",
    (7, 3, 33, 5),
    (33, 5, 31, 8),
    (4, 9, 127, 129),
    (1, 1, 1, 1, 1),
    (0, 2, 8, 4),
    (129, 2, 32, 33, 1),
    (31, 1, 129, 32),
    (32, 3, 128, 64),
    (31, 2, 203, 197),
)
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
    "make": _make,
    "check": check_values,
    "check_grads": check_grads,
    "rows": ("h", "index"),
    "optional": ("mean",),
    "scalable": ("h", "mean"),
}


def _dense(shape: Shape) -> Shape:
    return {name: size for name, size in shape.items() if name != "r"}


SPEC = OpSpec(
    name="conceptor_project",
    function=conceptor_project,
    reference=conceptor_project_reference,
    differentiable=("h", "C", "beta", "mean"),
    shapes=tuple(map(_dense, _EDGES)),
    device_shapes=tuple(map(_dense, _ON_DEVICE)),
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
