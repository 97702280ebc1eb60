"""What ``topk_encode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import ACCUMULATE, fraction_of_bound, operand_error, smallest_normal
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.specs.sparse_decode import decode_truth, outer_truth
from clipsteer.ops.topk_encode import topk_encode, topk_encode_reference


def _draw(case: Draw) -> Inputs:
    """Keys B, d, n, k; crowded=1: every row's winners are neighbours, more of them than one
    bucket's share."""
    B, d, n, k = unpacked(case.shape, "B d n k")
    x = case.tensor(B, d)
    W_enc = case.tensor(n, d, scale=1.0)
    b_enc = case.tensor(n)
    if case.shape.get("crowded"):
        first = n // 2 - k // 2
        x[:, 0] = 4 if case.exact else 4 * case.scale
        W_enc[first : first + k, 0] += 64
    return {"x": x, "W_enc": W_enc, "b_enc": b_enc, "k": k}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """Acts are held to the product's bound; a row's indices are right when no column left out is
    larger, by more than both roundings, than one that was taken."""
    x = inputs["x"]  # (B, d)
    k = inputs["k"]
    acts = outputs["acts"]  # (B, k)
    indices = outputs["indices"]  # (B, k)
    B, d = x.shape
    n = inputs["W_enc"].shape[0]
    if acts.shape != (B, k) or acts.dtype != x.dtype or indices.dtype != torch.int64:
        return {"acts": math.inf}
    if B == 0:
        return {"acts": 0.0, "indices": 0.0}
    in_range = bool(((indices >= 0) & (indices < n)).all())
    if not in_range or not bool((indices.sort(-1).values.diff(dim=-1) > 0).all()):
        return {"acts": 0.0, "indices": math.inf}
    x64 = x.double()
    W64 = inputs["W_enc"].double()
    b64 = inputs["b_enc"].double()
    pre = x64 @ W64.T + b64  # (B, n)
    magnitude = x64.abs() @ W64.abs().T + b64.abs()
    nan = pre.isnan().any(-1)
    if not bool(acts[nan].isnan().all()) or not bool((acts[~nan] >= 0).all()):
        return {"acts": math.inf, "indices": 0.0}
    pre = pre[~nan]
    magnitude = magnitude[~nan]
    acts = acts[~nan]
    indices = indices[~nan]
    extra = operand_error(x.dtype)
    gamma = (d + 1) * ACCUMULATE[x.dtype] + extra
    lost = smallest_normal(x.dtype) * (d + 2)
    slack = torch.where(pre.isinf(), 0.0, gamma * magnitude + lost)
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen = chosen.scatter_(-1, indices, True)
    least = (pre + slack).masked_fill(~chosen, math.inf).amin(-1)
    most = (pre - slack).masked_fill(chosen, -math.inf).amax(-1)
    ordered = bool((acts[:, :-1] >= acts[:, 1:]).all())
    right = ordered and bool((least >= most).all())
    truth = pre.gather(-1, indices).relu()
    size = magnitude.gather(-1, indices)
    return {
        "acts": fraction_of_bound(acts, truth, size, d, extra),
        "indices": 0.0 if right else math.inf,
    }


def _check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    x = inputs["x"]  # (B, d)
    W = inputs["W_enc"]  # (n, d)
    n = W.shape[0]
    indices = outputs["indices"]  # (B, k)
    g = torch.where(outputs["acts"] > 0, grad_out["acts"], 0)  # (B, k)
    d_x, d_x_size = decode_truth(g, indices, W)
    d_W, d_W_size, terms = outer_truth(g, indices, x, n)
    ones = torch.ones(x.shape[0], 1)
    d_b, d_b_size, _ = outer_truth(g, indices, ones, n)
    return {
        "x": fraction_of_bound(grads["x"], d_x, d_x_size, inputs["k"]),
        "W_enc": fraction_of_bound(grads["W_enc"], d_W, d_W_size, terms[:, None]),
        "b_enc": fraction_of_bound(grads["b_enc"], d_b[:, 0], d_b_size[:, 0], terms),
    }


def _linear_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, W_enc, b_enc)
    return torch.topk(torch.relu(pre), k, dim=-1)


def _floor(shape: Shape) -> tuple[float, float]:
    B, d, n, k = unpacked(shape, "B d n k")
    numbers = n * (d + 1) + B * (d + 3 * k)
    return 2.0 * B * n * d, 4.0 * numbers


SPEC = OpSpec(
    name="topk_encode",
    function=topk_encode,
    reference=topk_encode_reference,
    outputs=("acts", "indices"),
    differentiable=("x", "W_enc", "b_enc"),
    draw=_draw,
    check=_check_values,
    check_grads=_check_grads,
    shapes=sizes(
        "B d n k",
        (5, 33, 65, 4),
        (33, 31, 129, 8),
        (2, 128, 127, 127),
        (1, 1, 1, 1),
        (0, 8, 16, 4),
        (3, 127, 300, 32),
        (31, 129, 33, 1),
        (2, 16, 32, 32),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    rows=("x",),
    optional=("b_enc",),
    scalable=("x", "b_enc"),
    grad_buffer="W_enc",
    torch_sums=("acts",),
    # many buckets, the last one partial; whole tiles along d and not; buckets that hide winners;
    # whole rows sorted; several tiles a block
    device_shapes=sizes(
        "B d n k crowded",
        (130, 128, 6000, 32),
        (33, 200, 6000, 48, 1),
        (33, 128, 6000, 600),
        (1499, 72, 6001, 32),
    ),
    bench_shapes=dictionary_bench(256),
    gpu_bench_shapes=dictionary_bench(4096),
    baselines={"linear+relu+topk": _linear_topk},
    floor=_floor,
)

SPECS = (SPEC,)
