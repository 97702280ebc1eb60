from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _adam import assert_step, norm_bound, step_and_bounds
from clipsteer import SAE, TrainConfig, train_sae
from clipsteer.io.checkpoint import load_latest
from clipsteer.ops import _check
from clipsteer.ops import _dispatch as ops_dispatch
from clipsteer.sae import losses as sae_loss
from clipsteer.sae import trainer as of_trainer
from clipsteer.sae.adam import UnitRowAdam
from clipsteer.sae.config import TRAINABLE
from clipsteer.sae.sources import TensorSource
from clipsteer.sae.train import Run
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

ALONE = World("cpu")
D, N, K = 12, 40, 5


def data(rows=600, d=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 20, generator=generator, dtype=dtype) * (torch.rand(rows, 20, generator=generator) < 0.15)
    return codes @ torch.randn(20, d, generator=generator, dtype=dtype) + 0.5


def make(architecture="topk", normalize="none", seed=0, n=N):
    torch.manual_seed(seed)
    sae = SAE(D, n, architecture, K, normalize=normalize, dtype=torch.float64)
    with torch.no_grad():
        sae.encoder_bias.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        sae.W_enc.add_(torch.randn_like(sae.W_enc) * 0.1)
    return sae


def tiny(**changes):
    base = {"d_sae": N, "k": K, "batch_size": 32, "steps": 12, "warmup_steps": 4, "lr": 1e-3, "schedule": "cosine"}
    return TrainConfig(
        **{**base, "dtype": "float64", "checkpoint_every": 5, "log_every": 2, "resample_after": 0, **changes}
    )


def weights(sae):
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- the formulas, once more in numpy


def np_losses(x, x_hat, acts):
    centred = x - x.mean(0)
    norm = np.sqrt((centred**2).sum(1))
    return {
        "fvu": ((x_hat - x) ** 2).sum() / (centred**2).sum(),
        "scaled_mse": np.mean((x_hat - x) ** 2 / norm[:, None]),
        "l1": np.mean(np.abs(acts).sum(1)),
    }


def test_losses_are_the_formulas():
    x, x_hat = data(50), data(50, seed=1)
    acts = torch.relu(torch.randn(50, N, dtype=torch.float64))
    stats = sae_loss.batch_stats(x, ALONE)
    truth = np_losses(x.numpy(), x_hat.numpy(), acts.numpy())
    got = {
        "fvu": sae_loss.fvu(x, x_hat, stats),
        "scaled_mse": sae_loss.scaled_mse(x, x_hat, stats),
        "l1": sae_loss.l1(acts, stats),
    }
    for name, value in truth.items():
        assert math.isclose(float(got[name]), value, rel_tol=1e-12), name


def np_auxk(sae, x, x_hat, dead, scale):
    W_enc, b_enc, W_dec, b_dec = (p.detach().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    normal = sae.normalize_input(x)[0].numpy()
    pre = np.einsum("bd,nd->bn", normal - b_dec, W_enc[dead]) + b_enc[dead]
    k = min(D // 2, len(dead))
    keep = np.argsort(-pre, axis=1)[:, :k]
    acts = np.zeros_like(pre)
    np.put_along_axis(acts, keep, np.maximum(np.take_along_axis(pre, keep, 1), 0), 1)
    guess = np.einsum("bn,nd->bd", acts, W_dec[dead]) * scale
    variance = ((x - x.mean(0)) ** 2).sum().item()
    return ((guess - (x.numpy() - x_hat)) ** 2).sum() / variance * min(len(dead) / (D // 2), 1)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("dead", [[3], [0, 7, 8, 9], list(range(25, 40))])
def test_auxk_is_its_formula(normalize, dead):
    sae, x = make(normalize=normalize), data(50)
    out = sae(x)
    scale = 1.0 if out.stats.scale is None else out.stats.scale.numpy()
    got = sae_loss.auxk(sae, x, out, sae_loss.batch_stats(x, ALONE), torch.tensor(dead))
    truth = np_auxk(sae, x, out.x_hat.detach().numpy(), dead, scale)
    assert math.isclose(float(got.detach()), truth, rel_tol=1e-12)


def test_the_auxiliary_gradient_reaches_the_encoder_of_dead_features():
    sae, x = make(), data(200)
    with torch.no_grad():
        sae.b_enc[30:] = -3.0  # never among the k largest, positive on no row of the main loss
        sae.W_enc[30:] *= 3
    dead = torch.arange(30, 40)
    out = sae(x)
    assert not bool((out.indices >= 30).logical_and(out.acts > 0).all())
    aux = sae_loss.auxk(sae, x, out, sae_loss.batch_stats(x, ALONE), dead)
    aux.backward()
    with torch.no_grad():
        pre = (x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead]
        # the k_aux largest that are positive
        used = ((pre >= pre.topk(D // 2, 1).values[:, -1:]) & (pre > 0)).any(0)
    assert bool(used.any())
    assert torch.equal(sae.W_enc.grad[dead].abs().sum(1) > 0, used)
    assert torch.equal(sae.b_enc.grad[dead] != 0, used)
    assert torch.equal(sae.W_dec.grad[dead].abs().sum(1) > 0, used)
    assert not sae.W_enc.grad[:30].any()
    # the same through autograd alone, without the ops
    again = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    pre = (x - again["b_dec"]) @ again["W_enc"][dead].T + again["b_enc"][dead]
    values, indices = pre.topk(D // 2)
    guess = torch.zeros_like(pre).scatter(1, indices, torch.relu(values)) @ again["W_dec"][dead]
    loss = (guess - (x - out.x_hat.detach())).square().sum() / (x - x.mean(0)).square().sum()
    loss.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, again[name].grad, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------- a step, against plain torch and a hand-written Adam


def plain_step(p, moments, step, x, config, architecture, dead, total):
    """MATH: renormalise, forward, backward, clip, remove the parallel part, Adam; all dense, nothing shared."""
    p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    q = {name: value.clone().requires_grad_() for name, value in p.items()}
    pre = (x - q["b_dec"]) @ q["W_enc"].T + q["b_enc"]
    if architecture == "topk":
        mask = pre >= pre.topk(K, 1).values[:, -1:]
    elif architecture == "batch_topk":
        mask = torch.relu(pre) >= torch.relu(pre).flatten().topk(K * len(x)).values[-1]
    else:
        mask = torch.ones_like(pre)
    acts = torch.relu(pre) * mask
    x_hat = acts @ q["W_dec"] + q["b_dec"]
    centred = x - x.mean(0)
    variance = centred.square().sum()
    if architecture == "relu":
        loss = ((x_hat - x).square() / centred.norm(dim=1, keepdim=True)).mean()
        loss = loss + config.l1_coefficient * acts.sum(1).mean()
    else:
        loss = (x_hat - x).square().sum() / variance
        if len(dead):
            k = min(D // 2, len(dead))
            spare = pre[:, dead]
            spare = torch.relu(spare) * (spare >= spare.topk(k, 1).values[:, -1:])
            error = (spare @ q["W_dec"][dead] - (x - x_hat).detach()).square().sum() / variance
            loss = loss + config.auxk * error * min(len(dead) / (D // 2), 1)
    loss.backward()
    grads = {name: value.grad for name, value in q.items()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    if norm > config.grad_clip:
        grads = {name: g * (config.grad_clip / (norm + 1e-6)) for name, g in grads.items()}
    row = p["W_dec"]
    grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * row).sum(1, keepdim=True) * row
    lr = config.lr
    if step < config.warmup_steps:
        lr *= (step + 1) / config.warmup_steps
    else:
        lr *= (1 + math.cos(math.pi * (step - config.warmup_steps) / (total - config.warmup_steps))) / 2
    for name, g in grads.items():
        m, v = moments.setdefault(name, [torch.zeros_like(g), torch.zeros_like(g)])
        m = moments[name][0] = 0.9 * m + 0.1 * g
        v = moments[name][1] = 0.999 * v + 0.001 * g * g
        t = step + 1
        p[name] = p[name] - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return float(loss.detach()), set((acts > 0).any(0).nonzero().flatten().tolist())


@pytest.mark.parametrize("grad_clip", [1.0, 1e-3])
@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk"])
def test_steps_equal_plain_torch(architecture, grad_clip):
    config = tiny(architecture=architecture, grad_clip=grad_clip, dead_after=70, sync_every=1, l1_coefficient=0.01)
    sae, x = make(architecture), data(320)
    trainer = SAETrainer(sae, config, 10)
    p = {name: value.detach().clone() for name, value in sae.named_parameters()}
    moments, since, revived = {}, torch.zeros(N, dtype=torch.int64), 0
    for step in range(10):
        batch = x[step * 32 : step * 32 + 32]
        dead = (since > 70).nonzero().flatten()
        revived += len(dead)
        loss, active = plain_step(p, moments, step, batch, config, architecture, dead, 10)
        got = trainer.step(batch)
        assert math.isclose(float(got[0]), loss, rel_tol=1e-6)
        since += 32
        since[list(active)] = 0
        assert torch.equal(trainer.tokens_since_fired, since)
        # the trainer makes rows of norm 1 at the end of a step, for the next one
        expected = p | {"W_dec": p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)}
        for name, value in sae.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-11)
    assert revived or architecture == "relu"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_are_of_unit_norm_and_the_gradient_orthogonal_when_adam_sees_it(monkeypatch, backend):
    if backend == "cpp" and ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    monkeypatch.setenv("CLIPSTEER_BACKEND", backend)
    sae = make()
    trainer = SAETrainer(sae, tiny(), 5)
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
    start = sae.W_dec.detach() / 3.0
    trainer.step(data(32))
    norms = sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=norm_bound(sae.W_dec), atol=0)
    # Adam's first moment is a tenth of the gradient
    gradient = trainer.optimizer.state[sae.W_dec]["exp_avg"]
    assert bool((gradient != 0).any())
    assert float((start * gradient).sum(1).abs().max()) <= 1e-15 * D * float(gradient.norm(dim=1).max())


def test_another_backend_in_the_environment_stops_no_relu_training(monkeypatch):
    """Its step calls no op, so that what cannot run here does not matter."""
    monkeypatch.setenv("CLIPSTEER_BACKEND", "cuda")
    sae = make("relu")
    before = sae.W_enc.detach().clone()
    SAETrainer(sae, tiny(architecture="relu"), 5).step(data(32))
    assert not torch.equal(sae.W_enc, before)


def as_rows(gradient):
    used = gradient.any(1).nonzero().flatten()
    return torch.sparse_coo_tensor(used[None], gradient[used], gradient.shape, check_invariants=False)


@pytest.mark.parametrize("form", ["dense", "rows", "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimiser_is_torch_adam_between_projection_and_unit_rows(monkeypatch, form, dtype):
    if form == "plain torch":
        monkeypatch.setenv("CLIPSTEER_BACKEND", "reference")
    elif ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    g, n, d = torch.Generator().manual_seed(0), 61, 37
    sae = SAE(d, n, k=3, dtype=dtype)
    with torch.no_grad():
        sae.W_dec[5] = 0  # stays
    optimizer = UnitRowAdam(sae, 1e-2)
    for step in range(1, 41):
        expected = {}
        for name, p in sae.named_parameters():
            grad = torch.randn(p.shape, generator=g, dtype=dtype)
            if p.dim() == 2:
                grad *= (torch.rand(n, 1, generator=g) < 0.3) * 10.0 ** torch.randint(-4, 2, (n, 1), generator=g)
                grad[5] = 0
            p.grad = as_rows(grad) if form == "rows" and p.dim() == 2 else grad.clone()
            moments = [optimizer.state[p].get(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq")]
            rows = [t.detach().reshape(-1, p.shape[-1]) for t in (p, *moments, grad)]
            expected[name] = step_and_bounds(rows[0], rows[1:3], rows[3], step, 1e-2, unit=name == "W_dec")
        optimizer.step()
        for name, p in sae.named_parameters():
            assert float(optimizer.state[p]["step"]) == step
            assert_step({"weight": p, **optimizer.state[p]}, expected[name], f"{name} in step {step}")
    assert not sae.W_dec[5].any()
    norms = sae.W_dec.detach().norm(dim=1)[6:]
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=norm_bound(sae.W_dec), atol=0)


def test_the_optimisers_bounds_hold_torchs_adam_and_catch_another():
    """Weights of its own precision and of another, and steps that are wrong by what a mistake would be wrong by."""
    n, d, lr = 20, 48, 1e-2
    g = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)
    p = torch.nn.Parameter(W.clone())
    adam, zeros = torch.optim.Adam([p], lr=lr, foreach=False), torch.zeros_like(W)
    for step in range(1, 30):
        before = [p.detach().clone(), *(adam.state[p].get(k, zeros).clone() for k in ("exp_avg", "exp_avg_sq"))]
        p.grad = torch.randn(n, d, generator=g, dtype=torch.float64)
        adam.step()
        found = {"weight": p, **adam.state[p]}
        assert_step(found, step_and_bounds(before[0], before[1:], p.grad, step, lr, False), "torch")
    single = [t.float() for t in (*before, p.grad)]
    of_single = step_and_bounds(single[0], single[1:3], single[3], step, lr, False)
    assert_step({k: t.detach().float() for k, t in found.items()}, of_single, "rounded")
    for wrong in ({"step": step + 1}, {"lr": lr * 1.001}, {"unit": True}, {"factor": 1.0001}):
        given = {"step": step, "lr": lr, "unit": False, "factor": 1.0} | wrong
        other = step_and_bounds(single[0], single[1:3], single[3], **given)
        with pytest.raises(AssertionError, match="other"):
            assert_step({"weight": other["weight"][0]}, {"weight": of_single["weight"]}, "other")
    more = found["exp_avg_sq"].float() * (1 + 2e-6)
    with pytest.raises(AssertionError, match="other"):
        assert_step({"exp_avg_sq": more}, {"exp_avg_sq": of_single["exp_avg_sq"]}, "other")


def test_the_optimiser_gives_the_same_bits_on_any_number_of_threads():
    if ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    n, d, threads, results = 5000, 64, torch.get_num_threads(), []
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, d, generator=g) * (torch.rand(n, 1, generator=g) < 0.2) for _ in range(3)]
    try:
        for form, count in ((as_rows, 1), (as_rows, 3), (torch.clone, 3)):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            sae = SAE(d, n, k=3)
            optimizer = UnitRowAdam(sae, 1e-2)
            for grad in grads:
                sae.W_enc.grad, sae.W_dec.grad = form(grad), form(grad)
                optimizer.step()
            results.append(torch.cat([sae.W_enc.detach(), sae.W_dec.detach()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    # A gradient of 0 need not be a missing one to the last bit: three roundings a step of either moment, six of a
    # step of at most 7.3 lr, in three steps; then the norms of rows that differ so.
    u = torch.finfo(torch.float32).eps / 2
    atol = 3 * (3 * (3 + 1.5) + 6) * u * 7.3 * 1e-2
    torch.testing.assert_close(results[0], results[2], rtol=3 * norm_bound(sae.W_dec), atol=atol)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_optimiser_on_other_instruction_sets(isa):
    if ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    env = {**os.environ, "CLIPSTEER_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "torch_adam and not plain"]
    done = subprocess.run(call, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "4 passed" in done.stdout


def test_the_optimiser_refuses_rows_out_of_range():
    if ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    sae = make()
    optimizer = UnitRowAdam(sae, 1e-3)
    values = torch.ones(2, D, dtype=torch.float64)
    sae.W_enc.grad = torch.sparse_coo_tensor(torch.tensor([[0, N]]), values, (N, D), check_invariants=False)
    with pytest.raises((ValueError, IndexError), match=r"ascending|out of range"):
        optimizer.step()


def test_a_factor_multiplies_what_there_is():
    sae = make()
    optimizer = UnitRowAdam(sae, 1e-3)
    before = sae.W_enc.detach().clone()
    optimizer.step(factor=torch.tensor(0.5))  # no gradient at all
    assert torch.equal(sae.W_enc, before)
    sae.b_enc.grad = torch.ones_like(sae.b_enc)
    optimizer.step(factor=torch.tensor(0.5))
    torch.testing.assert_close(optimizer.state[sae.b_enc]["exp_avg"], torch.full_like(sae.b_enc, 0.1 * 0.5))


@pytest.mark.parametrize("form", ["rows", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_without_gradients_decay_to_zero(form, dtype):
    """Not to the denormal numbers, whose decay ends above 0 and which a CPU computes many times slower."""
    if ops_dispatch.missing("cpp"):
        pytest.skip("the C++ library is not built")
    sae = SAE(D, N, k=K, dtype=dtype)
    optimizer, tiny = UnitRowAdam(sae, 1e-3), torch.finfo(dtype).tiny
    for step in range(30):
        for p in sae.parameters():
            grad = torch.zeros_like(p)
            if p.dim() == 2:
                grad[0] = 1
            p.grad = as_rows(grad) if form == "rows" and p.dim() == 2 else grad
        optimizer.step()
        if step == 0:
            for p in (sae.W_enc, sae.W_dec):
                optimizer.state[p]["exp_avg"][1:] = 4 * tiny
                optimizer.state[p]["exp_avg_sq"][1:] = 1.01 * tiny
    for p in (sae.W_enc, sae.W_dec):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[p][moment][1:].any()
            assert bool(optimizer.state[p][moment][0].all())


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a device, or gives shapes that depend on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put_") else []
        if any(i is not None and i.dtype == torch.bool for i in indices) or name in self.WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", TRAINABLE)
def test_a_step_does_not_wait_for_the_device(architecture, monkeypatch):
    # on a CPU, where nothing waits, the ops look at indices and offsets, and codes are as many as there are
    monkeypatch.setattr(_check, "check_indices", lambda *_, **__: None)
    monkeypatch.setattr(_check, "check_offsets", lambda *_, **__: None)
    monkeypatch.setattr(sae_loss, "takes_codes", lambda x: False)
    # as on a GPU
    monkeypatch.setattr(of_trainer, "takes_row_sparse", lambda parameter: False)
    config = tiny(architecture=architecture, sync_every=4, dead_after=40, auxk_coefficient=0.1)
    trainer = SAETrainer(make(architecture), config, 12)
    x = data(32)
    for step in range(12):
        with Syncs() as syncs:
            trainer.step(x)
        # only the refresh of the dead features does
        assert syncs.found == (["nonzero"] if step % 4 == 0 else [])


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk"])
def test_training_explains_more(architecture):
    log = []
    sae = train_sae(data(4000), tiny(architecture=architecture, steps=150, batch_size=128, lr=5e-3), on_log=log.append)
    assert not sae.training
    assert log[-1]["step"] == 150
    assert log[-1]["tokens"] == 150 * 128
    assert log[-1]["fvu"] < 0.5 * log[0]["fvu"]
    assert log[-1]["l0"] <= (N if architecture == "relu" else K)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N, dtype=torch.float64), rtol=1e-12, atol=0)
    if architecture == "batch_topk":
        assert float(sae.threshold) > 0


def test_a_run_starts_from_the_geometric_median_and_its_seed():
    x = data(64)
    generator = torch.get_rng_state()
    a = train_sae(x, tiny(steps=1, lr=0.0, batch_size=64))
    assert torch.equal(torch.get_rng_state(), generator)
    spread = lambda point: float((x - point).norm(dim=1).sum())
    best = spread(a.b_dec.detach())
    for axis in range(D):
        for sign in (1, -1):
            assert best <= spread(a.b_dec.detach() + sign * 1e-3 * torch.eye(D, dtype=torch.float64)[axis])
    assert torch.equal(a.W_enc, train_sae(x, tiny(steps=1, lr=0.0, batch_size=64)).W_enc)
    assert not torch.equal(a.W_enc, train_sae(x, tiny(steps=1, lr=0.0, batch_size=64, seed=1)).W_enc)


def test_an_sae_is_trained_on_in_place():
    sae = make("relu", "layer_norm")
    before = weights(sae)
    same = train_sae(data(), sae, config=tiny(steps=3))
    assert same is sae
    assert not torch.equal(before["W_enc"], sae.W_enc)
    assert sae.metadata["training"]["architecture"] == "relu"
    with pytest.raises(ValueError, match="d_in = 12"):
        train_sae(data(d=7), make(), config=tiny())


def test_a_finished_run_is_on_disk_and_is_not_repeated(tmp_path):
    sae = train_sae(data(), tiny(), out=tmp_path, metadata={"hook_point": "visual.ln_post"})
    loaded = SAE.from_pretrained(tmp_path)
    assert_same(weights(sae), weights(loaded))
    assert loaded.metadata["hook_point"] == "visual.ln_post"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert set(lines[0]) == {"step", "tokens", "loss", "fvu", "l0", "dead", "auxk", "lr", "tokens_per_second"}
    assert lines[-1]["tokens"] == 12 * 32
    log = []
    again = train_sae(data(), tiny(), out=tmp_path, on_log=log.append, metadata={"hook_point": "visual.ln_post"})
    assert_same(weights(sae), weights(again))
    assert log == []


class Stop(Exception):
    pass


def stop_at(step):
    def hook(record):
        if record["step"] == step:
            raise Stop

    return hook


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_torchs_defaults_are_not_the_optimisers(tmp_path, architecture):
    x, config = data(), tiny(architecture=architecture, log_every=1, dtype="float32")
    alone = train_sae(x, config)
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(Stop):
            train_sae(x, config, out=tmp_path, on_log=stop_at(7))
        resumed = train_sae(x, config, out=tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(weights(alone), weights(resumed))
    for p in (optimizer := UnitRowAdam(alone, 1e-3)).sae.parameters():
        p.grad = torch.ones_like(p)
    with torch.device("meta"):
        optimizer.step()
    assert not torch.equal(alone.b_enc, resumed.b_enc)
    assert not torch.equal(alone.W_enc, resumed.W_enc)


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk"])
def test_dictionaries_of_any_strides_are_trained(architecture, name):
    plain, strided = make(architecture), make(architecture)
    setattr(strided, name, torch.nn.Parameter(getattr(strided, name).detach().T.contiguous().T))
    for sae in (plain, strided):
        train_sae(data(), sae, config=tiny())
    for key, weight in weights(plain).items():
        torch.testing.assert_close(weights(strided)[key], weight, rtol=1e-9, atol=1e-11)


def test_another_model_hook_point_or_length_is_not_mixed_into_a_run(tmp_path):
    def source(rows=600, **provenance):
        found = TensorSource(data(rows))
        found.provenance = {"clip_model": "ViT-B-32", "hook_point": "visual.transformer.resblocks.9", **provenance}
        return found

    one_pass = tiny(steps=None)
    train_sae(source(), one_pass, out=tmp_path, metadata={"data": "photos"})
    files = [tmp_path / "cfg.json", tmp_path / "model.safetensors"]
    before = [path.read_bytes() for path in files]
    for other, metadata, message in (
        (
            source(hook_point="visual.transformer.resblocks.10"),
            {"data": "photos"},
            r"resblocks.9' there, .*resblocks.10'",
        ),
        (source(clip_model="ViT-L-14"), {"data": "photos"}, "metadata.clip_model"),
        (source(), {"data": "drawings"}, "metadata.data: 'photos' there, 'drawings' asked for"),
        (source(), None, "metadata.data: 'photos' there, None asked for"),
        (source(1200), {"data": "photos"}, "rows of a pass: 600 there, 1200 asked for, total steps: 18 there, 37"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae(other, one_pass, out=tmp_path, metadata=metadata)
        assert [path.read_bytes() for path in files] == before
    train_sae(source(), one_pass, out=tmp_path, metadata={"data": "photos"})
    assert [path.read_bytes() for path in files] == before


def test_a_run_within_its_warm_up_is_warned_of(caplog):
    train_sae(data(), tiny(steps=4, warmup_steps=4))
    assert "4 steps end within the warm-up of 4" in caplog.text
    caplog.clear()
    train_sae(data(), tiny(steps=5, warmup_steps=4))
    # what a run says of its steps is there or not, as the commands before have set the level
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_new_sae_leaves_every_generator_alone(monkeypatch):
    """torch.manual_seed would seed the GPUs' generators too, which fork_rng(devices=[]) does not put back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    first, again, other = (train_sae(data(), tiny(steps=1, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.allclose(first.W_enc, other.W_enc)


def test_several_processes_resume_a_checkpoint_without_a_gpus_generator(tmp_path):
    """A run that began on a CPU goes on where there are GPUs: their generators are not in the checkpoint."""
    trained = train_sae(data(), tiny(checkpoint_every=6), out=tmp_path)

    class Pair(World):
        size = property(lambda self: 2, lambda self, value: None)
        broadcast_ = staticmethod(lambda tensor: tensor)

    class OnGPU(SAETrainer):
        def state_tensors(self):
            return {**super().state_tensors(), "rng.cuda": torch.zeros(16, dtype=torch.uint8)}

    config = tiny(checkpoint_every=6)
    run = Run(OnGPU(make(), config, config.steps, Pair("cpu")), TensorSource(data()), tmp_path, fresh=True)
    run.trainer.sae.metadata.clear()
    run.start(resume=True)
    assert run.trainer.step_count == 12
    run.trainer.sae.renormalize_decoder_()
    assert_same(weights(run.trainer.sae), weights(trained))


def test_rows_that_are_not_finite_stop_the_run_and_spare_the_checkpoint(tmp_path):
    def parts():
        yield data(32 * 7)
        bad = data(32 * 5)
        bad[3, 2] = float("nan")
        yield bad

    with pytest.raises(RuntimeError, match=r"loss is nan at step 8.*checkpoint of step 5"):
        train_sae(parts(), tiny(), out=tmp_path)
    found = load_latest(tmp_path / "checkpoints")
    assert found.step == 5
    assert all(t.isfinite().all() for t in found.tensors.values())


def test_autocast_trains_in_bfloat16():
    log = []
    sae = train_sae(data(dtype=torch.float32), tiny(dtype="float32", autocast="bfloat16", steps=30), on_log=log.append)
    assert sae.W_enc.dtype == torch.float32
    assert log[-1]["fvu"] < log[0]["fvu"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"architecture": "vanilla"}, {"loss": "mse"}, {"bandwidth": 0.0}, {"l0_penalty": "l0"},
        {"dtype": "int8"}, {"autocast": "fp8"}, {"batch_size": 1},
        {"batch_size": 0}, {"d_sae": 0}, {"lr": -1.0}, {"lr": math.nan}, {"grad_clip": math.inf},
        {"tokens": 5, "steps": 5},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_the_length_of_a_run():
    assert TrainConfig(batch_size=10).total_steps(99) == 9
    assert TrainConfig(batch_size=10, tokens=55).total_steps(99) == 5
    assert TrainConfig(batch_size=10, steps=7).total_steps(None) == 7
    with pytest.raises(ValueError, match="give tokens or steps"):
        train_sae(iter([data()]), TrainConfig())
    with pytest.raises(ValueError, match="do not fill one batch"):
        train_sae(data(30), tiny(steps=None))
    with pytest.raises(TypeError, match="expand"):
        train_sae(data(), expand=3)
    config = TrainConfig(lr=1.0, warmup_steps=4)
    assert [config.lr_at(s, 8) for s in (0, 3, 4, 6)] == [0.25, 1.0, 1.0, 0.5]
    assert TrainConfig(architecture="relu").peak_lr == 4e-4
    assert TrainConfig(lr=1.0, warmup_steps=0, cosine=False).lr_at(7, 8) == 1.0
