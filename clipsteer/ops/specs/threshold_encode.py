"""What ``threshold_encode`` may be off by, how its cases are drawn, what it is timed against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound, operand_error
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, sizes, unpacked
from clipsteer.ops.ragged_decode import SparseCodes, code_rows
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
    rounded,
    scale_error,
    terms_of,
    underflow,
)
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.threshold_encode import threshold_encode, threshold_encode_reference


def _draw(case: Draw) -> Inputs:
    """Keys B, d, n, k; single=1: one threshold; short=1: less room than codes; even=1: thresholds
    are alike and there is room for all, as in use. The threshold lets about k of n through."""
    inputs = draw_dictionary(case)
    B, d, n, k = unpacked(case.shape, "B d n k")
    level = math.sqrt(2 * d) if case.exact else math.sqrt(d + 1) * case.scale
    level *= math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * min(k / n, 0.5))))
    threshold = torch.full((n,), level).to(case.dtype)
    if case.exact:
        threshold = threshold.round()
    if case.shape.get("even"):
        return {**inputs, "threshold": threshold, "capacity": None}
    if case.shape.get("single"):
        threshold = threshold[0]
    else:
        # some let all pass, some none
        threshold[::7] *= -1
        threshold[3::7] *= 4
    room = B if case.shape.get("short") else B * n
    return {**inputs, "threshold": threshold, "capacity": room}


def _draw_options(case: Draw) -> Inputs:
    """The same with a scale, columns, signed=1 without a relu."""
    options = draw_options(case)
    inputs = _draw(case)
    if case.shape.get("even"):
        inputs["threshold"] = inputs["threshold"] * options["scale"].abs()
    return {**inputs, "relu": not case.shape.get("signed"), **options}


def read_codes(inputs: Inputs, outputs: Tensors) -> tuple[Tensor, Tensor, Tensor] | None:
    """Which of the m features looked at are kept (B, m), their values (B, m), and which rows are
    there whole (B,); None where the codes are not in order."""
    values = outputs["values"]
    indices = outputs["indices"]
    offsets = outputs["offsets"]
    n = len(options_of(inputs)[1])
    B = len(offsets) - 1
    m = len(values)
    if offsets.dtype != torch.int64 or indices.dtype != torch.int64 or int(offsets[0]) != 0:
        return None
    if bool((offsets.diff() < 0).any()):
        return None
    row = code_rows(SparseCodes(values, indices, offsets))
    there = row < B
    if bool(values[~there].any()) or bool(indices[~there].any()):
        return None
    indices = torch.where(there, places(inputs, indices), 0)
    if bool((indices < 0).any()):
        return None
    same_row = (row[1:] == row[:-1]) & there[1:]
    if bool((indices[1:][same_row] <= indices[:-1][same_row]).any()):
        return None
    keep = torch.zeros(B, n, dtype=torch.bool)
    dense = torch.zeros(B, n, dtype=values.dtype)
    keep[row[there], indices[there]] = True
    dense[row[there], indices[there]] = values[there]
    return keep, dense, offsets[1:] <= m


def check_codes(
    inputs: Inputs,
    outputs: Tensors,
    right: Callable[[Tensor, Tensor, Tensor, Tensor], bool],
    valued: str | None = None,
) -> Errors:
    """Structure, values and the set: ``right`` of what the kept can be at most and the left out at
    least, and where either is, (B, n) each; rows with a NaN, or not there whole, are neither.

    Codes where the output ``valued`` is 0 have to be 0.
    """
    pre, magnitude, slack = pre_activations(inputs)
    # the reference rounds them to its dtype before it compares
    slack = rounded(inputs, pre, slack)
    x = inputs["x"]
    _, columns = options_of(inputs)
    broken = dict.fromkeys(("values", "indices", "offsets"), math.inf)
    if outputs["values"].dtype != x.dtype or len(outputs["offsets"]) != len(x) + 1:
        return broken
    found = read_codes(inputs, outputs)
    if found is None:
        return broken
    keep, dense, whole = found
    nan = pre.isnan().any(-1)
    for r in (nan & whole).nonzero().flatten().tolist():
        if keep[r].nonzero().flatten().tolist() != [0] or not bool(dense[r, 0].isnan()):
            return broken
    kept = keep & ~nan[:, None]
    left = ~keep & whole[:, None] & ~nan[:, None]
    has_value = kept
    if valued is not None:
        flags = read_codes(inputs, {**outputs, "values": outputs[valued]})
        if flags is None or bool(dense[kept & (flags[1] == 0)].any()):
            return broken
        has_value = kept & (flags[1] != 0)
    error = fraction_of_bound(
        dense[has_value],
        pre[has_value],
        magnitude[has_value],
        terms_of(inputs),
        operand_error(x.dtype),
        underflow(inputs)[columns].expand_as(pre)[has_value],
    )
    wrong = 0.0 if right(pre + slack, pre - slack, kept, left) else math.inf
    return {"values": error, "indices": wrong, "offsets": wrong}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    _, columns = options_of(inputs)
    limit = inputs["threshold"].double()
    limit = limit if limit.dim() == 0 else limit[columns]
    if inputs.get("relu", True):
        limit = limit.clamp_min(0)

    def right(high: Tensor, low: Tensor, kept: Tensor, left: Tensor) -> bool:
        return bool((high > limit)[kept].all()) and bool((low <= limit)[left].all())

    return check_codes(inputs, outputs, right)


def check_code_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Of the set that was chosen, as sums over its pairs."""
    x = inputs["x"].double()
    W = inputs["W_enc"].double()
    n, d = W.shape
    B = len(x)
    row = code_rows(SparseCodes(**outputs))
    there = (row < B) & ~outputs["values"].isnan()
    row = row[there]
    feature = outputs["indices"][there]
    g = grad_out["values"].double()[there]
    scale, _ = options_of(inputs)
    factor = scale[feature]

    def matrix(coefficients: Tensor) -> Tensor:
        return torch.zeros(B, n, dtype=torch.float64).index_put((row, feature), coefficients)

    code = matrix(g * factor)
    used = matrix(torch.ones_like(g))
    terms = used.sum(0)
    extra = factor_error(inputs)
    lost = least(inputs["x"].dtype) * used
    errors = {
        "x": fraction_of_bound(
            grads["x"],
            code @ W,
            code.abs() @ W.abs(),
            used.sum(1)[:, None],
            extra,
            lost @ W.abs(),
        ),
        "W_enc": fraction_of_bound(
            grads["W_enc"],
            code.T @ x,
            code.abs().T @ x.abs(),
            terms[:, None],
            extra,
            lost.T @ x.abs(),
        ),
        "b_enc": fraction_of_bound(
            grads["b_enc"], code.sum(0), code.abs().sum(0), terms, extra, lost.sum(0)
        ),
    }
    if "scale" in grads:
        pre, magnitude = before_scale(inputs)
        g = matrix(g)
        lost = lost * (1 + g.abs() * (1 + 1 / torch.where(scale == 0, 1, scale).abs()))
        errors["scale"] = fraction_of_bound(
            grads["scale"],
            (g * pre).sum(0),
            (g.abs() * magnitude).sum(0),
            terms,
            scale_error(inputs),
            lost.sum(0),
        )
    return errors


def _linear_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, threshold: Tensor, capacity: int | None
) -> Tensor:
    pre = F.linear(x, W_enc, b_enc)
    return torch.relu(pre) * (pre > threshold)


def _linear_scale_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    threshold: Tensor,
    capacity: int | None,
    relu: bool,
    scale: Tensor,
    columns: None,
) -> Tensor:
    pre = F.linear(x, W_enc, b_enc) * scale
    return torch.relu(pre) * (pre > threshold)


def _floor(shape: Shape) -> tuple[float, float]:
    B, d, n, k = unpacked(shape, "B d n k")
    numbers = n * (d + 1) + B * (d + 3 * k)
    return 2.0 * B * n * d, 4.0 * numbers


EDGES = (
    (5, 33, 65, 4),
    (33, 31, 129, 8, 1),
    (2, 128, 127, 60),
    (1, 1, 1, 1),
    (0, 8, 16, 4),
    (3, 127, 300, 32, 1),
    (31, 129, 33, 1),
)

SPEC = OpSpec(
    name="threshold_encode",
    function=threshold_encode,
    reference=threshold_encode_reference,
    outputs=("values", "indices", "offsets"),
    differentiable=("x", "W_enc", "b_enc"),
    draw=_draw,
    check=_check_values,
    check_grads=check_code_grads,
    shapes=sizes("B d n k single short", *EDGES, (4, 16, 32, 16, None, 1)),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    optional=("b_enc",),
    device_shapes=sizes("B d n k across", (70, 128, 1600, 32), (70, 128, 1600, 32, 1)),
    torch_sums=("values",),
    bench_shapes=dictionary_bench(256, even=1),
    gpu_bench_shapes=dictionary_bench(4096, even=1),
    baselines={"linear+threshold": _linear_threshold},
    floor=_floor,
)

OPTIONS = replace(
    SPEC,
    name="threshold_encode_options",
    differentiable=PARAMETERS,
    draw=_draw_options,
    shapes=sizes(
        "B d n k m single short signed plain",
        (5, 33, 65, 4, 40),
        (33, 31, 129, 8, None, 1),
        (2, 128, 127, 60, 90, None, None, 1),
        (1, 1, 1, 1, 1),
        (0, 8, 16, 4, 9),
        (3, 127, 300, 32, None, 1, None, 1),
        (31, 129, 33, 1, 20, None, None, None, 1),
        (4, 16, 32, 16, 30, None, 1),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3, "m": 7},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9, "m": 280},
    device_shapes=sizes(
        "B d n k m across",
        (70, 128, 1600, 32, 1000),
        (70, 128, 1600, 32, 1000, 1),
        (70, 72, 1600, 32, None, 1),
    ),
    # the latter is made of the former
    torch_sums=("values", "d scale"),
    baselines={"linear+scale+threshold": _linear_scale_threshold},
)

SPECS = (SPEC, OPTIONS)
