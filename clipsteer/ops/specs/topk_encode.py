"""What ``topk_encode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._spec import ACCUMULATE, OpSpec, draw, fraction_of_bound, operand_error
from clipsteer.ops.specs.sparse_decode import decode_truth, outer_truth
from clipsteer.ops.topk_encode import topk_encode, topk_encode_reference


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    B, d, n, k = (shape[s] for s in ("B", "d", "n", "k"))
    x = draw((B, d), dtype, generator, scale, exact)
    W_enc = draw((n, d), dtype, generator, 1.0, exact)
    b_enc = draw((n,), dtype, generator, scale, exact)
    if shape.get(
        "crowded"
    ):  # every row's winners are neighbours: more than one bucket's share of them
        first = n // 2 - k // 2
        x[:, 0] = 4 if exact else 4 * scale
        W_enc[first : first + k, 0] += 64
    return {"x": x, "W_enc": W_enc, "b_enc": b_enc, "k": k}


def _check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    x, W, b, k = (inputs[name] for name in ("x", "W_enc", "b_enc", "k"))
    acts = outputs["acts"]
    indices = outputs["indices"]
    if acts.shape != (x.shape[0], k) or acts.dtype != x.dtype or indices.dtype != torch.int64:
        return {"acts": float("inf")}
    if x.shape[0] == 0:
        return {"acts": 0.0, "indices": 0.0}
    in_range = bool(((indices >= 0) & (indices < W.shape[0])).all())
    unique = in_range and bool((indices.sort(-1).values.diff(dim=-1) > 0).all())
    if not unique:
        return {"acts": 0.0, "indices": float("inf")}
    pre = x.double() @ W.double().T + b.double()
    magnitude = x.double().abs() @ W.double().abs().T + b.double().abs()
    extra = operand_error(x.dtype)
    nan = pre.isnan().any(-1)
    if not bool(acts[nan].isnan().all()) or not bool((acts[~nan] >= 0).all()):
        return {"acts": float("inf"), "indices": 0.0}
    pre = pre[~nan]
    magnitude = magnitude[~nan]
    acts = acts[~nan]
    indices = indices[~nan]
    gamma = (x.shape[1] + 1) * ACCUMULATE[x.dtype] + extra
    floor = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).smallest_normal * (
        x.shape[1] + 2
    )
    slack = torch.where(pre.isinf(), 0.0, gamma * magnitude + floor)
    chosen = torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, indices, True)
    least = (pre + slack).masked_fill(~chosen, float("inf")).amin(-1)
    most = (pre - slack).masked_fill(chosen, -float("inf")).amax(-1)
    ordered = bool((acts[:, :-1] >= acts[:, 1:]).all())
    truth = pre.gather(-1, indices).relu()
    size = magnitude.gather(-1, indices)
    return {
        "acts": fraction_of_bound(acts, truth, size, x.shape[1], extra),
        "indices": 0.0 if ordered and bool((least >= most).all()) else float("inf"),
    }


def _check_grads(
    inputs: dict[str, Any],
    outputs: dict[str, Tensor],
    grad_out: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    x = inputs["x"]
    W = inputs["W_enc"]
    k = inputs["k"]
    indices = outputs["indices"]
    g = torch.where(outputs["acts"] > 0, grad_out["acts"], 0)
    d_x, d_x_size = decode_truth(g, indices, W)
    d_W, d_W_size, terms = outer_truth(g, indices, x, W.shape[0])
    ones = torch.ones(x.shape[0], 1)
    d_b, d_b_size, _ = outer_truth(g, indices, ones, W.shape[0])
    return {
        "x": fraction_of_bound(grads["x"], d_x, d_x_size, k),
        "W_enc": fraction_of_bound(grads["W_enc"], d_W, d_W_size, terms[:, None]),
        "b_enc": fraction_of_bound(grads["b_enc"], d_b[:, 0], d_b_size[:, 0], terms),
    }


def _linear_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    return torch.topk(torch.relu(F.linear(x, W_enc, b_enc)), k, dim=-1)


SPEC = OpSpec(
    name="topk_encode",
    function=topk_encode,
    reference=topk_encode_reference,
    outputs=("acts", "indices"),
    differentiable=("x", "W_enc", "b_enc"),
    make=_make,
    check=_check_values,
    check_grads=_check_grads,
    shapes=tuple(
        {"B": B, "d": d, "n": n, "k": k}
        for B, d, n, k in (
            (5, 33, 65, 4),
            (33, 31, 129, 8),
            (2, 128, 127, 127),
            (1, 1, 1, 1),
            (0, 8, 16, 4),
            (3, 127, 300, 32),
            (31, 129, 33, 1),
            (2, 16, 32, 32),
        )
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    rows=("x",),
    optional=("b_enc",),
    scalable=("x", "b_enc"),
    grad_buffer="W_enc",
    torch_sums=("acts",),
    # many buckets, the last one partial; whole tiles along d and not; buckets that hide winners;
    # whole rows sorted
    device_shapes=(
        {"B": 130, "d": 128, "n": 6000, "k": 32},
        {"B": 33, "d": 200, "n": 6000, "k": 48, "crowded": 1},
        {"B": 33, "d": 128, "n": 6000, "k": 600},
        {"B": 1499, "d": 72, "n": 6001, "k": 32},  # several tiles a block
    ),
    bench_shapes={
        "B256-k32": {"B": 256, "d": 768, "n": 49152, "k": 32},
        "B256-k64": {"B": 256, "d": 768, "n": 49152, "k": 64},
    },
    gpu_bench_shapes={
        "B4096-k32": {"B": 4096, "d": 768, "n": 49152, "k": 32},
        "B4096-k64": {"B": 4096, "d": 768, "n": 49152, "k": 64},
    },
    baselines={"linear+relu+topk": _linear_topk},
    floor=lambda s: (
        2.0 * s["B"] * s["n"] * s["d"],
        4.0 * (s["n"] * (s["d"] + 1) + s["B"] * (s["d"] + 3 * s["k"])),
    ),
)

SPECS = (SPEC,)
