"""A run that ends no better than one answer for every input says so, whoever uses the loop."""

from __future__ import annotations

import math

import pytest
import torch

from _training import contrastive, sae, tuned
from clipsteer.reference.constant import share_of_constant
from clipsteer.reference.train import ContrastiveConfig
from clipsteer.training.collapse import constant_loss, say_if_constant
from clipsteer.training.world import World

SAE = {"lr": 0.03, "steps": 100}
TEXT = "that of one answer for every input"
# at rates that are far too high, and at one where it learns
LOST = {
    "finetune": (tuned("e2e"), {"lr": 10.0}, None),
    "finetune head": (tuned("lc"), {"lr": 1e3}, {"lr": 1e-3}),
    **{
        f"contrastive {loss}": (
            contrastive(loss),
            {"lr": 10.0, "select": None},
            {"lr": 3e-3, "epochs": 30, "select": None},
        )
        for loss in ("clip", "siglip", "global", "drrho", "distill")
    },
    "contrastive of a part": (contrastive("clip"), {"lr": 10.0}, None),
    # every feature is dead: a penalty that leaves nothing
    "sae": (
        sae("relu"),
        {"l1_coefficient": 1e4, "lr": 0.1, "steps": 40},
        {"lr": 0.01, "steps": 200, "l1_coefficient": 1e-4},
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_run_that_ends_no_better_than_a_constant_says_so_and_another_does_not(name, caplog):
    train, lost, kept = LOST[name]
    train(None, **lost)
    assert TEXT in caplog.text
    if kept is not None:
        caplog.clear()
        train(None, **kept)
        assert TEXT not in caplog.text


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_constant_is_the_least_that_any_has(smoothing):
    targets, classes = torch.tensor([0, 0, 0, 1, 2, 2]), 4
    logits = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([logits], 2.0, momentum=0.9)
    losses = []
    for _ in range(300):
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits.expand(6, -1), targets, label_smoothing=smoothing)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    assert constant_loss(targets.tolist(), classes, smoothing) == pytest.approx(min(losses), abs=2e-3)
    assert constant_loss([1, 1], 3) == 0


def test_few_lines_early_ones_better_ones_and_other_figures_are_passed_over(caplog):
    def lines(loss, steps):
        return [{"step": step, "loss": loss, "lr": 1.0} for step in steps]

    of_constant = {"loss": math.log(4)}
    say_if_constant("run", lines(math.log(4), [80, 100]), of_constant)
    say_if_constant("run", lines(math.log(4), [10, 20, 50]) + lines(1.3, [60, 80, 100]), of_constant)
    say_if_constant("run", lines(1.3, range(60, 101)), of_constant)
    say_if_constant("run", lines(math.log(4), range(60, 101)), {"fvu": 1.0})
    say_if_constant("run", lines(0.0, range(60, 101)), {"loss": 0.0})
    assert caplog.text == ""
    say_if_constant("run", lines(0.1, [10, 20, 50]) + lines(math.log(4), [60, 80, 100]), of_constant)
    assert "run: over the last 3 lines of the log the loss is 1.386 on average" in caplog.text


@pytest.mark.parametrize("loss", ["clip", "siglip", "global", "drrho", "distill"])
def test_the_ratio_is_one_of_constant_features_and_nothing_is_remembered_of_them(loss):
    B = 6
    config = ContrastiveConfig(loss=loss, batch_size=B, temperature=0.2, learnable_temperature=True)
    criterion = config.make_loss(B, World()).train()
    theirs = {"ref_image": torch.eye(B), "ref_text": torch.nn.functional.normalize(torch.eye(B) + 0.1, dim=1)}
    ids = torch.arange(B)
    given = {"ids": ids, **theirs} if config.remembers or loss == "distill" else {}
    theirs = theirs if loss in ("drrho", "distill") else dict.fromkeys(theirs)
    given |= theirs

    def ratio(image, text):
        value = criterion(image=image, text=text, **given)
        kept = {name: tensor.clone() for name, tensor in criterion.state_dict().items()}
        found = share_of_constant(criterion, value, image, theirs, B, config.resolved_rho, World())
        assert criterion.training
        for name, tensor in criterion.state_dict().items():
            assert torch.equal(tensor, kept[name])
        return found

    same = torch.nn.functional.normalize(torch.randn(1, 8), dim=1).expand(B, -1).contiguous()
    if loss == "siglip":
        with torch.no_grad():
            criterion.logit_bias.fill_(-math.log(B - 1) - 1 / 0.2)
    assert ratio(same, same) == pytest.approx(1, abs=1e-5)
    # any other bias is worse
    if loss == "siglip":
        with torch.no_grad():
            criterion.logit_bias.add_(0.5)
        assert ratio(same, same) > 1.01
    else:
        told = torch.nn.functional.pad(torch.eye(B), (0, 2))
        assert ratio(told, told) < 0.9
        assert ratio(told, -told) > 1.1


def test_a_batch_that_tells_nothing_has_no_ratio():
    config = ContrastiveConfig(loss="clip", batch_size=1)
    criterion = config.make_loss(1, World())
    one = torch.ones(1, 2) / 2**0.5
    theirs = {"ref_image": None, "ref_text": None}
    assert share_of_constant(criterion, criterion(one, one), one, theirs, 1, 0.0, World()) is None
