"""How cases of ``siglip_loss`` are drawn, what it may be off by, and what it is timed against.

z is off by δ = s·δS and its roundings; softplus(z') of z' ∈ [z − δ, z + δ] stays in the image of
that interval, and so does a weight σ(z').
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops._bounds import fraction_of_bound, smallest_normal
from clipsteer.ops._spec import Draw, Errors, Inputs, OpSpec, Shape, Tensors, in_float64, sizes
from clipsteer.ops.siglip_loss import siglip_loss, siglip_loss_reference
from clipsteer.ops.specs._shared import EXP, drawn_number, drawn_pairs
from clipsteer.ops.specs._softmaxes import Similarities


def _draw(case: Draw) -> Inputs:
    """Keys B, d; percent: 1/s, 10 if not given; bias: −b, 10 if not given."""
    shape = case.shape
    image, text = drawn_pairs(case, shape["d"])
    return {
        "image": image,
        "text": text,
        "logit_scale": drawn_number(case, 0.5 if case.exact else 100 / shape.get("percent", 10)),
        "logit_bias": drawn_number(case, -float(shape.get("bias", 10))),
    }


def _softplus(z: Tensor) -> Tensor:
    # torch's own is the identity from 20 on
    return -F.logsigmoid(-z)


class Truth(Similarities):
    """A drawn case in float64: z with the pairs' sign exchanged, its error, losses and weights."""

    def __init__(self, inputs: Inputs) -> None:
        wide = in_float64(inputs)
        self.image = wide["image"]
        self.text = wide["text"]
        self.scale = wide["logit_scale"]
        bias = wide["logit_bias"]
        dtype = inputs["image"].dtype
        super().__init__(self.image, self.text, dtype)
        self.B = len(self.S)
        u = self.unit
        own = torch.eye(self.B, dtype=torch.bool)
        sign = torch.where(own, -1.0, 1.0).double()
        z = sign * (self.S * self.scale + bias)
        sizes = self.scale.abs() * self.S.abs() + bias.abs()
        delta = self.scale.abs() * self.off + 4 * u * sizes
        delta = torch.where(z.isinf(), 0.0, delta).nan_to_num(nan=0.0)
        # an exponential below the smallest normal number is taken for 0
        tiny = 2 * smallest_normal(dtype)
        self.loss = _softplus(z)
        off = torch.maximum(_softplus(z + delta) - self.loss, self.loss - _softplus(z - delta))
        self.loss_off = off.nan_to_num(nan=0.0) + (2 * EXP + 8) * u * self.loss + tiny
        self.loss_off = self.loss_off.nan_to_num(posinf=0.0, nan=0.0)
        weight = torch.sigmoid(z)
        off = torch.maximum(torch.sigmoid(z + delta) - weight, weight - torch.sigmoid(z - delta))
        self.w = sign * weight
        self.w_off = off.nan_to_num(nan=0.0) + (EXP + 6) * u * weight + tiny


def check_values(inputs: Inputs, outputs: Tensors) -> Errors:
    """The sum of all pairs' losses, over B."""
    x = Truth(inputs)
    truth = x.loss.sum() / x.B
    error = fraction_of_bound(
        outputs["loss"].reshape(1),
        truth.reshape(1),
        truth.abs().reshape(1),
        x.B + 16,
        0.0,
        x.loss_off.sum() / x.B,
    )
    return {"loss": error}


def check_grads(inputs: Inputs, outputs: Tensors, grad_out: Tensors, grads: Tensors) -> Errors:
    """Sums of weights times features, of weights times similarities and of weights."""
    x = Truth(inputs)
    g = grad_out["loss"].double() / x.B
    found = {}
    for name, w, off, features in (
        ("image", x.w, x.w_off, x.text),
        ("text", x.w.T, x.w_off.T, x.image),
    ):
        if name in grads:
            factor = g * x.scale
            found[name] = fraction_of_bound(
                grads[name],
                factor * (w @ features),
                factor.abs() * ((w.abs() + off) @ features.abs()),
                x.B + 8,
                x.operand + x.split,
                factor.abs() * (off @ features.abs() + x.lost(w.abs() + off, features)),
            )
    one = torch.ones_like(x.S)
    for name, of, of_off in (("logit_scale", x.S, x.off), ("logit_bias", one, 0 * one)):
        if name in grads:
            off = (x.w_off * (of.abs() + of_off) + x.w.abs() * of_off).sum()
            found[name] = fraction_of_bound(
                grads[name].reshape(1),
                (g * (x.w * of).sum()).reshape(1),
                (g.abs() * (x.w * of).abs().sum()).reshape(1),
                x.B + 16,
                0.0,
                g.abs() * off,
            )
    return found


def _plain(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, **_: Any
) -> Tensor:
    """The matrix of logits, and torch's log σ."""
    B = len(image)
    labels = 2 * torch.eye(B, device=image.device) - 1
    return -F.logsigmoid(labels * (logit_scale * image @ text.T + logit_bias)).sum() / B


def _open_clip(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, **_: Any
) -> Tensor:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(image, text, logit_scale, logit_bias)


def _floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    return 2.0 * B**2 * shape["d"], 8.0 * B * shape["d"]


SPEC = OpSpec(
    name="siglip_loss",
    function=siglip_loss,
    reference=siglip_loss_reference,
    outputs=("loss",),
    differentiable=("image", "text", "logit_scale", "logit_bias"),
    draw=_draw,
    check=check_values,
    check_grads=check_grads,
    shapes=sizes(
        "B d percent bias",
        (37, 24),
        (33, 31, 50, 0),
        (129, 32, 1),
        (1, 5),
        (2, 1, 25, 3),
        (31, 129, 1, 0),
        (128, 64, 4, 60),
        (200, 127),
    ),
    small_shape={"B": 5, "d": 3, "bias": 1, "percent": 100},
    repeat_shape={"B": 500, "d": 48},
    bench_shapes={"B2048-d512": {"B": 2048, "d": 512}},
    gpu_bench_shapes={
        "B8192-d512": {"B": 8192, "d": 512},
        "B32768-d512": {"B": 32768, "d": 512},
    },
    optional=("logit_bias",),
    wide=True,
    opaque=False,
    exact=False,
    # tiles that touch neither an end nor the diagonal
    device_shapes=sizes("B d", (300, 64)),
    # the check has B×B matrices in float64
    gate_sizes={"B": 2048},
    baselines={"B×B torch": _plain, "open_clip SigLipLoss": _open_clip},
    floor=_floor,
)

SPECS = (SPEC,)
