"""How cases of ``drrho_loss`` are drawn, and what it is timed against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import Draw, Inputs, OpSpec, Shape, sizes
from clipsteer.ops.drrho_loss import drrho_loss, drrho_loss_reference
from clipsteer.ops.specs._shared import drawn_pairs
from clipsteer.ops.specs.drrho_loss_bounds import check_grads, check_values


def _draw(case: Draw) -> Inputs:
    """Keys B, d, r (none: no reference); percent: τ, 25 if not given; past=1: γ = 0.6 and some u.
    Rows have unit norm (images times ``scale`` and texts over it), texts lean towards their images;
    numbers that are not features are exact in bfloat16."""
    shape = case.shape
    B = shape["B"]
    r = shape.get("r")
    wide = torch.promote_types(case.dtype, torch.float32)
    image, text = drawn_pairs(case, shape["d"])
    ref_image, ref_text = drawn_pairs(case, r) if r else (None, None)
    tau = 2.0 if case.exact else shape.get("percent", 25) / 100
    past = 2 * torch.randn(2, B, generator=case.generator, dtype=torch.float64)
    past = past.bfloat16().to(wide)
    past[:, ::3] = torch.nan
    return {
        "image": image,
        "text": text,
        "ref_image": ref_image,
        "ref_text": ref_text,
        "temperature": torch.tensor(tau).bfloat16().to(wide),
        "gamma": 0.6 if shape.get("past") else 1.0,
        "u": past if shape.get("past") else None,
        "eps": 2.0**-8 if shape.get("past") else 1e-14,
        "rho": 0.5,
    }


def _apart(x: Tensor) -> Tensor:
    """Each row against its own pair."""
    return x - x.diagonal().unsqueeze(1)


def _whole(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    ref_image: Tensor | None,  # (B, r)
    ref_text: Tensor | None,  # (B, r)
    temperature: Tensor,
    eps: float,
    rho: float,
    **_: Any,
) -> Tensor:
    """The B×B matrices as one writes them, by autograd, each side of its own."""
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    s = image @ text.T
    d = _apart(s)
    d_text = _apart(s.T)
    if ref_image is not None and ref_text is not None:
        r = ref_image @ ref_text.T
        d = d - _apart(r)
        d_text = d_text - _apart(r.T)
    means = []
    for side in (d / temperature, d_text / temperature):
        log_G = side.masked_fill(own, -torch.inf).logsumexp(1) - math.log(len(image))
        log_G = torch.logaddexp(log_G, torch.full_like(log_G, eps).log())
        means.append(log_G.mean())
    return temperature * (sum(means) / 2 + rho)


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """A product of one side, each row against its own pair."""
    return a @ b.T - (a * b).sum(1, keepdim=True)


def _product_a_side(temperature: Tensor, eps: float, rho: float, **features: Any) -> Tensor:
    """As the published training code goes about it: a product a side, detached weights, a mask for
    the diagonal."""
    B = len(features["image"])
    mask = 1 - torch.eye(B, device=temperature.device)
    means = []
    moving = []
    for a, b in (("image", "text"), ("text", "image")):
        d = _similarity(features[a], features[b]) / temperature
        if features["ref_image"] is not None:
            d = d - _similarity(features[f"ref_{a}"], features[f"ref_{b}"]) / temperature
        with torch.no_grad():
            log_G = (d + mask.sub(1).mul(1e9)).logsumexp(1, keepdim=True) - math.log(B)
            u = torch.logaddexp(log_G, torch.full_like(log_G, eps).log())
            weights = (d - u).exp()
        means.append(u.mean())
        moving.append((d * weights * mask).sum(1).mean() / B)
    m = temperature.detach() / 2 * sum(moving)
    return m - m.detach() + temperature * (sum(means) / 2 + rho)


def _clip_loss(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    temperature: Tensor,
    **_: Any,
) -> Tensor:
    """open_clip's loss, which knows no reference and holds both matrices of logits."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, 1 / temperature)


def _floor(shape: Shape) -> tuple[float, float]:
    B = shape["B"]
    columns = shape["d"] + shape.get("r", 0)
    return 2.0 * B**2 * columns, 8.0 * B * columns


SPEC = OpSpec(
    name="drrho_loss",
    function=drrho_loss,
    reference=drrho_loss_reference,
    outputs=("loss", "u"),
    differentiable=("image", "text", "temperature"),
    draw=_draw,
    check=check_values,
    check_grads=check_grads,
    shapes=sizes(
        "B d r past percent",
        (37, 24, 16),
        (33, 31, None, 1),
        (129, 32, 33, None, 7),
        (1, 5, 3),
        (2, 1, 1, 1),
        (31, 129, None, None, 1),
        (128, 64, 64, 1, 4),
        (200, 127, 40, None, 10),
    ),
    small_shape={"B": 5, "d": 3, "r": 2},
    repeat_shape={"B": 500, "d": 48, "r": 24, "past": 1},
    bench_shapes={
        "B2048-d512-r512": {"B": 2048, "d": 512, "r": 512, "percent": 1},
        "B2048-d512": {"B": 2048, "d": 512, "percent": 1},
    },
    gpu_bench_shapes={
        "B8192-d512-r512": {"B": 8192, "d": 512, "r": 512, "percent": 1},
        "B32768-d512-r512": {"B": 32768, "d": 512, "r": 512, "percent": 1},
    },
    wide=True,
    opaque=False,
    exact=False,
    # tiles that touch neither an end nor the diagonal
    device_shapes=sizes("B d r", (300, 64, 64)),
    # the check has B×B matrices in float64
    gate_sizes={"B": 2048},
    baselines={
        "B×B torch": _whole,
        "a product a side": _product_a_side,
        "ClipLoss, no reference": _clip_loss,
    },
    floor=_floor,
)

SPECS = (SPEC,)
