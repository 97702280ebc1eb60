"""Settings of SAE training that fit the length of the run, and runs of versions that had others."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from clipsteer import TrainConfig, train_sae
from clipsteer.io.checkpoint import latest_meta, load_latest


def rows():
    return torch.randn(320, 6, generator=torch.Generator().manual_seed(0))


def test_learning_rate_and_warm_up_fit_the_length_of_the_run():
    fitted = {total: TrainConfig().fitted(total) for total in (100, 400, 2_000, 40_000, 10**6)}
    peaks = [config.lr for config in fitted.values()]
    assert peaks == pytest.approx([2e-3, 2e-3, 2e-4 * 20**0.5, 2e-4, 2e-4])
    assert [config.warmup_steps for config in fitted.values()] == [5, 20, 100, 200, 200]
    assert TrainConfig(architecture="relu").fitted(40_000).lr == 4e-4
    for architecture in ("jumprelu", "gated"):
        config = TrainConfig(architecture=architecture).fitted(100)
        assert (config.lr, config.schedule) == (2e-4, "cosine")
    for total, config in fitted.items():
        assert config.fitted(total) is config
        assert config.lr_at(total - 1, total) == pytest.approx(config.lr / (total - config.warmup_steps))
        assert TrainConfig().lr_at(0, total) == config.lr_at(0, total) == config.lr / config.warmup_steps
    given = TrainConfig(lr=1e-3, warmup_steps=7).fitted(2_000)
    assert (given.lr, given.warmup_steps, given.schedule) == (1e-3, 7, "linear")


def test_cosine_is_another_name_of_a_schedule():
    assert TrainConfig(cosine=True).fitted(100).schedule == "cosine"
    assert TrainConfig(cosine=False).fitted(100).schedule == "constant"
    with pytest.raises(ValueError, match="give schedule or cosine, not both, got linear and False"):
        TrainConfig(schedule="linear", cosine=False)


def test_the_encoder_starts_at_the_length_that_was_asked_for():
    # no step that moves it
    whole, half = (
        train_sae(rows(), d_sae=10, k=2, batch_size=32, steps=1, lr=0.0, encoder_scale=s) for s in (1.0, 0.5)
    )
    torch.testing.assert_close(half.W_enc, 0.5 * whole.W_enc)
    assert torch.equal(half.W_dec, whole.W_dec)


def test_what_was_chosen_is_said_and_kept(caplog):
    with caplog.at_level(logging.INFO, "clipsteer"):
        sae = train_sae(rows(), d_sae=10, k=2, batch_size=32, steps=40)
    assert "peak learning rate 0.002, linear, 2 of 40 steps of warm-up" in caplog.text
    kept = sae.metadata["training"]
    assert (kept["lr"], kept["warmup_steps"], kept["schedule"]) == (2e-3, 2, "linear")


# what versions had, and what of it their runs say
EARLIER = {"then": ("resample_after", "schedule", "encoder_scale"), "later": ("resample_after",)}


@pytest.mark.parametrize(
    ("version", "given"),
    [
        ("then", {}),
        ("then", {"lr": 1e-3}),
        ("then", {"cosine": False}),
        ("later", {}),
        ("later", {"schedule": "cosine"}),
    ],
)
def test_a_run_of_an_earlier_version_goes_on_as_it_began(tmp_path, version, given):
    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise Stop

    x = rows()
    sizes = {"d_sae": 10, "k": 2, "batch_size": 32, "steps": 9, "checkpoint_every": 5, "log_every": 1}
    then = dict(given)
    if version == "then":
        then = {"cosine": True, "lr": 2e-4, **given, "warmup_steps": 200}
    then |= {"resample_after": 0, "encoder_scale": 1.0, "grad_clip": 1.0}
    whole = train_sae(x, **sizes, **then)
    with pytest.raises(Stop):
        train_sae(x, **sizes, **then, out=tmp_path, on_log=stop)
    # as it was written then
    found = load_latest(tmp_path / "checkpoints")
    index = json.loads(found.meta_path.read_text())
    del index["checksum"]
    settings = index["meta"]["settings"]
    for name in EARLIER[version]:
        del settings[name]
    if version == "then":
        settings |= {"cosine": then["cosine"], "lr": given.get("lr")}
    found.meta_path.write_text(json.dumps(index))
    assert "resample_after" not in latest_meta(tmp_path / "checkpoints")["settings"]
    other = {"resample_after": 14} if version == "later" else {"lr": 3e-3} if given else {"schedule": "linear"}
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_sae(x, **sizes, **{**given, **other}, out=tmp_path)
    resumed = train_sae(x, **sizes, **given, out=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_where_none_starts_anew_features_are_dead_after_a_part_of_the_run():
    def after(total, features=None, **given):
        return (
            TrainConfig(**{"batch_size": 256, "k": 8, "resample_after": 0, **given}).fitted(total, features).dead_after
        )

    assert after(400) == 40 * 256
    assert after(60) == 10 * 256  # steps between two looks
    assert after(400, 12_288) == 10 * 12_288 // 8
    assert after(10**6) == 10**7
    assert after(400, dead_after=77) == 77
    assert after(400, matryoshka=(8, 16), resample_after=None) == 40 * 256
    assert after(400, architecture="gated", resample_after=None) == 40 * 256
    # of longer runs features do not start anew by default, and of a transcoder never
    assert after(4_000, resample_after=None) == 400 * 256
    assert TrainConfig(batch_size=256).for_transcoder().fitted(400).dead_after == 40 * 256
    # rebirth comes first
    assert after(400, resample_after=None) == 10**7
    assert after(400, resample_after=99) == 10**7


def few():
    """Rows of which most features know nothing."""
    return rows()[:8].repeat(40, 1)


SHORT = {"d_sae": 40, "k": 2, "batch_size": 32, "steps": 40, "sync_every": 1, "log_every": 1, "checkpoint_every": 20}


@pytest.mark.parametrize("given", [{"resample_after": 0}, {"matryoshka": (10, 40), "d_sae": None}])
def test_auxk_acts_in_short_runs_without_rebirth(given):
    lines = []
    train_sae(few(), **{**SHORT, **given}, on_log=lines.append)
    assert max(line["auxk"] for line in lines) > 0
    assert max(line["dead"] for line in lines) > 0
    lines.clear()
    train_sae(few(), **{**SHORT, **given}, dead_after=10**7, on_log=lines.append)
    assert max(line["auxk"] for line in lines) == 0


def test_a_run_of_a_version_that_waited_longer_goes_on_as_it_began(tmp_path):
    given = {**SHORT, "resample_after": 0}

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 22:
            raise Stop

    whole = train_sae(few(), **given, dead_after=10**7)
    with pytest.raises(Stop):
        train_sae(few(), **given, dead_after=10**7, out=tmp_path, on_log=stop)
    assert latest_meta(tmp_path / "checkpoints")["settings"]["dead_after"] == 10**7
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_sae(few(), **given, dead_after=99, out=tmp_path)
    resumed = train_sae(few(), **given, out=tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    # and one of this version as it began
    now = train_sae(few(), **given)
    with pytest.raises(Stop):
        train_sae(few(), **given, out=tmp_path / "now", on_log=stop)
    again = train_sae(few(), **given, out=tmp_path / "now")
    assert torch.equal(now.W_enc, again.W_enc)
    assert not torch.equal(now.W_enc, whole.W_enc)
