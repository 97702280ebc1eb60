"""``drrho_loss``: (τ/2)·mean_i(u_i^image + u_i^text) + ρτ, u_i a running log(ε + (1/B)·Σ_{j≠i} exp
d_ij).

d_ij = [(s_ij − s_ii) − (r_ij − r_ii)]/τ for similarities s of the model and r of a frozen
reference; the text side has rows and columns exchanged. Fused: one product of [image, −ref_image]
and [text, ref_text] gives s − r a tile at a time, both sides take their sums from it in log space,
and the gradient goes back in the same call: no B×B matrix. Source: Wei et al. 2025 (DRRho-CLIP,
arXiv 2505.06699); Wei et al. 2024 (FastCLIP, arXiv 2407.01445) for u, γ and ρ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import _check
from clipsteer.ops._calls import holds, remembered, step
from clipsteer.ops._contrastive import KINDS, Kind, Value, contrast
from clipsteer.ops._dispatch import call, choose
from clipsteer.ops._drrho import Arguments, averaged, evaluate, log_of
from clipsteer.ops._steps import cast_to, detached, full
from clipsteer.ops._sweeps import in_one_call

__all__ = ["drrho_loss", "drrho_loss_reference"]

NUMBERS = (int, float, torch.SymFloat, torch.SymInt)


def drrho_loss_reference(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    ref_image: Tensor | None = None,  # (B, d_ref)
    ref_text: Tensor | None = None,  # (B, d_ref)
    *,
    temperature: float | Tensor = 0.01,
    gamma: float = 1.0,
    u: Tensor | None = None,  # (2, B)
    eps: float = 1e-14,
    rho: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; twice differentiable. e^{-u}·∇G, G averaged by γ in u, is
    ∇u/γ."""
    wide = torch.promote_types(image.dtype, torch.float32)
    B = image.shape[0]
    s = image.to(wide) @ text.to(wide).T
    if ref_image is not None and ref_text is not None:
        s = s - ref_image.detach().to(wide) @ ref_text.detach().to(wide).T
    d = (torch.stack([s, s.T]) - s.diagonal().unsqueeze(1)) / temperature  # (2, B, B)
    own = torch.eye(B, dtype=torch.bool, device=s.device)
    log_G = d.masked_fill(own, -torch.inf).logsumexp(2) - log_of(B, s)
    u, share = averaged(log_G, u, gamma, eps)
    moving = (u - u.detach()).nan_to_num(0.0)  # 0, with u's gradient
    loss = (u.detach() + moving / share).sum() / (2 * B) + rho
    return (loss * temperature).to(wide), u.detach()


def _reference(
    image: Tensor,
    text: Tensor,
    ref_image: Tensor | None,
    ref_text: Tensor | None,
    tau: Tensor,
    u: Tensor | None,
    gamma: float,
    eps: float,
    rho: float,
) -> tuple[Tensor, Tensor]:
    return drrho_loss_reference(
        image,
        text,
        ref_image,
        ref_text,
        temperature=tau,
        gamma=gamma,
        u=u,
        eps=eps,
        rho=rho,
    )


def _gradient(cotangents, found, arguments, needs, backend, world):
    """The sweeps hand back the gradients with the value; ``found`` begins with u."""
    (grad,) = cotangents
    _, d_image, d_text, d_tau = found
    image, text = arguments[:2]
    B = image.shape[0] if world is None else world.rows
    if in_one_call(backend, world):
        grads = (d_image, d_text, d_tau)
        return call(backend, "contrast_grad", grad, image, None, 2 * B * B, *grads, None)[:3]
    # data-parallel training averages gradients over the processes, each of which has those of its
    # rows
    scaled = grad * ((1 if world is None else world.size) / (2 * B * B))
    return (scaled * d_image).to(image.dtype), (scaled * d_text).to(text.dtype), grad * d_tau


KINDS["drrho_loss"] = Kind(evaluate, _gradient, _reference, tensors=6, leaves=(0, 1, 4), outputs=2)


class Loss:
    """The loss by sweeps, differentiable."""

    @staticmethod
    def run(backend: str, world: Any, needs: tuple[bool, ...], *arguments: Any) -> Any:
        """loss (), u (2, B), and what the gradient takes."""
        return Value.run("drrho_loss", backend, world, needs, *arguments)


def checked(
    image,  # (B, d)
    text,  # (B, d)
    ref_image,  # (B, d_ref) or None
    ref_text,  # (B, d_ref) or None
    temperature,
    gamma,
    u,  # (2, B) or None
    eps,
    rho,
    rows=None,
):
    """``Arguments``. ``rows``: of all processes, one of which may have none."""
    op = "drrho_loss"
    numbers = {"gamma": gamma, "eps": eps, "rho": rho}
    named = {"image": image, "text": text, "ref_image": ref_image, "ref_text": ref_text}
    for name in ("image", "text"):
        if not isinstance(named[name], Tensor):
            raise TypeError(_check.mistake(op, name, "a tensor", type(named[name]).__name__, named))
    named = dict(zip(named, _check.autocast(*named.values())))
    _check.check_tensors(op, named)
    if image.dim() != 2 or 0 in (image.shape[0] if rows is None else rows, image.shape[1]):
        expected = "of shape (B, d), neither of them 0"
        raise ValueError(_check.mistake(op, "image", expected, tuple(image.shape), named))
    B = image.shape[0]
    together = B if rows is None else rows
    _check.check_shape(op, named, "text", tuple(image.shape), "image's (B, d)")
    if (ref_image is None) != (ref_text is None):
        name = "ref_image" if ref_image is None else "ref_text"
        expected = "given when the other reference features are"
        raise ValueError(_check.mistake(op, name, expected, None, named))
    if ref_image is not None:
        if ref_image.dim() != 2 or ref_image.shape[0] != B:
            expected = f"of shape (B = {B}, d_ref)"
            got = tuple(ref_image.shape)
            raise ValueError(_check.mistake(op, "ref_image", expected, got, named))
        _check.check_shape(op, named, "ref_text", tuple(ref_image.shape), "ref_image's (B, d_ref)")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, NUMBERS):
            raise TypeError(_check.mistake(op, name, "a number", type(value).__name__, named))
    if not 0 < gamma <= 1:
        raise ValueError(_check.mistake(op, "gamma", "in (0, 1]", gamma, named))
    if not 0 <= eps < math.inf or (eps == 0 and together == 1):
        expected = "positive when B = 1" if eps == 0 else "a finite number of at least 0"
        raise ValueError(_check.mistake(op, "eps", expected, eps, named))
    if not -math.inf < rho < math.inf:
        raise ValueError(_check.mistake(op, "rho", "finite", rho, named))
    wide = torch.promote_types(named["image"].dtype, torch.float32)
    tau = _checked_temperature(op, temperature, named, wide)
    if u is not None:
        u = _checked_u(op, u, named)
    return Arguments(*named.values(), tau, u, gamma, eps, rho)


def _checked_temperature(op, temperature, named, wide):
    device = named["image"].device
    if isinstance(temperature, Tensor):
        named = {**named, "temperature": temperature}
        if not temperature.is_floating_point():
            got = temperature.dtype
            raise TypeError(_check.mistake(op, "temperature", "floating point", got, named))
        if temperature.numel() != 1 or temperature.device != device:
            expected = f"one number on {device}"
            got = f"{tuple(temperature.shape)} on {temperature.device}"
            raise ValueError(_check.mistake(op, "temperature", expected, got, named))
        # a value is looked at where that costs no synchronisation
        looked_at = device.type == "cpu" and _check.has_values(temperature)
        wrong = looked_at and not holds(_check.is_positive, temperature)
        tau = temperature if temperature.dim() == 0 else step(torch.reshape, temperature, ())
        tau = cast_to(tau, wide)
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymFloat)):
        got = type(temperature).__name__
        raise TypeError(_check.mistake(op, "temperature", "a number or a tensor", got, named))
    else:
        wrong = not 0 < temperature < math.inf
        tau = full(temperature, wide, device)
    if wrong:
        expected = "positive and finite"
        raise ValueError(_check.mistake(op, "temperature", expected, temperature, named))
    return tau


def _checked_u(op, u, named):
    image = named["image"]
    B = image.shape[0]
    if not isinstance(u, Tensor) or not u.is_floating_point():
        got = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(_check.mistake(op, "u", "a floating-point tensor", got, named))
    if tuple(u.shape) != (2, B) or u.device != image.device:
        expected = f"of shape (2, B = {B}) on {image.device}"
        got = f"{tuple(u.shape)} on {u.device}"
        raise ValueError(_check.mistake(op, "u", expected, got, named))
    return detached(u)


@remembered
def drrho_loss(
    image: Tensor,  # (B, d)
    text: Tensor,  # (B, d)
    ref_image: Tensor | None = None,  # (B, d_ref)
    ref_text: Tensor | None = None,  # (B, d_ref)
    *,
    temperature: float | Tensor = 0.01,
    gamma: float = 1.0,
    u: Tensor | None = None,  # (2, B)
    eps: float = 1e-14,
    rho: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of a batch relative to a frozen reference model, or without one.

    The batch is this process's own, with its own pairs alone as negatives. Under
    ``DistributedDataParallel`` that is another loss than the joint batch's, whose gradients
    ``reference.DRRhoLoss`` gives, and ``reference.ContrastiveLoss`` for CLIP's loss.

    Args:
        image, text: (B, d) features of B pairs, as a rule of unit norm (the op does not normalise
            them); float32, bfloat16, float16 or (reference, cpp) float64.
        ref_image, ref_text: (B, d_ref) features of the same pairs under the reference, of any width
            and without gradient; None for both is r = 0, FastCLIP's global contrastive loss.
        temperature: τ > 0, a number or a tensor with one element, which then has its gradient.
        gamma: share γ in (0, 1] of this batch in u; 1 forgets the past.
        u: (2, B) what earlier calls returned for these samples, image side and text side; NaN:
            never visited, as all are when it is None.
        eps: ε ≥ 0 inside the logarithm. FastCLIP takes 1e-14 to 1e-6, DRRho-CLIP 1e-4.
        rho: weight ρ of the ρτ term, which pushes a learnable τ down; it moves no feature. For γ =
            1 and ε → 0 the gradient in τ is ρ − mean KL(w_i/B ‖ uniform), a divergence that falls
            in τ from log B at most to log(B/(B − 1)): τ settles where it is ρ, at infinity for ρ =
            0, at 0 for ρ ≥ log B. The 6.5 and 11 of FastCLIP do not carry over: its code counts
            the last term of that gradient, below, twice.
        backend: ``"auto" | "reference" | "cpp" | "triton"``; ``ops.explain`` says which can run.

    Returns:
        loss (), float32 (float64 for float64 features), and u (2, B) of the same dtype, without
        gradient: where γ = 1 or never visited log(ε + G_i), else logaddexp(u_i + log(1 − γ), log(ε
        + G_i) + log γ) with G_i = (1/B)·Σ_{j≠i} exp d_ij, in log space throughout. The gradient in
        the features is (τ/2)·mean_i Σ_{j≠i} (w_ij/B)·∇d_ij, both sides, with w_ij = exp(d_ij − u_i)
        held fixed: for γ = 1 that of the value, for γ < 1 its denominator is the average over
        earlier batches. The gradient in τ is ½·mean(u^image + u^text) + ρ − ½·mean_i Σ_j
        (w_ij/B)·d_ij. Second derivatives, exact for γ = 1, are those of (τ/2γ)·mean u, by the
        reference. Deterministic. Extra memory is O(B·(d + d_ref)), on a GPU also 1,300·B numbers
        and 256 MiB at most; the reference holds several B×B matrices.

    Raises:
        ValueError: shapes or devices that do not fit; only one of the reference's features; an
            empty batch; gamma, eps or temperature out of range (a tensor's value is looked at on
            the CPU only); B = 1 with eps = 0.
        TypeError: not tensors or numbers, dtypes that differ outside autocast.
        RuntimeError: the backend asked for cannot run here.

    Source: Wei et al. 2025 (arXiv 2505.06699); Wei et al. 2024 (arXiv 2407.01445), equations of u
    and of RGCL-g.
    """
    given = checked(image, text, ref_image, ref_text, temperature, gamma, u, eps, rho)
    return run(given, choose("drrho_loss", backend, given.image))


def run(arguments: Arguments, backend: str, world: Any = None) -> tuple[Tensor, Tensor]:
    """Checked arguments through the definition or the sweeps, differentiable if something asks for
    it."""
    if arguments.ref_image is not None and arguments.ref_text is not None:
        ref_image = detached(arguments.ref_image)
        ref_text = detached(arguments.ref_text)
        arguments = arguments._replace(ref_image=ref_image, ref_text=ref_text)
    return contrast("drrho_loss", arguments, backend, world)
