"""Where a learnt temperature settles under ρ, what says so, and ε as a setting."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from torch.nn.functional import normalize

from clipsteer import ops
from clipsteer.cli.main import main
from clipsteer.reference import trainer
from clipsteer.reference.config import ContrastiveConfig
from clipsteer.reference.drrho import DRRhoLoss
from clipsteer.training.settings import settings_of
from clipsteer.training.world import World

B = 256


def features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in 32 dimensions that lie near each other, among many that lie near too."""
    g = torch.Generator().manual_seed(seed)
    common, image, text = torch.randn(3, B, 32, generator=g)
    return normalize(common + image, dim=1), normalize(common + text, dim=1)


def divergence(image: torch.Tensor, text: torch.Tensor, tau: float) -> float:
    """mean KL(w ‖ uniform) of the rows and columns, in nats, from its definition."""
    s = image.double() @ text.double().T / tau
    found = []
    for side in (s, s.T):
        w = side.masked_fill(torch.eye(B, dtype=torch.bool), -math.inf).softmax(1)
        found.append((w * (w * B).clamp(min=1e-300).log()).sum(1).mean())
    return float(sum(found)) / 2


def settled(rho: float | None, steps: int = 400) -> float:
    """τ of FastCLIP's parameter after so many of AdamW's steps on fixed features, from 0.07."""
    image, text = features()
    loss = DRRhoLoss(B, temperature=0.07, learnable_temperature=True, rho=rho)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(image, text, torch.arange(B)).backward()
        optimizer.step()
        loss.settle_temperature_()
    return float(loss.temperature.detach())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("tau", [0.02, 0.07, 0.4])
def test_the_gradient_is_rho_less_the_divergence(tau, backend):
    image, text = (x.double() for x in features())
    rho = 1.7
    leaf = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    loss, _ = ops.drrho_loss(image, text, temperature=leaf, rho=rho, eps=0.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert float(grad) == pytest.approx(rho - divergence(image, text, tau), rel=1e-9)
    step = 1e-5
    ends = [ops.drrho_loss(image, text, temperature=tau + h, rho=rho, eps=0.0)[0] for h in (-step, step)]
    assert float(grad) == pytest.approx(float(ends[1] - ends[0]) / (2 * step), rel=1e-5)


def test_a_learnt_temperature_settles_where_the_divergence_is_rho():
    for rho in (0.5, 2.0, 3.5):
        tau = settled(rho)
        assert 0.01 < tau < 1
        assert divergence(*features(), tau) == pytest.approx(rho, abs=0.01)
    # by default as uneven as uniform weights over √B pairs
    assert divergence(*features(), settled(None)) == pytest.approx(math.log(B) / 2, abs=0.01)


@pytest.mark.parametrize(("rho", "end", "words"), [(0.0, 1.0, "rises to its most"), (6.0, 0.01, "falls to its least")])
def test_without_a_balance_it_goes_to_a_bound_and_the_module_says_so(rho, end, words):
    with pytest.warns(UserWarning, match=rf"τ {words}: ρ = {rho:g} has no balance in batches of 256") as told:
        assert settled(rho) == pytest.approx(end, rel=1e-5)
    assert len(told) == 1  # of 400 steps


@pytest.mark.parametrize("more", [{}, {"batch_size": 8}, {"select": 0.1}, {"rho": 5.5}])
def test_a_default_or_a_rho_within_the_bounds_says_nothing(more):
    settings = {"loss": "drrho", "learnable_temperature": True, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ContrastiveConfig(**settings)
        pairs = round(more.get("batch_size", B) * more.get("select", 1))
        assert config.make_loss(300, World("cpu")).rho == pytest.approx(more.get("rho", math.log(pairs) / 2))


def test_settings_warn_where_there_is_no_balance():
    learnt = {"loss": "global", "learnable_temperature": True}
    for more, words in (
        ({"rho": 0.0}, r"takes 0\.0039 < ρ < log B = 5\.55, such as 2\.77"),
        ({"rho": 5.6}, "falls to its least"),
        ({"rho": 6.5, "batch_size": 512}, "in batches of 512"),
        ({"rho": 3.0, "select": 0.05}, "in batches of 13"),
        ({"batch_size": 2}, "no ρ has one there"),
    ):
        with pytest.warns(UserWarning, match=words):
            ContrastiveConfig(**learnt, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fixed in ({"learnable_temperature": False}, {"loss": "clip"}):
            ContrastiveConfig(**{**learnt, **fixed, "rho": 0.0})
        fixed = ContrastiveConfig(loss="global")
    assert fixed.resolved_rho == 0.0


def test_eps_is_a_setting():
    image, text = features()
    losses = []
    for eps in (1e-14, 1e-4):
        loss = ContrastiveConfig(loss="global", eps=eps).make_loss(B, World("cpu"))
        losses.append(float(loss(image, text, torch.arange(B))))
        expected, _ = ops.drrho_loss(image, text, temperature=0.01, eps=eps)
        assert losses[-1] == pytest.approx(float(expected), rel=1e-6)
    assert losses[0] < losses[1]
    assert ContrastiveConfig(eps=0).eps == 0
    for bad in (-1e-6, math.nan, math.inf, 1e-40):
        with pytest.raises(ValueError, match="ContrastiveConfig: eps must be"):
            ContrastiveConfig(eps=bad)


def test_a_run_goes_on_under_its_own_eps_and_rho_alone(tmp_path, capsys):
    base = ["train", "--loss", "global", "--batch-size", "64", "--warmup-steps", "0", "--out", str(tmp_path)]
    command = [*base, "--samples", "64", "--checkpoint-every", "1", "--eps", "1e-4"]
    assert main(command) == 0
    capsys.readouterr()
    for other, names in ((["--eps", "1e-6"], "eps: 0.0001 there, 1e-06 asked for"), (["--rho", "1"], "rho: 0.0 there")):
        assert main([*command, *other]) == 2
        assert names in capsys.readouterr().err
    assert main(command) == 0


def test_a_run_from_before_eps_was_a_setting_goes_on(tmp_path, capsys, monkeypatch):
    def as_before(config):
        return {name: value for name, value in dataclasses.asdict(config).items() if name != "eps"}

    command = ["train", "--loss", "global", "--batch-size", "64", "--samples", "64", "--checkpoint-every", "1"]
    command += ["--out", str(tmp_path)]
    monkeypatch.setattr(trainer, "asdict", as_before)
    assert main(command) == 0
    monkeypatch.undo()
    assert main([*command, "--eps", "1e-4"]) == 2
    assert "eps: 1e-14 there, 0.0001 asked for" in capsys.readouterr().err
    assert main(command) == 0


def test_op_module_and_settings_say_which_way_rho_pushes():
    settings = settings_of(ContrastiveConfig)
    for text in (ops.drrho_loss.__doc__, settings["rho"].doc):
        assert "down" in text
        assert "up" not in text.split("pushes")[1].split(",")[0]
        assert "log B" in text
        assert "not carry over" in " ".join(text.split())
    for text in (ops.drrho_loss.__doc__, DRRhoLoss.__doc__, settings["eps"].doc):
        assert "1e-6" in text
        assert "1e-4" in text
    assert "do not clip" in settings["grad_clip"].doc
