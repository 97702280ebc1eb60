"""A run that ends no better than one answer for every input says so, whoever uses the loop."""

from __future__ import annotations

import math

import pytest
import torch

from _training import contrastive, sae, tuned
from clipsteer.training.collapse import constant_loss, say_if_constant

SAE = {"lr": 0.03, "steps": 100}
TEXT = "that of one answer for every input"
# at rates that are far too high, and at one where it learns
LOST = {
    "finetune": (tuned("e2e"), {"lr": 10.0}, None),
    "finetune head": (tuned("lc"), {"lr": 1e3}, {"lr": 1e-3}),
    "contrastive": (contrastive("clip"), {"lr": 10.0, "select": None}, None),
    "contrastive siglip": (contrastive("siglip"), {"lr": 10.0, "select": None}, None),
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
