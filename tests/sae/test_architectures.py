"""What trains besides top-k: each architecture's step, its codes and its penalties, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipsteer import SAE, TrainConfig, ops, testing, train_sae
from clipsteer.sae import encoding, losses
from clipsteer.sae.config import TRAINABLE
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

needs_cpp = pytest.mark.skipif(not testing.supported("cpp"), reason="the C++ library is not built")
ALONE = World("cpu")
D, N = 12, 40
PATHS = [pytest.param("codes", marks=needs_cpp), "dense"]


def data(rows: int = 320, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 20, generator=g, dtype=dtype) * (torch.rand(rows, 20, generator=g) < 0.15)
    return codes @ torch.randn(20, D, generator=g, dtype=dtype) + 0.5


def make(architecture: str, dtype: torch.dtype = torch.float64, n: int = N) -> SAE:
    torch.manual_seed(0)
    sae = SAE(D, n, architecture, 5, dtype=dtype)
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1)
        sae.W_enc.add_(torch.randn_like(sae.W_enc) * 0.1)
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_gate", "b_mag", "r_mag"):
                p.normal_(0, 0.1)
            elif name == "threshold":
                p.uniform_(0, 0.5)
    return sae


def config(architecture: str, **changes) -> TrainConfig:
    base = {"d_sae": N, "k": 5, "batch_size": 32, "steps": 10, "warmup_steps": 0, "cosine": False, "lr": 1e-2}
    base |= {"l1_coefficient": 0.01, "l0_coefficient": 0.01, "bandwidth": 0.05, "dtype": "float64", "sync_every": 1}
    return TrainConfig(**{**base, "architecture": architecture, **changes})


def take(path: str, monkeypatch) -> None:
    """Encode this way, whatever is faster."""
    if path == "dense":
        monkeypatch.setattr(losses, "takes_codes", lambda x: False)
    else:
        monkeypatch.setattr(encoding, "_DENSE_FROM", 1.0)


def plain_gradients(sae: SAE, x: Tensor, cfg: TrainConfig, dead: list[int]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients from the papers' formulas, dense, by autograd; the rectangle by hand."""
    p = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    count = len(x)
    centred = x - x.mean(0)
    variance = centred.square().sum()
    fvu = lambda x_hat: (x_hat - x).square().sum() / variance
    scaled = lambda x_hat: ((x_hat - x).square() / centred.norm(dim=1, keepdim=True)).mean()
    pre = (x - p["b_dec"]) @ p["W_enc"].T
    gate = pre + p["b_gate" if sae.architecture == "gated" else "b_enc"]
    if sae.architecture == "gated":
        acts = torch.relu(pre * p["r_mag"].exp() + p["b_mag"]) * (gate > 0)
        by_gates = torch.relu(gate) @ p["W_dec"].detach() + p["b_dec"].detach()
        loss = scaled(by_gates) + cfg.l1_coefficient * torch.relu(gate).sum() / count
    elif sae.architecture == "jumprelu":
        acts = gate * (gate > p["threshold"])
        acts.retain_grad()
        loss = torch.zeros((), dtype=x.dtype)
        if cfg.l0_penalty == "tanh":
            loss = cfg.l0_coefficient * torch.tanh(4 * acts).sum() / count
        else:
            loss = loss + cfg.l0_coefficient * float((gate > p["threshold"]).sum()) / count
    else:
        acts = torch.relu(gate)
        loss = cfg.l1_coefficient * acts.sum() / count
    x_hat = acts @ p["W_dec"] + p["b_dec"]
    loss = loss + (fvu if sae.architecture == "jumprelu" else scaled)(x_hat)
    if dead and cfg.auxk:
        spare = gate[:, dead]
        k = min(D // 2, len(dead))
        spare = torch.relu(spare) * (spare >= spare.topk(k, 1).values[:, -1:])
        left = (spare @ p["W_dec"][dead] - (x - x_hat).detach()).square().sum() / variance
        loss = loss + cfg.auxk * left * min(len(dead) / (D // 2), 1)
    loss.backward()
    if sae.architecture == "jumprelu":
        theta = p["threshold"].detach()
        bandwidth = cfg.bandwidth * (variance / count).sqrt()  # as where tokens have norm 1
        near = (((gate - theta) / bandwidth).abs() < 0.5).double()
        by_step = cfg.l0_coefficient / count if cfg.l0_penalty == "step" else 0.0
        p["threshold"].grad = -(near * (theta * acts.grad + by_step) / bandwidth).sum(0)
    return float(loss.detach()), {name: value.grad for name, value in p.items()}


@pytest.mark.parametrize("auxk", [0.0, 0.1])
@pytest.mark.parametrize("penalty", ["step", "tanh"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated"])
def test_loss_and_gradients_are_the_papers(architecture, path, penalty, auxk, monkeypatch):
    if penalty == "tanh" and architecture != "jumprelu":
        pytest.skip("only jumprelu has it")
    take(path, monkeypatch)
    sae = make(architecture)
    sae.renormalize_decoder_()
    x = data(32)
    cfg = config(architecture, l0_penalty=penalty, auxk_coefficient=auxk, grad_clip=None)
    trainer = SAETrainer(sae, cfg, 10)
    dead = [1, 7, 30]
    trainer.tokens_since_fired[dead] = trainer.config.dead_after + 1
    loss, expected = plain_gradients(sae, x, cfg, dead)
    row = sae.W_dec.detach().clone()
    got = trainer.step(x)
    assert math.isclose(float(got[0]), loss, rel_tol=2.0**-23)  # a metric is float32
    expected["W_dec"] -= (expected["W_dec"] * row).sum(1, keepdim=True) * row
    for name, p in sae.named_parameters():
        # Adam's first moment is a tenth of the gradient
        found = 10 * trainer.optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert bool(expected[name].any()), name


@needs_cpp
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("architecture", TRAINABLE)
def test_every_architecture_updates_rows_alone(architecture, autocast, monkeypatch):
    take("codes", monkeypatch)
    sae = make(architecture, torch.float32)
    cfg = config(architecture, dtype="float32", autocast=autocast, auxk_coefficient=0.1)
    trainer = SAETrainer(sae, cfg, 10)
    trainer.tokens_since_fired[[1, 7]] = trainer.config.dead_after + 1
    seen = []
    step = trainer.optimizer.step
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda **k: seen.append((sae.W_enc.grad, sae.W_dec.grad)) or step(**k),
    )
    trainer.step(data(32, dtype=torch.float32))
    for grad in seen[0]:
        assert grad.is_sparse
        assert grad.dtype == torch.float32


@needs_cpp
@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "gated"])
def test_codes_are_taken_where_few_features_are_active(architecture):
    """And dense products where half of them are, as when relu begins."""
    sae, x = make(architecture, torch.float32, n=200), data(64, dtype=torch.float32)
    centred = sae._centred(x)[0]
    for bias, dense in ((0.0, True), (-4.0, False)):
        with torch.no_grad():
            sae.encoder_bias.fill_(bias)
        assert sae.mostly_active(centred) == dense
        out = losses.forward(sae, x, ALONE, bandwidth=0.1)
        assert (out.indices is None) == dense


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_a_run_starts_with_k_features_a_token(architecture):
    log = []
    x = data(512)
    cfg = config(architecture, batch_size=512, steps=1, log_every=1, lr=0.0)
    sae = train_sae(x, cfg, on_log=log.append)
    assert abs(log[0]["l0"] - 5) <= 1 / 512  # the smallest of them is the threshold itself
    start = sae.threshold if architecture == "jumprelu" else -sae.b_gate
    assert float(start.detach().min()) == float(start.detach().max()) > 0


@pytest.mark.parametrize("architecture", TRAINABLE)
def test_every_architecture_learns(architecture):
    log = []
    changes = {"steps": 150, "batch_size": 128, "warmup_steps": 4, "lr": 5e-3, "log_every": 2, "l0_coefficient": 1e-3}
    sae = train_sae(data(4000), config(architecture, **changes), on_log=log.append)
    assert log[-1]["fvu"] < 0.6 * log[0]["fvu"]
    assert 1 < log[-1]["l0"] < N
    if architecture == "jumprelu":
        assert len(sae.threshold.detach().unique()) > N // 2


def test_a_threshold_stays_where_no_negative_activation_passes():
    sae = make("jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1e-4)
    trainer = SAETrainer(sae, config("jumprelu", l0_coefficient=0.0, lr=0.1), 20)
    for step in range(10):
        trainer.step(data(32, seed=step))
    assert float(sae.threshold.detach().min()) >= 0
    assert bool((sae.threshold == 0).any())


def test_weighted_penalties_are_the_plain_ones_on_unit_rows():
    sae, x = make("jumprelu"), data(32)
    out = sae(x, bandwidth=0.1)
    stats = losses.batch_stats(x, ALONE)
    norms = 1 + torch.rand(N, dtype=torch.float64)
    weighted = losses.l1(out.acts, stats, norms)
    assert math.isclose(float(weighted.detach()), float((out.acts * norms).sum(1).mean().detach()), rel_tol=1e-12)
    smooth = losses.tanh_l0(out.acts, stats, norms)
    expected = torch.tanh(4 * out.acts * norms).sum(1).mean()
    assert math.isclose(float(smooth.detach()), float(expected.detach()), rel_tol=1e-12)
    ones = torch.ones_like(norms)
    assert torch.equal(losses.l1(out.acts, stats, ones), losses.l1(out.acts, stats))
    assert torch.equal(losses.tanh_l0(out.acts, stats, ones), losses.tanh_l0(out.acts, stats))


@pytest.mark.parametrize("sparse_grad", [False, pytest.param(True, marks=needs_cpp)])
def test_a_bandwidth_gives_the_threshold_its_gradient_in_forward(sparse_grad):
    sae, x = make("jumprelu"), data(16)
    out = sae(x, bandwidth=0.3, sparse_grad=sparse_grad)
    out.x_hat.square().sum().backward()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    by_act = 2 * out.x_hat @ sae.W_dec.T
    near = ((pre - sae.threshold).abs() < 0.15).double()
    expected = -(near * sae.threshold / 0.3 * by_act).sum(0)
    torch.testing.assert_close(sae.threshold.grad, expected.detach(), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- the op


def test_derivatives_of_a_jump_are_the_formulas():
    pre = torch.tensor([-1.0, 0.2, 0.45, 0.55, 0.9, 2.0, math.nan], dtype=torch.float64, requires_grad=True)
    theta = torch.full((7,), 0.5, dtype=torch.float64, requires_grad=True)
    g = torch.arange(1.0, 8.0, dtype=torch.float64)
    values, active = ops.jumprelu(pre, theta, 0.25)
    assert values[:6].tolist() == [0, 0, 0, 0.55, 0.9, 2.0]
    assert bool(values[6].isnan())
    assert active[:6].tolist() == [0, 0, 0, 1, 1, 1]
    d_pre, d_theta = torch.autograd.grad(values, (pre, theta), g, create_graph=True, retain_graph=True)
    near = torch.tensor([0, 0, 1, 1, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(d_pre[:6], g[:6] * (pre[:6] > 0.5))
    torch.testing.assert_close(d_theta, -2 * g * near)
    (twice,) = torch.autograd.grad(d_theta.sum(), theta, retain_graph=True)
    torch.testing.assert_close(twice, -4 * g * near)
    (by_step,) = torch.autograd.grad(active, theta, g)
    torch.testing.assert_close(by_step, -4 * g * near)


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpp") if testing.supported(b)])
def test_padding_gives_no_threshold_a_gradient(backend):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(3, 8, generator=g), torch.randn(5, 8, generator=g)
    found = []
    for capacity in (None, 40):
        theta = torch.full((5,), 0.01, requires_grad=True)  # within half of the rectangle of 0
        out = ops.jumprelu_encode(x, W, threshold=theta, bandwidth=1.0, capacity=capacity, backend=backend)
        (out.active.sum() + out.values.sum()).backward()
        found.append(theta.grad)
        assert int(out.active.sum()) == int((x @ W.T > 0.01).sum())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threshold": 0.5}, TypeError, "threshold must be a tensor"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth must be positive"),
        ({"threshold": torch.ones(4)}, ValueError, r"\(d_sae = 5,\)"),
    ],
)
def test_mistakes_are_told(changes, error, message):
    given = {"threshold": torch.ones(5), "bandwidth": 0.1}
    with pytest.raises(error, match=message):
        ops.jumprelu_encode(torch.ones(3, 8), torch.ones(5, 8), **{**given, **changes})
