"""What ``batch_topk_encode`` may be off by, how its cases are drawn, what it is timed against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Tensors, sizes, unpacked
from clipsteer.ops.batch_topk_encode import batch_topk_encode, batch_topk_encode_reference
from clipsteer.ops.specs._shared import dictionary_bench
from clipsteer.ops.specs.threshold_encode import (
    EDGES,
    _floor,
    check_code_grads,
    check_codes,
    draw_dictionary,
    pre_activations,
)


def _draw(case: Draw) -> Inputs:
    B, k = unpacked(case.shape, "B k")
    return {**draw_dictionary(case), "count": k * B}


def _check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """The set is right when none that was left out is larger, by more than both roundings, than one
    that was taken, and there are as many as positive ones, up to ``count``."""
    pre, _, slack = pre_activations(inputs)
    count = inputs["count"]
    nan = pre.isnan().any(-1)
    low = (pre - slack)[~nan].flatten()
    high = (pre + slack)[~nan].flatten()
    # whatever the roundings, the value of this rank lies between these two
    rank = min(count, len(low))
    most = low.sort(descending=True).values[rank - 1] if rank else torch.tensor(math.inf)
    least = high.sort(descending=True).values[count] if count < len(high) else torch.tensor(0.0)
    zero = torch.zeros((), dtype=torch.float64)
    # one may be kept whose upper end reaches the least of those that can be among the first
    errors = check_codes(
        inputs, outputs, torch.maximum(most, zero).nextafter(-zero - 1), torch.maximum(least, zero)
    )
    kept = int(outputs["offsets"][-1]) - int(nan.sum())
    if not min(count, int((low > 0).sum())) <= kept <= min(count, int((high > 0).sum())):
        errors["offsets"] = math.inf
    if len(outputs["values"]) != max(count, len(pre)):
        errors["values"] = math.inf
    return errors


def _linear_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, count: int) -> Tensor:
    acts = torch.relu(F.linear(x, W_enc, b_enc))
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

SPECS = (SPEC,)
