"""The losses of SAEs and transcoders once more, in dense float64 torch that shares nothing with clipsteer's."""

from __future__ import annotations

import pytest
import torch

from clipsteer import SAE, TrainConfig

D, D_OUT, N, K = 10, 7, 36, 4
PREFIXES = (3, 11, 36)
ARCHITECTURES = ("topk", "batch_topk", "relu", "jumprelu")


def rows(count=60, d=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(count, 20, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(count, 20, generator=generator) < 0.2)
    return codes @ torch.randn(20, d, generator=generator, dtype=torch.float64) + 0.5


def targets(x, d=D_OUT):
    """Rows that depend on x, not linearly."""
    generator = torch.Generator().manual_seed(5)
    return torch.relu(x @ torch.randn(x.shape[1], d, generator=generator, dtype=torch.float64)) + 0.3


def make(architecture="topk", seed=0, **more):
    """An SAE whose every parameter counts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = SAE(D, N, architecture, K, dtype=torch.float64, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
        if sae.has_unit_rows:
            sae.renormalize_decoder_()
        if architecture == "jumprelu":
            sae.threshold.fill_(0.3)
    return sae


def config(**changes):
    base = {"d_sae": N, "k": K, "batch_size": 32, "steps": 12, "warmup_steps": 3, "lr": 1e-3, "dtype": "float64",
            "checkpoint_every": 5, "log_every": 2, "auxk_coefficient": 1 / 32, "bandwidth": 0.1,
            "resample_after": 0}  # fmt: skip
    return TrainConfig(**{**base, **changes})


class _Jump(torch.autograd.Function):
    """pre above its threshold, and 1 there; rectangles of Rajamanoharan et al. 2024 for the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        active = (pre > threshold).double()
        ctx.save_for_backward(active, ((pre - threshold).abs() < width / 2).double(), threshold)
        ctx.width = width
        return pre * active, active

    @staticmethod
    def backward(ctx, of_acts, of_active):
        active, near, threshold = ctx.saved_tensors
        of_threshold = -(near * (threshold * of_acts + of_active)).sum(0) / ctx.width
        return of_acts * active, of_threshold, None


def outputs(sae, p, x, width=None):
    """Every prefix's output, activations, and for jumprelu whether they are active; p: parameters by name."""
    scale, mean = torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1])
    normal = x
    if sae.normalize == "layer_norm":
        mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        normal = (x - mean) / (scale + 1e-5)
    elif sae.normalize == "constant_norm":
        scale = x.norm(dim=1, keepdim=True) / D**0.5
        normal = x / scale
    centred = normal - p["b_dec"] if sae.apply_b_dec_to_input else normal
    pre = centred @ p["W_enc"].T + p["b_enc"]
    active = None
    if sae.architecture == "topk":
        acts = torch.relu(pre) * (pre >= pre.topk(K, 1).values[:, -1:])
    elif sae.architecture == "batch_topk":
        acts = torch.relu(pre) * (pre >= pre.flatten().topk(K * len(x)).values[-1])
    elif sae.architecture == "jumprelu":
        acts, active = _Jump.apply(pre, p["threshold"], width or 1.0)
    else:
        acts = torch.relu(pre)
    if sae.d_out is not None:
        scale, mean = torch.ones_like(scale), torch.zeros_like(mean)
    beside = x @ p["W_skip"].T if sae.skip else 0
    sizes = sae.matryoshka or (N,)
    found = [(acts[:, :n] @ p["W_dec"][:n] + p["b_dec"]) * scale + mean + beside for n in sizes]
    return found, acts, active, pre, scale


def loss(sae, p, x, y, config, dead):
    """What ``SAETrainer`` minimises and what it reports: loss, FVU, and the FVU of shorter prefixes."""
    # the window is as wide as it would be where rows have norm 1
    size = (x - x.mean(0)).square().sum(1).mean().sqrt() if sae.normalize == "none" else D**0.5
    x_hats, acts, active, pre, scale = outputs(sae, p, x, float(config.bandwidth * size))
    centred = y - y.mean(0)
    variance = centred.square().sum()
    fvus = [(x_hat - y).square().sum() / variance for x_hat in x_hats]
    total = sum(fvus) / len(fvus)
    norms = 1.0 if sae.d_out is None else p["W_dec"].norm(dim=1)
    if sae.architecture == "relu":
        total = sum(((h - y).square() / centred.norm(dim=1, keepdim=True)).mean() for h in x_hats) / len(x_hats)
        total = total + config.l1_coefficient * (acts * norms).sum() / len(x)
    elif sae.architecture == "jumprelu" and config.l0_penalty == "step":
        total = total + config.l0_coefficient * active.sum() / len(x)
    elif sae.architecture == "jumprelu":
        total = total + config.l0_coefficient * torch.tanh(4 * acts * norms).sum() / len(x)
    if len(dead):
        half = y.shape[1] // 2
        spare = pre[:, dead]
        spare = torch.relu(spare) * (spare >= spare.topk(min(half, len(dead)), 1).values[:, -1:])
        error = (spare @ p["W_dec"][dead] * scale - (y - x_hats[-1]).detach()).square().sum() / variance
        total = total + config.auxk_coefficient * error * min(len(dead) / half, 1)
    return total, fvus


def gradients(sae, x, y, config, dead):
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    total, fvus = loss(sae, p, x, y, config, dead)
    total.backward()
    return total.item(), [f.item() for f in fvus], {name: value.grad for name, value in p.items()}


def stepped(trainer, *rows):
    """One step without an update: its metrics, and the gradients that the optimiser would have taken."""
    left = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", lambda factor, more: left.update(more))
        patch.setattr(trainer.optimizer, "zero_grad", lambda **_: None)
        metrics = dict(zip(trainer.metrics, trainer.step(*rows).tolist(), strict=True))
    gradients = {}
    for name, parameter in trainer.sae.named_parameters():
        gradients[name] = parameter.grad.to_dense().clone()
        if parameter in left:
            gradients[name].index_add_(0, left[parameter].features, left[parameter].values)
    return metrics, gradients
