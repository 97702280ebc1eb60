"""AuxK by rows of its own (``clipsteer.sae.revival``): the gradients of ``losses.auxk``, and Adam on two lists of
rows."""

from __future__ import annotations

import pytest
import torch

from clipsteer import SAE, TrainConfig
from clipsteer.ops import _dispatch
from clipsteer.sae import losses as sae_loss
from clipsteer.sae import trainer as of_trainer
from clipsteer.sae.revival import _positive, revival
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.world import World

pytestmark = pytest.mark.skipif(_dispatch.missing("cpp") is not None, reason="needs the C++ backend")
ALONE, D, N = World("cpu"), 12, 60


def sae_of(architecture="topk", normalize="none", d_out=None, n=N):
    torch.manual_seed(0)
    settings = {} if d_out is None else {"d_out": d_out}
    sae = SAE(D, n, architecture, 5, normalize=normalize, dtype=torch.float64, **settings)
    with torch.no_grad():
        sae.encoder_bias.normal_(0, 0.1)
        sae.W_enc.add_(torch.randn_like(sae.W_enc) * 0.1)
        sae.W_dec.normal_()
        if architecture == "jumprelu":
            sae.threshold.fill_(0.5)
    return sae.train()


# up to half the width all are taken, and of more those that are selected in some rows or in all
@pytest.mark.parametrize("dead", [[3], [0, 7, 8, 9, 20], list(range(15, 57))], ids=len)
@pytest.mark.parametrize("case", ["topk", "batch_topk", "relu", "gated", "jumprelu", "layer_norm", "transcoder"])
def test_the_gradients_are_those_of_the_loss(case, dead):
    architecture = case if case in ("batch_topk", "relu", "gated", "jumprelu") else "topk"
    sae = sae_of(
        architecture, *(["layer_norm"] if case == "layer_norm" else []), d_out=9 if case == "transcoder" else None
    )
    dead = torch.tensor(dead)
    x = torch.randn(40, D, dtype=torch.float64)
    y = torch.randn(40, 9, dtype=torch.float64) if case == "transcoder" else x
    out, stats = sae_loss.forward(sae, x, ALONE), sae_loss.batch_stats(y, ALONE)
    truth = sae_loss.auxk(sae, x, out, stats, dead, target=y)
    (0.3 * truth).backward()
    found = revival(sae, x, out, stats, dead, y, 0.3)
    torch.testing.assert_close(found.loss, truth.detach(), rtol=1e-12, atol=0)
    for name, weight in (("W_enc", sae.W_enc), ("W_dec", sae.W_dec), ("bias", sae.encoder_bias)):
        torch.testing.assert_close(getattr(found, name), weight.grad[dead], rtol=1e-10, atol=1e-14)
    if case == "transcoder":
        assert found.b_dec is None
    else:
        torch.testing.assert_close(found.b_dec, sae.b_dec.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shift", [-3.0, -1.0, 0.4, 3.0], ids=["none", "few", "some rows", "all rows"])
def test_the_codes_are_the_positive_ones_of_the_k_largest(shift):
    """Some rows have no more than k positive ones, of others k are selected; ties go to the earlier, NaN is kept."""
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(30, 23, generator=generator).mul(4).round() / 4 + shift).contiguous()
    pre[3, 5] = torch.nan
    k = 14
    values, columns, rows, offsets = _positive(pre, k)
    crowded = int(((pre > 0).sum(1) > k).sum())
    assert (crowded > 0) == (shift > 0)
    assert (crowded >= 29) == (shift == 3)
    found = torch.zeros(30, 23).index_put((rows, columns), values)
    finite = torch.arange(30) != 3
    order = torch.sort(pre, dim=1, descending=True, stable=True).indices[:, :k]
    truth = torch.zeros(30, 23).scatter(1, order, pre.gather(1, order).clamp(min=0))
    assert torch.equal(found[finite], truth[finite])
    assert found[3].isnan().any()
    assert torch.equal(offsets[1:], torch.bincount(rows, minlength=30).cumsum(0))
    assert bool((rows.diff() >= 0).all())


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_a_step_is_the_one_with_all_gradients_in_one(architecture, monkeypatch):
    """Dead features among them that the batch brings back: the gradient of these is a sum."""
    config = TrainConfig(
        lr=1e-3, warmup_steps=0, schedule="constant", auxk_coefficient=0.5, dead_after=100, sync_every=100,
        grad_clip=0.01, batch_size=40, resample_after=0,
    )  # fmt: skip
    weights, calls = [], []
    real = of_trainer.revival
    monkeypatch.setattr(of_trainer, "revival", lambda *args: calls.append(1) or real(*args))
    for by_rows in (True, False):
        sae = sae_of(architecture)
        trainer = SAETrainer(sae, config, 100)
        trainer._revives = by_rows
        trainer.tokens_since_fired[::3] = 1000
        generator = torch.Generator().manual_seed(1)
        brought_back = 0
        for _ in range(4):
            trainer.step(torch.randn(40, D, generator=generator, dtype=torch.float64))
            brought_back += int((trainer.tokens_since_fired[trainer.dead] == 0).sum())
        assert brought_back > 0
        weights.append({name: tensor.clone() for name, tensor in trainer.state_tensors().items()})
    assert len(calls) == 4
    for name, tensor in weights[0].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor, weights[1][name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("listed", [True, False])
def test_adam_takes_rows_from_two_lists(dtype, listed):
    generator = torch.Generator().manual_seed(0)
    n, d = 300, 7
    w, m, v, grad = (torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(4))
    v.square_()
    more = torch.randn(n, d, generator=generator, dtype=dtype)
    first = torch.rand(n, generator=generator) < 0.5
    second = torch.rand(n, generator=generator) < 0.3
    if not listed:
        first[:] = True
    whole = torch.where(first[:, None], grad, 0) + torch.where(second[:, None], more, 0)
    settings = (True, 1e-2, 0.9, 0.999, 1e-8)
    step = torch.tensor(3.0)
    expected, found = [t.clone() for t in (w, m, v)], [t.clone() for t in (w, m, v)]
    torch.ops.clipsteer_cpp.adam_rows(*expected, step, whole, None, *settings)
    features = first.nonzero().flatten() if listed else None
    rows = second.nonzero().flatten()
    torch.ops.clipsteer_cpp.adam_rows(*found, step, grad[first], features, *settings, more[second], rows)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="ascending"):
        torch.ops.clipsteer_cpp.adam_rows(*found, step, grad[first], features, *settings, more[second], rows.flip(0))
    with pytest.raises(ValueError, match="together"):
        torch.ops.clipsteer_cpp.adam_rows(*found, step, grad[first], features, *settings, more[second])
