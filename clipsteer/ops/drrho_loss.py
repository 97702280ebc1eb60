"""``drrho_loss``: (τ/2)·mean_i(u_i^image + u_i^text) + ρτ, u_i a running log(ε + (1/B)·Σ_{j≠i} exp d_ij).

d_ij = [(s_ij − s_ii) − (r_ij − r_ii)]/τ for similarities s of the model and r of a frozen reference; the text side has
rows and columns exchanged. Fused: one product of [image, −ref_image] and [text, ref_text] gives s − r a tile at a time,
both sides take their sums from it in log space, and the gradient goes back in the same call: no B×B matrix.
Source: Wei et al. 2025 (DRRho-CLIP, arXiv 2505.06699); Wei et al. 2024 (FastCLIP, arXiv 2407.01445) for u, γ and ρ.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._dispatch import choose, tracked
from clipsteer.ops._drrho_bounds import check_grads, check_values
from clipsteer.ops._drrho_sweeps import averaged, evaluate
from clipsteer.ops._spec import OpSpec, draw


def drrho_loss_reference(
    image: Tensor, text: Tensor, ref_image: Tensor | None = None, ref_text: Tensor | None = None, *,
    temperature: float | Tensor = 0.01, gamma: float = 1.0, u: Tensor | None = None, eps: float = 1e-14,
    rho: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in plain torch; twice differentiable. e^{-u}·∇G, G averaged by γ in u, is ∇u/γ."""
    wide, B = torch.promote_types(image.dtype, torch.float32), image.shape[0]
    s = image.to(wide) @ text.to(wide).T
    if ref_image is not None:
        s = s - ref_image.detach().to(wide) @ ref_text.detach().to(wide).T
    d = (torch.stack([s, s.T]) - s.diagonal().unsqueeze(1)) / temperature  # (2, B, B)
    own = torch.eye(B, dtype=torch.bool, device=s.device)
    log_G = d.masked_fill(own, -torch.inf).logsumexp(2) - math.log(B)
    u, share = averaged(log_G, u, gamma, eps)
    loss = (u.detach() + (u - u.detach()).nan_to_num(0.0) / share).sum() / (2 * B) + rho
    return (loss * temperature).to(wide), u.detach()


class Loss(torch.autograd.Function):
    """The sweeps hand back the gradients with the value."""

    @staticmethod
    def forward(ctx, image, text, ref_image, ref_text, tau, u, gamma, eps, rho, backend, world):
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        inputs = (image, text, ref_image, ref_text, tau, u)
        loss, new, *grads = evaluate(*inputs, gamma, eps, rho, needs, backend, world)
        ctx.save_for_backward(*grads, *inputs)
        B, size = (image.shape[0], 1) if world is None else (world.rows, world.size)
        # data-parallel training averages gradients over the processes, each of which has those of its rows
        ctx.options, ctx.factor = (gamma, eps, rho), size / (2 * B * B)
        ctx.mark_non_differentiable(new)
        ctx.together = world is not None
        return loss, new

    @staticmethod
    def backward(ctx, grad, _):
        flags = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
        result = _Gradient.apply(grad, *ctx.saved_tensors, ctx.options, ctx.factor, flags, ctx.together)
        d_image, d_text, d_tau = (g if f else None for g, f in zip(result, flags))
        return d_image, d_text, None, None, d_tau, *[None] * 6


class _Gradient(torch.autograd.Function):
    """grad times each gradient; the derivatives of that are the reference's."""

    @staticmethod
    def forward(ctx, grad, d_image, d_text, d_tau, image, text, ref_image, ref_text, tau, u, options, factor, flags,
                together):  # fmt: skip
        ctx.save_for_backward(grad, image, text, ref_image, ref_text, tau, u)
        ctx.options, ctx.flags, ctx.together = options, flags, together
        scaled = grad * factor
        return (scaled * d_image).to(image.dtype), (scaled * d_text).to(text.dtype), grad * d_tau

    @staticmethod
    def backward(ctx, *outer):
        if ctx.together:
            raise RuntimeError("drrho_loss: over several processes it has first derivatives only; use a single one")
        grad, image, text, ref_image, ref_text, tau, u = ctx.saved_tensors
        gamma, eps, rho = ctx.options
        with torch.enable_grad():
            leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (image, text, tau)]
            loss, _ = drrho_loss_reference(
                *leaves[:2], ref_image, ref_text, temperature=leaves[2], gamma=gamma, u=u, eps=eps, rho=rho
            )
            wanted = [(x, o) for x, o, flag in zip(leaves, outer, ctx.flags) if flag]
            once = torch.autograd.grad(loss, [x for x, _ in wanted], create_graph=True)
            along = sum((g * o).sum() for g, (_, o) in zip(once, wanted))
            twice = torch.autograd.grad(along * grad, leaves, create_graph=True, allow_unused=True)
        return along, None, None, None, twice[0], twice[1], None, None, twice[2], *[None] * 5


def checked(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho, rows=None):
    """The features in one dtype, the temperature as a tensor of the wide one, u detached or None. ``rows``: of all
    processes, one of which may have none."""
    op, numbers = "drrho_loss", {"gamma": gamma, "eps": eps, "rho": rho}
    named = {"image": image, "text": text, "ref_image": ref_image, "ref_text": ref_text}
    for name in ("image", "text"):
        if not isinstance(named[name], Tensor):
            raise TypeError(_check.mistake(op, name, "a tensor", type(named[name]).__name__, named))
    named = dict(zip(named, _check.autocast(*named.values())))
    _check.check_tensors(op, named)
    if image.dim() != 2 or 0 in (image.shape[0] if rows is None else rows, image.shape[1]):
        raise ValueError(_check.mistake(op, "image", "of shape (B, d), neither of them 0", tuple(image.shape), named))
    B = image.shape[0]
    _check.check_shape(op, named, "text", tuple(image.shape), "image's (B, d)")
    if (ref_image is None) != (ref_text is None):
        name = "ref_image" if ref_image is None else "ref_text"
        raise ValueError(_check.mistake(op, name, "given when the other reference features are", None, named))
    if ref_image is not None:
        if ref_image.dim() != 2 or ref_image.shape[0] != B:
            expected = f"of shape (B = {B}, d_ref)"
            raise ValueError(_check.mistake(op, "ref_image", expected, tuple(ref_image.shape), named))
        _check.check_shape(op, named, "ref_text", tuple(ref_image.shape), "ref_image's (B, d_ref)")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(_check.mistake(op, name, "a number", type(value).__name__, named))
    if not 0 < gamma <= 1:
        raise ValueError(_check.mistake(op, "gamma", "in (0, 1]", gamma, named))
    if not 0 <= eps < float("inf") or (eps == 0 and (B if rows is None else rows) == 1):
        expected = "positive when B = 1" if eps == 0 else "a finite number of at least 0"
        raise ValueError(_check.mistake(op, "eps", expected, eps, named))
    if not -float("inf") < rho < float("inf"):
        raise ValueError(_check.mistake(op, "rho", "finite", rho, named))
    wide = torch.promote_types(named["image"].dtype, torch.float32)
    if isinstance(temperature, Tensor):
        scalar = {**named, "temperature": temperature}
        if not temperature.is_floating_point():
            raise TypeError(_check.mistake(op, "temperature", "floating point", temperature.dtype, scalar))
        if temperature.numel() != 1 or temperature.device != image.device:
            expected, got = f"one number on {image.device}", f"{tuple(temperature.shape)} on {temperature.device}"
            raise ValueError(_check.mistake(op, "temperature", expected, got, scalar))
        # a value is looked at where that costs no synchronisation
        plain = not torch.compiler.is_compiling() and type(temperature) in (Tensor, torch.nn.Parameter)
        wrong = plain and temperature.device.type == "cpu" and float(temperature.detach()) <= 0
        tau = temperature.reshape(()).to(wide)
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymFloat)):
        raise TypeError(_check.mistake(op, "temperature", "a number or a tensor", type(temperature).__name__, named))
    else:
        wrong, tau = not 0 < temperature < float("inf"), torch.full((), temperature, dtype=wide, device=image.device)
    if wrong:
        raise ValueError(_check.mistake(op, "temperature", "positive and finite", temperature, named))
    if u is not None:
        if not isinstance(u, Tensor) or not u.is_floating_point():
            got = u.dtype if isinstance(u, Tensor) else type(u).__name__
            raise TypeError(_check.mistake(op, "u", "a floating-point tensor", got, named))
        if tuple(u.shape) != (2, B) or u.device != image.device:
            expected, got = f"of shape (2, B = {B}) on {image.device}", f"{tuple(u.shape)} on {u.device}"
            raise ValueError(_check.mistake(op, "u", expected, got, named))
        u = u.detach()
    return *named.values(), tau, u


def drrho_loss(
    image: Tensor,
    text: Tensor,
    ref_image: Tensor | None = None,
    ref_text: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.01,
    gamma: float = 1.0,
    u: Tensor | None = None,
    eps: float = 1e-14,
    rho: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of a batch relative to a frozen reference model, or without one.

    Args:
        image, text: (B, d) features of B pairs, as a rule of unit norm (the op does not normalise them); float32,
            bfloat16, float16 or (reference, cpp) float64.
        ref_image, ref_text: (B, d_ref) features of the same pairs under the reference, of any width and without
            gradient; None for both is r = 0, FastCLIP's global contrastive loss.
        temperature: τ > 0, a number or a tensor with one element, which then has its gradient.
        gamma: share γ in (0, 1] of this batch in u; 1 forgets the past.
        u: (2, B) what earlier calls returned for these samples, image side and text side; NaN: never visited, as all
            are when it is None.
        eps: ε ≥ 0 inside the logarithm.
        rho: weight of the ρτ term, which holds a learnable τ up; it moves no feature.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        loss (), float32 (float64 for float64 features), and u (2, B) of the same dtype, without gradient: where γ = 1
        or never visited log(ε + G_i), else logaddexp(u_i + log(1 − γ), log(ε + G_i) + log γ) with
        G_i = (1/B)·Σ_{j≠i} exp d_ij, in log space throughout.
        The gradient in the features is (τ/2)·mean_i Σ_{j≠i} (w_ij/B)·∇d_ij, both sides, with w_ij = exp(d_ij − u_i)
        held fixed: for γ = 1 that of the value, for γ < 1 its denominator is the average over earlier batches. The
        gradient in τ is ½·mean(u^image + u^text) + ρ − ½·mean_i Σ_j (w_ij/B)·d_ij. Second derivatives, exact for γ = 1,
        are those of (τ/2γ)·mean u, by the reference. Deterministic. Extra memory is O(B·(d + d_ref)), on a GPU also
        1,300·B numbers and 256 MiB at most; the reference holds several B×B matrices.

    Raises:
        ValueError: shapes or devices that do not fit; only one of the reference's features; an empty batch; gamma,
            eps or temperature out of range (a tensor's value is looked at on the CPU only); B = 1 with eps = 0.
        TypeError: not tensors or numbers, dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Wei et al. 2025 (arXiv 2505.06699); Wei et al. 2024 (arXiv 2407.01445), equations of u and of RGCL-g.
    """
    *features, tau, u = checked(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho)
    backend = choose("drrho_loss", backend, features[0])
    return run(*features, tau, u, gamma, eps, rho, backend)


def run(
    image: Tensor, text: Tensor, ref_image: Tensor | None, ref_text: Tensor | None, tau: Tensor, u: Tensor | None,
    gamma: float, eps: float, rho: float, backend: str, world: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checked arguments through the definition or the sweeps, differentiable if something asks for it."""
    ref_image, ref_text = (t if t is None else t.detach() for t in (ref_image, ref_text))
    features, kind = (image, text, ref_image, ref_text), image.device.type
    # inside its region autocast would take the reference's float32 products to halves
    casting = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if casting else contextlib.nullcontext():
        if backend == "reference" and world is None:
            return drrho_loss_reference(*features, temperature=tau, gamma=gamma, u=u, eps=eps, rho=rho)
        if tracked(image, text, tau):
            return Loss.apply(*features, tau, u, gamma, eps, rho, backend, world)
        return evaluate(*features, tau, u, gamma, eps, rho, (False,) * 3, backend, world)[:2]


def _make(shape: dict[str, int], dtype: torch.dtype, generator: torch.Generator, scale: float, exact: bool) -> dict:
    """Keys B, d, r (none: no reference); percent: τ, 25 if not given; past=1: γ = 0.6 and some u. Rows have unit norm
    (images times ``scale`` and texts over it), texts lean towards their images; numbers that are not features are exact
    in bfloat16."""
    B, d, r = shape["B"], shape["d"], shape.get("r")
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
    s, own = image @ text.T, torch.eye(len(image), dtype=torch.bool, device=image.device)
    apart = lambda x: x - x.diagonal().unsqueeze(1)
    d, d_text = apart(s), apart(s.T)
    if ref_image is not None:
        r = ref_image @ ref_text.T
        d, d_text = d - apart(r), d_text - apart(r.T)
    d, d_text = d / temperature, d_text / temperature
    sides = [x.masked_fill(own, -torch.inf).logsumexp(1) - math.log(len(image)) for x in (d, d_text)]
    sides = [torch.logaddexp(x, torch.full_like(x, eps).log()) for x in sides]
    return temperature * (sum(x.mean() for x in sides) / 2 + rho)


def _product_a_side(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho):
    """As the published training code goes about it: a product a side, detached weights, a mask for the diagonal."""
    B, mask, means, moving = len(image), 1 - torch.eye(len(image), device=image.device), [], []
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
    backends=("reference", "cpp", "triton"),
    wide=True,
    opaque=False,
    exact=False,
    device_shapes=({"B": 300, "d": 64, "r": 64},),  # tiles that touch neither an end nor the diagonal
    gate_sizes={"B": 2048},  # the check has B×B matrices in float64
    baselines={"B×B torch": _whole, "a product a side": _product_a_side, "ClipLoss, no reference": _clip_loss},
    floor=lambda s: (2.0 * s["B"] ** 2 * (s["d"] + s.get("r", 0)), 8.0 * s["B"] * (s["d"] + s.get("r", 0))),
)
