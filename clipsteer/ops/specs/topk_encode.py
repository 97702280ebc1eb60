"""What ``topk_encode`` may be off by, how its cases are drawn, and what it is timed against."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound, operand_error
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.specs._encoders import (
    PARAMETERS,
    before_scale,
    draw_dictionary,
    draw_options,
    factor_error,
    least,
    options_of,
    places,
    pre_activations,
    scale_error,
    terms_of,
    underflow,
)
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.specs.sparse_decode import decode_truth, outer_truth
from clipsteer.ops.topk_encode import topk_encode, topk_encode_reference


def _draw(case: Draw) -> Inputs:
    """Keys B, d, n, k; crowded=1: every row's winners are neighbours, more of them than one
    bucket's share."""
    n, k = unpacked(case.shape, "n k")
    inputs = draw_dictionary(case)
    if case.shape.get("crowded"):
        first = n // 2 - k // 2
        inputs["x"][:, 0] = 4 if case.exact else 4 * case.scale
        inputs["W_enc"][first : first + k, 0] += 64
    return {**inputs, "k": k}


def _draw_options(case: Draw) -> Inputs:
    """The same with a scale, columns, signed=1 without a relu."""
    options = draw_options(case)
    return {**_draw(case), "relu": not case.shape.get("signed"), **options}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """Acts are held to the product's bound; a row's indices are right when no column left out is
    larger, by more than both roundings, than one that was taken."""
    x = inputs["x"]  # (B, d)
    k = inputs["k"]
    relu = inputs.get("relu", True)
    acts = outputs["acts"]  # (B, k)
    indices = outputs["indices"]  # (B, k)
    B = len(x)
    if acts.shape != (B, k) or acts.dtype != x.dtype or indices.dtype != torch.int64:
        return {"acts": math.inf}
    if B == 0:
        return {"acts": 0.0, "indices": 0.0}
    at = places(inputs, indices)
    if bool((at < 0).any()) or not bool((at.sort(-1).values.diff(dim=-1) > 0).all()):
        return {"acts": 0.0, "indices": math.inf}
    pre, magnitude, slack = pre_activations(inputs)  # (B, m)
    nan = pre.isnan().any(-1)
    signs = acts[~nan] >= 0
    if not bool(acts[nan].isnan().all()) or not bool((signs | (not relu)).all()):
        return {"acts": math.inf, "indices": 0.0}
    pre = pre[~nan]
    magnitude = magnitude[~nan]
    slack = slack[~nan]
    acts = acts[~nan]
    at = at[~nan]
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen = chosen.scatter_(-1, at, True)
    lowest = (pre + slack).masked_fill(~chosen, math.inf).amin(-1)
    most = (pre - slack).masked_fill(chosen, -math.inf).amax(-1)
    ordered = bool((acts[:, :-1] >= acts[:, 1:]).all())
    right = ordered and bool((lowest >= most).all())
    truth = pre.gather(-1, at)
    size = magnitude.gather(-1, at)
    error = fraction_of_bound(
        acts,
        truth.relu() if relu else truth,
        size,
        terms_of(inputs),
        operand_error(x.dtype),
        underflow(inputs)[indices[~nan]],
    )
    return {"acts": error, "indices": 0.0 if right else math.inf}


def _check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    x = inputs["x"]  # (B, d)
    W = inputs["W_enc"]  # (n, d)
    n = W.shape[0]
    indices = outputs["indices"]  # (B, k)
    alive = outputs["acts"] > 0
    if not inputs.get("relu", True):
        alive = ~outputs["acts"].isnan()
    g = torch.where(alive, grad_out["acts"].double(), 0)  # (B, k)
    scale, _ = options_of(inputs)
    factor = scale[indices]
    lost = torch.full_like(g, least(x.dtype))
    ones = torch.ones(len(x), 1)
    extra = factor_error(inputs)
    d_x, d_x_size = decode_truth(g * factor, indices, W)
    d_W, d_W_size, terms = outer_truth(g * factor, indices, x, n)
    d_b, d_b_size, _ = outer_truth(g * factor, indices, ones, n)
    lost_x = decode_truth(lost, indices, W)[1]
    lost_W = outer_truth(lost, indices, x, n)[1]
    lost_b = outer_truth(lost, indices, ones, n)[1][:, 0]
    errors = {
        "x": fraction_of_bound(grads["x"], d_x, d_x_size, inputs["k"], extra, lost_x),
        "W_enc": fraction_of_bound(grads["W_enc"], d_W, d_W_size, terms[:, None], extra, lost_W),
        "b_enc": fraction_of_bound(grads["b_enc"], d_b[:, 0], d_b_size[:, 0], terms, extra, lost_b),
    }
    if "scale" in grads:
        pre, magnitude = (t.gather(-1, indices) for t in before_scale(inputs))
        truth, _, _ = outer_truth(g * pre, indices, ones, n)
        size, _, _ = outer_truth(g.abs() * magnitude, indices, ones, n)
        lost = lost * (1 + g.abs() * (1 + 1 / torch.where(factor == 0, 1, factor).abs()))
        off, _, _ = outer_truth(lost, indices, ones, n)
        errors["scale"] = fraction_of_bound(
            grads["scale"], truth[:, 0], size[:, 0], terms, scale_error(inputs), off[:, 0]
        )
    return errors


def _linear_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, W_enc, b_enc)
    return torch.topk(torch.relu(pre), k, dim=-1)


def _linear_scale_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    k: int,
    relu: bool,
    scale: Tensor,
    columns: None,
) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, W_enc, b_enc) * scale
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

OPTIONS = replace(
    SPEC,
    name="topk_encode_options",
    differentiable=PARAMETERS,
    draw=_draw_options,
    shapes=sizes(
        "B d n k m signed plain",
        (5, 33, 65, 4, 40),
        (33, 31, 129, 8),
        (2, 128, 127, 100, 100, 1),
        (1, 1, 1, 1, 1),
        (0, 8, 16, 4, 9),
        (3, 127, 300, 32, None, 1),
        (31, 129, 33, 1, 20, 1, 1),
        (2, 16, 32, 32, None, 1, 1),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3, "m": 7},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9, "m": 280},
    device_shapes=sizes(
        "B d n k m signed",
        (130, 128, 6000, 32, 5000),
        (33, 200, 6000, 48),
        (33, 128, 6000, 600, None, 1),
    ),
    # the latter is made of the former
    torch_sums=("acts", "d scale"),
    baselines={"linear+scale+relu+topk": _linear_scale_topk},
)

SPECS = (SPEC, OPTIONS)
