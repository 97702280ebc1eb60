"""What ``batch_topk_encode`` may be off by, how its cases are drawn, what it is timed against."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Tensors, sizes, unpacked
from clipsteer.ops.batch_topk_encode import batch_topk_encode, batch_topk_encode_reference
from clipsteer.ops.specs._encoders import PARAMETERS, draw_dictionary, draw_options
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.specs.threshold_encode import (
    EDGES,
    _floor,
    check_code_grads,
    check_codes,
)


def _draw(case: Draw) -> Inputs:
    B, k = unpacked(case.shape, "B k")
    return {**draw_dictionary(case), "count": k * B}


def _draw_options(case: Draw) -> Inputs:
    options = draw_options(case)
    return {**_draw(case), **options}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """The set is right when none that was left out is larger, by more than both roundings, than one
    that was taken, and when it is full or all positive ones are there."""

    def right(high: Tensor, low: Tensor, kept: Tensor, left: Tensor) -> bool:
        room = max(inputs["count"] - int(outputs["values"].isnan().sum()), 0)
        taken = int(kept.sum())
        if taken > room or bool((high[kept] <= 0).any()):
            return False
        rest = low[left].clamp_min(0)
        if taken < room and bool(rest.any()):
            return False
        return taken == 0 or len(rest) == 0 or bool(rest.max() <= high[kept].min())

    errors = check_codes(inputs, outputs, right)
    if len(outputs["values"]) != max(inputs["count"], len(inputs["x"])):
        errors["values"] = math.inf
    return errors


def _linear_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, count: int) -> Tensor:
    acts = torch.relu(F.linear(x, W_enc, b_enc))
    least = torch.topk(acts.flatten(), count, sorted=False).values.amin()
    return acts * (acts >= least)


def _linear_scale_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, count: int, scale: Tensor, columns: None
) -> Tensor:
    acts = torch.relu(F.linear(x, W_enc, b_enc) * scale)
    least = torch.topk(acts.flatten(), count, sorted=False).values.amin()
    return acts * (acts >= least)


SPEC = OpSpec(
    name="batch_topk_encode",
    function=batch_topk_encode,
    reference=batch_topk_encode_reference,
    outputs=("values", "indices", "offsets"),
    differentiable=("x", "W_enc", "b_enc"),
    draw=_draw,
    check=_check_values,
    check_grads=check_code_grads,
    shapes=sizes("B d n k", *[edge[:4] for edge in EDGES], (2, 16, 32, 32)),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9},
    optional=("b_enc",),
    scalable=("x", "b_enc"),
    torch_sums=("values",),
    bench_shapes=dictionary_bench(256),
    gpu_bench_shapes=dictionary_bench(4096),
    baselines={"linear+topk": _linear_topk},
    floor=_floor,
)

OPTIONS = replace(
    SPEC,
    name="batch_topk_encode_options",
    differentiable=PARAMETERS,
    draw=_draw_options,
    shapes=sizes(
        "B d n k m plain",
        (5, 33, 65, 4, 40),
        (33, 31, 129, 8),
        (2, 128, 127, 60, 90),
        (1, 1, 1, 1, 1),
        (0, 8, 16, 4, 9),
        (3, 127, 300, 32, None, 1),
        (31, 129, 33, 1, 20, 1),
        (2, 16, 32, 32, 30),
    ),
    small_shape={"B": 3, "d": 4, "n": 9, "k": 3, "m": 7},
    repeat_shape={"B": 70, "d": 40, "n": 300, "k": 9, "m": 280},
    # the latter is made of the former
    torch_sums=("values", "d scale"),
    baselines={"linear+scale+topk": _linear_scale_topk},
)

SPECS = (SPEC, OPTIONS)
