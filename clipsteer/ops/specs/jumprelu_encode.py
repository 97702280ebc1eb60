"""What ``jumprelu_encode`` may be off by, how its cases are drawn, what it is timed against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Tensors, sizes, unpacked
from clipsteer.ops.jumprelu_encode import jumprelu, jumprelu_encode, jumprelu_encode_reference
from clipsteer.ops.ragged_decode import SparseCodes, code_rows
from clipsteer.ops.specs._encoders import draw_dictionary, pre_activations, rounded
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.specs.threshold_encode import (
    EDGES,
    check_code_grads,
    check_codes,
    read_codes,
)
from clipsteer.ops.specs.threshold_encode import SPEC as THRESHOLD_ENCODE

# roundings of one term of the threshold's gradient: its square's derivative, the two divisions,
# the sum of both outputs' parts, and the cotangents'
_PER_TERM = 8


def _draw(case: Draw) -> Inputs:
    """Keys B, d, n, k; single=1: one threshold; short=1: less room than codes; even=1: thresholds
    are alike, the rectangle is narrow and there is room for all, as in use. The threshold lets
    about k of n through, and the rectangle is wide enough to hold many."""
    inputs = draw_dictionary(case)
    B, d, n, k = unpacked(case.shape, "B d n k")
    spread = math.sqrt(2 * d) if case.exact else math.sqrt(d + 1) * case.scale
    level = spread * math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * min(k / n, 0.4))))
    threshold = torch.full((n,), level).to(case.dtype)
    bandwidth = 4.0 if case.exact else spread
    if case.exact:
        threshold = threshold.round()
    if case.shape.get("even"):
        narrow = {"bandwidth": bandwidth / 16, "capacity": None}
        return {**inputs, "threshold": threshold, **narrow}
    if case.shape.get("single"):
        threshold = threshold[0].clone()
    else:
        # some below half of the rectangle, some beyond all
        threshold[::7] *= 0.25
        threshold[3::7] *= 4
        if case.exact:
            threshold = threshold.round()
    room = B if case.shape.get("short") else B * n
    return {**inputs, "threshold": threshold, "bandwidth": bandwidth, "capacity": room}


def _limits(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """θ, and θ ± ε/2 as the op rounds them, in float64."""
    threshold = inputs["threshold"]
    half = inputs["bandwidth"] / 2
    low = threshold - half
    high = threshold + half
    return threshold.double(), low.double(), high.double()


def _there(outputs: Tensors) -> Tensor:
    codes = SparseCodes(outputs["values"], outputs["indices"], outputs["offsets"])
    return code_rows(codes) < len(codes.offsets) - 1


def _check(inputs: Inputs, outputs: Tensors) -> Errors:
    """Structure and set as of threshold_encode at θ - ε/2; what is active has its value and may be
    above θ, what is not is 0 and may be at most θ."""
    theta, low, _ = _limits(inputs)

    def right(most: Tensor, least: Tensor, kept: Tensor, left: Tensor) -> bool:
        out = (least <= low) | low.isnan()
        return bool((most > low)[kept].all()) and bool(out[left].all())

    errors = {**check_codes(inputs, outputs, right, valued="active"), "active": math.inf}
    active = outputs["active"]
    if active.dtype != outputs["values"].dtype or bool(((active != 0) & (active != 1)).any()):
        return errors
    found = read_codes(inputs, outputs)
    if found is None:
        return errors
    kept, dense, _ = found
    pre, _, slack = pre_activations(inputs)
    slack = rounded(inputs, pre, slack)
    on = dense != 0
    number = kept & ~pre.isnan().any(-1, keepdim=True)
    jumped = (pre + slack > theta)[number & on].all() & (pre - slack <= theta)[number & ~on].all()
    return {**errors, "active": 0.0 if bool(jumped) else math.inf}


def _check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Of the set that was chosen; whether a code is in the rectangle shows in its value."""
    theta, _, high = _limits(inputs)
    values = outputs["values"]
    on = outputs["active"] == 1
    there = _there(outputs)
    codes = {name: outputs[name] for name in ("values", "indices", "offsets")}
    # those at 0 hand nothing on
    through = {"values": torch.where(on, grad_out["values"], 0)}
    errors = check_code_grads(inputs, codes, through, grads)
    which = outputs["indices"] if theta.dim() else torch.zeros_like(outputs["indices"])
    theta = theta.reshape(-1)
    near = there & (~on | (values.double() < high.reshape(-1)[which])) & ~values.isnan()
    epsilon = inputs["bandwidth"]
    # an output that no code reaches has no cotangent
    zeros = torch.zeros_like(values)
    by_value = grad_out.get("values", zeros).double() * theta[which] / epsilon
    by_active = grad_out.get("active", zeros).double() / epsilon
    pick = which[near]
    empty = torch.zeros_like(theta)
    truth = empty.index_add(0, pick, -(by_value + by_active)[near])
    magnitude = empty.index_add(0, pick, (by_value.abs() + by_active.abs())[near])
    terms = empty.index_add(0, pick, torch.ones_like(pick, dtype=torch.float64))
    found = grads["threshold"].reshape(-1)
    error = fraction_of_bound(found, truth, magnitude, terms + _PER_TERM)
    return {**errors, "threshold": error}


def _linear_jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    threshold: Tensor,
    bandwidth: float,
    capacity: int | None,
) -> Tensor:
    return jumprelu(F.linear(x, W_enc, b_enc), threshold, bandwidth)[0]


SPEC = OpSpec(
    name="jumprelu_encode",
    function=jumprelu_encode,
    reference=jumprelu_encode_reference,
    outputs=("values", "indices", "offsets", "active"),
    differentiable=("x", "W_enc", "b_enc", "threshold"),
    estimated=("threshold",),
    draw=_draw,
    check=_check,
    check_grads=_check_grads,
    shapes=sizes("B d n k single short", *EDGES, (4, 16, 32, 16, None, 1)),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    optional=("b_enc",),
    torch_sums=("values", "active"),
    bench_shapes=dictionary_bench(256, even=1),
    gpu_bench_shapes=dictionary_bench(4096, even=1),
    baselines={"linear+jumprelu": _linear_jumprelu},
    floor=THRESHOLD_ENCODE.floor,
)

SPECS = (SPEC,)
