"""Dead features that start anew (``clipsteer.sae.resampling``)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize as unit

from clipsteer import SAE, TrainConfig, train_sae
from clipsteer.sae import losses as sae_loss
from clipsteer.sae.resampling import resample
from clipsteer.sae.trainer import SAETrainer
from clipsteer.training.schedule import seed_of
from clipsteer.training.world import World

D, N, K, B = 12, 60, 4, 40


def batch(seed=0, rows=B, dtype=torch.float64):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trainer_of(architecture="topk", dead=(3, 7, 50), dtype=torch.float64, normalize="none", **settings):
    """Three steps of a run in which some features cannot fire, and start anew after the fourth."""
    torch.manual_seed(0)
    sae = SAE(D, N, architecture, K, dtype=dtype, normalize=normalize)
    sae.init_threshold_(batch(dtype=dtype), K)
    config = TrainConfig(
        **{"lr": 1e-2, "warmup_steps": 0, "sync_every": 4, "resample_after": 3 * B, "batch_size": B, **settings}
    )
    trainer = SAETrainer(sae, config, 100)
    with torch.no_grad():
        sae.encoder_bias[list(dead)] = -1e3
    for step in range(3):
        trainer.step(batch(step, dtype=dtype))
    return trainer


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu", "jumprelu", "gated"])
def test_dead_features_take_the_directions_of_what_is_left(architecture):
    dead = torch.tensor([3, 7, 50])
    trainer = trainer_of(architecture)
    sae = trainer.sae
    before = {name: value.clone() for name, value in sae.named_parameters()}
    assert set(dead.tolist()) <= set((trainer.tokens_since_fired == 3 * B).nonzero().flatten().tolist())
    trainer.tokens_since_fired.clamp_(max=2 * B)
    trainer.tokens_since_fired[dead] = 3 * B
    x = batch(3)
    # what the step sees, before its update
    left = (x - sae(x).x_hat).detach()
    trainer.step(x)
    along = sae.W_dec[dead].detach() @ unit(left, dim=1).T
    assert (along.amax(1) > 1 - 1e-9).all()
    assert len(set(along.argmax(1).tolist())) == 3
    torch.testing.assert_close(unit(sae.W_enc[dead], dim=1), sae.W_dec[dead])
    others = torch.ones(N, dtype=torch.bool)
    others[dead] = False
    for name, value in sae.named_parameters():
        assert value.isfinite().all()
        if name == "b_dec":
            continue
        state = trainer.optimizer.state[value]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not state[moment][dead].any(), name
            assert state[moment][others].any(), name
        if value.dim() == 1:
            torch.testing.assert_close(value[dead], value[others].mean().expand(3), msg=name)
        # the others took a step of Adam and nothing else
        assert (value[others] - before[name][others]).abs().max() < 0.05
    assert not trainer.tokens_since_fired[dead].any()


@pytest.mark.parametrize("kind", ["none", "layer_norm", "loud"])
def test_how_loud_a_feature_starts(kind):
    trainer = trainer_of(normalize=kind if kind != "loud" else "none")
    sae, x, dead = trainer.sae, batch(3), torch.tensor([3, 7, 50])
    out = sae_loss.forward(sae, x, World("cpu"))
    if kind == "loud":
        # beside others that are quiet
        out = out._replace(acts=out.acts / 20)
    mean = sae.W_enc.norm(dim=1)[torch.isin(torch.arange(N), dead, invert=True)].mean()
    assert resample(sae, trainer.optimizer, dead, x, out, trainer.plan, 0).tolist() == [3, 7, 50]
    lengths = sae.W_enc[dead].norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(3))
    own = (unit(x - out.x_hat, dim=1) @ sae.W_dec[dead].T).argmax(0)
    pre = (sae._centred(x)[0] @ sae.W_enc.T + sae.b_enc)[own, dead].mean()
    loudest = 3 * out.acts[out.acts > 0].mean()
    if kind == "loud":
        assert lengths[0] < 0.9 * mean
        torch.testing.assert_close(pre, loudest)
    else:
        torch.testing.assert_close(lengths[0], mean)
        assert pre < loudest


def test_no_two_start_alike_and_those_beyond_the_rows_wait():
    dead = list(range(50))
    trainer = trainer_of(dead=dead)
    trainer.step(batch(3))
    sae = trainer.sae
    anew = (sae.encoder_bias > -100).nonzero().flatten().tolist()
    assert anew == [*range(B), *range(50, N)]
    cosines = (sae.W_dec[:B] @ sae.W_dec[:B].T).fill_diagonal_(0)
    assert cosines.max() < 1 - 1e-6


def test_none_starts_where_all_are_dead_or_nothing_is_left():
    trainer = trainer_of(dead=range(N))
    trainer.step(batch(3))
    assert (trainer.sae.encoder_bias < -100).all()
    trainer = trainer_of()
    x = batch(3)
    out = trainer.sae(x)
    dead = torch.tensor([3, 7, 50])
    exact = sae_loss.TrainingOutput(x, out.acts, out.indices, out.stats, (out.acts, out.indices), None, x[None])
    assert resample(trainer.sae, trainer.optimizer, dead, x, exact, trainer.plan, 0).tolist() == []
    assert (trainer.sae.encoder_bias[dead] < -100).all()


def test_when_features_start_anew():
    config = TrainConfig(resample_after=5, sync_every=10)

    def births(config, wait, total=100):
        found = {}
        for step in range(total + 1):
            found.setdefault(config.births_at(step, total, wait), []).append(step)
        return found

    at = births(config, 5)
    assert (at["at once"], at["asleep"], at["wake"]) == ([*range(10, 71, 10)], [*range(75, 80)], [80])
    # a tenth of the run at most
    assert births(config, 50)["asleep"] == [*range(70, 80)]
    # too short to wait
    assert births(TrainConfig(resample_after=5, sync_every=2), 50, 9).keys() == {None, "at once"}
    assert births(TrainConfig(resample_after=0), 5).keys() == {None}
    for architecture, share in (("topk", 20), ("batch_topk", 20), ("relu", 0), ("jumprelu", 0), ("gated", 0)):
        fitted = TrainConfig(architecture=architecture, batch_size=256).fitted(400)
        assert fitted.resample_after == share * 256
        assert (fitted.encoder_scale, fitted.grad_clip) == ((0.25, 0.003) if share else (1.0, 1.0))
    assert TrainConfig(batch_size=4096).fitted(3_999).resample_after == 199 * 4096
    assert TrainConfig(batch_size=4096).fitted(4_000).resample_after == 0
    # a short run, and one of many features
    assert TrainConfig(batch_size=256).fitted(40).resample_after == 10 * 256
    assert TrainConfig(batch_size=32, k=8).fitted(400, 12_288).resample_after == 10 * 12_288 // 8
    assert TrainConfig(dead_after=99).fitted(400).resample_after == 99
    assert TrainConfig(matryoshka=(8, 16)).fitted(400).resample_after == 0
    off = TrainConfig(resample_after=0).fitted(400)
    assert (off.encoder_scale, off.grad_clip) == (1.0, 1.0)
    own = TrainConfig(encoder_scale=0.5, grad_clip=None, resample_after=7).fitted(400)
    assert (own.encoder_scale, own.grad_clip, own.resample_after) == (0.5, None, 7)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu", "jumprelu", "gated"])
def test_the_last_ones_sleep_until_all_have_a_row(architecture):
    """In the last steps before none starts any more; then all are there at once."""
    dead = torch.arange(2 * B)
    torch.manual_seed(0)
    sae = SAE(D, 3 * B, architecture, K, dtype=torch.float64)
    sae.init_threshold_(batch(), K)
    config = TrainConfig(lr=1e-2, warmup_steps=0, sync_every=100, resample_after=5 * B, batch_size=B)
    trainer = SAETrainer(sae, config, 50)
    with torch.no_grad():
        sae.encoder_bias[dead] = -1e3
    for step in range(37):
        trainer.step(batch(step))
    trainer.tokens_since_fired.clamp_(max=B)
    trainer.tokens_since_fired[dead] = 10 * B
    lefts = []
    # as many as there are rows, and the last ones
    for step, asleep in ((37, B), (38, 2 * B)):
        x = batch(step)
        lefts.append((x - sae(x).x_hat).detach())
        bias = sae.encoder_bias[dead[asleep:]].clone()
        trainer.step(x)
        assert trainer.asleep.nonzero().flatten().tolist() == dead[:asleep].tolist()
        fired = sae_loss.fired(sae, sae_loss.forward(sae, x, World("cpu")), World("cpu"))
        assert fired.any()
        assert not fired[dead[:asleep]].any()
        torch.testing.assert_close(sae.encoder_bias[dead[asleep:]], bias)
    directions = [sae.W_dec[dead[part]].detach() for part in (slice(B), slice(B, None))]
    for direction, left in zip(directions, lefts):
        assert ((direction @ unit(left, dim=1).T).amax(1) > 1 - 1e-9).all()
    trainer.step(batch(39))
    assert not trainer.asleep.any()
    assert not trainer.tokens_since_fired[dead].any()
    bias = sae.encoder_bias.detach()
    torch.testing.assert_close(bias[dead], bias[2 * B :].mean().expand(2 * B))
    torch.testing.assert_close(sae.W_dec[dead].detach(), torch.cat(directions))
    # and they are no longer written to
    trainer.step(batch(40))
    assert (sae.encoder_bias[dead] > -100).all()


# the second one while features are asleep
@pytest.mark.parametrize("last", [23, 31])
def test_a_run_goes_on_bit_for_bit(tmp_path, last):
    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == last:
            raise Stop

    x = batch(rows=320, dtype=torch.float32)
    settings = {"d_sae": 240, "k": 2, "batch_size": 32, "steps": 40, "checkpoint_every": 5, "log_every": 1}
    settings |= {"sync_every": 3, "resample_after": 96}
    whole = train_sae(x, **settings)
    with pytest.raises(Stop):
        train_sae(x, **settings, out=tmp_path, on_log=stop)
    if last == 31:
        state = load_file(sorted((tmp_path / "checkpoints").glob("*.safetensors"))[-1])
        assert bool((state["dead"] == 2).any())
    resumed = train_sae(x, **settings, out=tmp_path)
    without = train_sae(x, **{**settings, "resample_after": 0}, encoder_scale=0.25, grad_clip=0.003)
    assert not torch.equal(without.W_dec, whole.W_dec)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_transcoder_has_none():
    x, y = batch(rows=64), batch(1, rows=64)[:, :5]
    with pytest.raises(ValueError, match="resample_after is not for a transcoder"):
        train_sae(x, d_sae=20, k=2, batch_size=32, target=y, resample_after=9)
    with pytest.raises(ValueError, match="resample_after is not for a transcoder"):
        SAETrainer(SAE(D, 20, "topk", 2, d_out=5), TrainConfig(resample_after=9), 10)
    sae = train_sae(x, d_sae=20, k=2, batch_size=32, target=y)
    assert sae.metadata["training"]["resample_after"] == 0


def test_draws_differ_from_step_to_step_and_seed_to_seed():
    seeds = {seed_of(seed, "resample", step) for seed in range(3) for step in range(3)}
    assert len(seeds) == 9
