"""What ``drrho_loss`` may be off by.

S = s − r is a sum of D products, off by δS ≤ (D + 6)·u·|rows||cols|ᵀ; t = (S − S_ii)/τ is off by δ
≤ (δS + δS_ii)/τ and its own roundings. A sum of exponentials of t' ∈ [t − δ, t + δ] has its
logarithm in [lse(t − δ), lse(t + δ)], and u, which rises with it, stays in the image of that
interval. A weight exp(t − u) is then off by a factor of at most exp(δ + δu), and the gradients are
sums of weights times features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops._spec import ACCUMULATE, OpSpec, draw, fraction_of_bound, operand_error
from clipsteer.ops.drrho_loss import drrho_loss, drrho_loss_reference

# An exponential, or a logarithm, in roundings of its result; see specs/semantic_drift.py.
EXP = 4


class Truth:
    """A drawn case in float64: per side (image, text) t, its error δ, u and its error, all (2, B,
    B) or (2, B)."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        wide = {n: v.detach().double() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        dtype = inputs["image"].dtype
        self.unit = ACCUMULATE[dtype]
        self.operand = operand_error(dtype)
        # weights on tensor cores are sums of two halves
        self.split = 2.0**-15 if dtype in (torch.float16, torch.bfloat16) else 0.0
        self.image = wide["image"]
        self.text = wide["text"]
        self.tau = wide["temperature"]
        rows = self.image
        cols = self.text
        if wide["ref_image"] is not None:
            rows = torch.cat([rows, -wide["ref_image"]], 1)
            cols = torch.cat([cols, wide["ref_text"]], 1)
        self.B = rows.shape[0]
        self.rho = wide["rho"]
        own = torch.eye(self.B, dtype=torch.bool)
        u = self.unit
        tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
        S = rows @ cols.T
        size = rows.abs() @ cols.abs().T
        off = ((rows.shape[1] + 6) * u + self.operand) * size + rows.shape[1] * tiny
        both = lambda x: torch.stack([x, x.T]) + x.diagonal().unsqueeze(1)
        t = (torch.stack([S, S.T]) - S.diagonal().unsqueeze(1)) / self.tau
        self.delta = both(off) / self.tau + 6 * u * both(S.abs()) / self.tau
        # a pair at infinity has no weight, or all of it, whatever it is rounded to
        self.delta = torch.where(t.isinf(), 0.0, self.delta).nan_to_num(nan=0.0)
        self.t = t.masked_fill(own, -torch.inf)
        self.lse = self.t.logsumexp(2)
        peak = self.t.amax(2).nan_to_num(posinf=0.0, neginf=0.0, nan=0.0)
        # a term's distance from the peak, the exponential, B sums, a rescaling for each tile of 16,
        # the logarithm
        step = self.delta + 2 * u * (
            t.abs().nan_to_num(posinf=0.0, nan=0.0) + peak.abs().unsqueeze(2)
        )
        steps = (self.B + (EXP + 2) * (self.B / 16 + 1) + 2 * EXP + 4) * u
        ends = [(self.t + sign * step).logsumexp(2) + sign * steps for sign in (-1, 1)]
        self.u, self.share = self.averaged(self.lse, wide)
        sizes = (
            8 * u * (self.lse.abs().nan_to_num(posinf=0.0) + math.log(self.B) + self.u.abs() + 1)
        )
        if wide["eps"] > 0:
            sizes = sizes + 4 * u * abs(math.log(wide["eps"]))
        if wide["u"] is not None:
            sizes = sizes + 4 * u * (wide["u"].nan_to_num(0.0).abs() + abs(math.log(wide["gamma"])))
        low, high = (self.averaged(end, wide)[0] for end in ends)
        self.u_off = (torch.maximum(high - self.u, self.u - low) + sizes).nan_to_num(
            nan=0.0,
            posinf=0.0,
        )

    def averaged(self, lse: Tensor, wide: dict[str, Any]) -> tuple[Tensor, Tensor]:
        log_G = torch.logaddexp(lse - math.log(self.B), torch.full_like(lse, wide["eps"]).log())
        past = torch.full_like(lse, torch.nan) if wide["u"] is None else wide["u"]
        share = torch.where(past.isnan(), 1.0, torch.full_like(past, wide["gamma"]))
        return torch.logaddexp(past.nan_to_num(0.0) + (1 - share).log(), log_G + share.log()), share

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp(t − u) / 2B² of both sides, its error, and t with 0 where a pair is its own: (2, B,
        B)."""
        w = (self.t - self.u.unsqueeze(2)).exp() / (2 * self.B**2)
        t = self.t.masked_fill(torch.eye(self.B, dtype=torch.bool), 0.0)
        rounding = self.unit * (2 * t.abs() + 2 * self.u.abs().unsqueeze(2) + 2 * EXP + 4)
        return w, w * torch.expm1(self.delta + self.u_off.unsqueeze(2) + rounding), t


def check_values(inputs: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, float]:
    x = Truth(inputs)
    found = {"u": fraction_of_bound(outputs["u"], x.u, x.u.abs(), 2, 0.0, x.u_off)}
    loss = x.tau * (x.u.mean(1).sum() / 2 + x.rho)
    size = x.tau * (x.u.abs().mean(1).sum() / 2 + abs(x.rho))
    off = (x.tau * x.u_off.mean(1).sum() / 2).nan_to_num(nan=0.0, posinf=0.0)
    found["loss"] = fraction_of_bound(
        *(v.reshape(1) for v in (outputs["loss"], loss, size)),
        2 * x.B + 6,
        0.0,
        off,
    )
    return found


def check_grads(
    inputs: dict[str, Any],
    outputs: dict[str, Tensor],
    grad_out: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    x = Truth(inputs)
    g = grad_out["loss"].double()
    found = {}
    w, off, t = x.weights()
    P = w[0] + w[1].T
    P_off = off[0] + off[1].T
    own = w.sum(2).sum(0)
    own_off = off.sum(2).sum(0) + (x.B + 4) * x.unit * w.sum(2).sum(0)
    # a sum of B weights in log space, then out of it
    own_off = (
        own_off
        + own * x.unit * (x.lse.abs() + x.u.abs()).nan_to_num(neginf=0.0, posinf=0.0).amax(0) * 2
    )
    full = P - own.diag()
    full_off = P_off + own_off.diag()
    size = P + own.diag()
    for name, left, left_off, sizes, right in (
        ("image", full, full_off, size, x.text),
        ("text", full.T, full_off.T, size.T, x.image),
    ):
        if name not in grads:
            continue
        truth = left @ right
        magnitude = (sizes + left_off) @ right.abs()
        bound = left_off @ right.abs()
        extra = x.operand + x.split
        found[name] = fraction_of_bound(
            grads[name],
            g * truth,
            g.abs() * magnitude,
            2 * x.B + 8,
            extra,
            g.abs() * bound,
        )
    if "temperature" in grads:
        mean = x.u.mean(1).sum() / 2 + x.rho
        u_mean = x.u.abs().mean(1).sum() / 2 + abs(x.rho)
        moment = (w * t).sum()
        size = (w * t.abs()).sum()
        bound = x.u_off.mean(1).sum() / 2 + (off * (t.abs() + x.delta) + w * x.delta).sum()
        values = (grads["temperature"], g * (mean - moment), g.abs() * (u_mean + size))
        found["temperature"] = fraction_of_bound(
            *(v.reshape(1) for v in values),
            2 * x.B + 16,
            0.0,
            g.abs() * bound,
        )
    return found


def _make(
    shape: dict[str, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float,
    exact: bool,
) -> dict:
    """Keys B, d, r (none: no reference); percent: τ, 25 if not given; past=1: γ = 0.6 and some u.
    Rows have unit norm (images times ``scale`` and texts over it), texts lean towards their images;
    numbers that are not features are exact in bfloat16."""
    B = shape["B"]
    d = shape["d"]
    r = shape.get("r")
    wide = torch.promote_types(dtype, torch.float32)

    def pairs(n: int) -> tuple[Tensor, Tensor]:
        a, b = (draw((B, n), torch.float64, generator, 1.0, exact) for _ in range(2))
        if not exact:
            unit = lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
            a, b = unit(a) * scale, unit(unit(a) + b / n**0.5) / scale
        return a.to(dtype), b.to(dtype)

    inputs: dict[str, Any] = dict(zip(("image", "text"), pairs(d)))
    inputs |= dict(zip(("ref_image", "ref_text"), pairs(r) if r else (None, None)))
    tau = 2.0 if exact else shape.get("percent", 25) / 100
    inputs["temperature"] = torch.tensor(tau).bfloat16().to(wide)
    past = draw((2, B), torch.float64, generator, 2.0, False).bfloat16().to(wide)
    past[:, ::3] = torch.nan
    inputs |= {"gamma": 0.6, "u": past} if shape.get("past") else {"gamma": 1.0, "u": None}
    return inputs | {"eps": 2.0**-8 if shape.get("past") else 1e-14, "rho": 0.5}


def _whole(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho):
    """The B×B matrices as one writes them, by autograd, each side of its own."""
    s = image @ text.T
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    apart = lambda x: x - x.diagonal().unsqueeze(1)
    d = apart(s)
    d_text = apart(s.T)
    if ref_image is not None:
        r = ref_image @ ref_text.T
        d = d - apart(r)
        d_text = d_text - apart(r.T)
    d = d / temperature
    d_text = d_text / temperature
    sides = [
        x.masked_fill(own, -torch.inf).logsumexp(1) - math.log(len(image)) for x in (d, d_text)
    ]
    sides = [torch.logaddexp(x, torch.full_like(x, eps).log()) for x in sides]
    return temperature * (sum(x.mean() for x in sides) / 2 + rho)


def _product_a_side(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho):
    """As the published training code goes about it: a product a side, detached weights, a mask for
    the diagonal."""
    B = len(image)
    mask = 1 - torch.eye(len(image), device=image.device)
    means = []
    moving = []
    sides = ((image, text, ref_image, ref_text), (text, image, ref_text, ref_image))
    for a, b, ref_a, ref_b in sides:
        d = (a @ b.T - (a * b).sum(1, keepdim=True)) / temperature
        if ref_a is not None:
            d = d - (ref_a @ ref_b.T - (ref_a * ref_b).sum(1, keepdim=True)) / temperature
        with torch.no_grad():
            log_G = (d + mask.sub(1).mul(1e9)).logsumexp(1, keepdim=True) - math.log(B)
            u = torch.logaddexp(log_G, torch.full_like(log_G, eps).log())
            weights = (d - u).exp()
        means.append(u.mean())
        moving.append((d * weights * mask).sum(1).mean() / B)
    m = temperature.detach() / 2 * sum(moving)
    return m - m.detach() + temperature * (sum(means) / 2 + rho)


def _clip_loss(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho):
    """open_clip's loss, which knows no reference and holds both matrices of logits."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, 1 / temperature)


SPEC = OpSpec(
    name="drrho_loss",
    function=drrho_loss,
    reference=drrho_loss_reference,
    outputs=("loss", "u"),
    differentiable=("image", "text", "temperature"),
    make=_make,
    check=check_values,
    check_grads=check_grads,
    shapes=(
        {"B": 37, "d": 24, "r": 16},
        {"B": 33, "d": 31, "past": 1},
        {"B": 129, "d": 32, "r": 33, "percent": 7},
        {"B": 1, "d": 5, "r": 3},
        {"B": 2, "d": 1, "r": 1, "past": 1},
        {"B": 31, "d": 129, "percent": 1},
        {"B": 128, "d": 64, "r": 64, "past": 1, "percent": 4},
        {"B": 200, "d": 127, "r": 40, "percent": 10},
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
    device_shapes=(
        {"B": 300, "d": 64, "r": 64},
    ),  # tiles that touch neither an end nor the diagonal
    gate_sizes={"B": 2048},  # the check has B×B matrices in float64
    baselines={
        "B×B torch": _whole,
        "a product a side": _product_a_side,
        "ClipLoss, no reference": _clip_loss,
    },
    floor=lambda s: (
        2.0 * s["B"] ** 2 * (s["d"] + s.get("r", 0)),
        8.0 * s["B"] * (s["d"] + s.get("r", 0)),
    ),
)

SPECS = (SPEC,)
