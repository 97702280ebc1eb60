"""A network that has collapsed says so: predictions, features, and what is not finite."""

from __future__ import annotations

import logging

import pytest
import torch

from _tiny import CLASSES, TASKS, encoder, scenario
from clipsteer.continual import Encoder, emoji_scenario, heads
from clipsteer.continual.collapse import coincide, separation, taken_by_one
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.strategies import strategy
from clipsteer.continual.task import TaskRun

QUICK = {"first_epochs": 3, "epochs": 2, "batch_size": 8, "rank": 4, "align_samples": 16, "projections": 64}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "collapsed" in r.getMessage()]


def learned(spec: str, lr: float, tasks: int = 2) -> ClassIncrementalLearner:
    where = scenario()
    learner = ClassIncrementalLearner(encoder(), strategy(spec, lr=lr, **QUICK), CLASSES)
    for t in range(tasks):
        learner.fit_task(where.train.subset(where.rows("train", t)), TASKS[t])
    return learner


@pytest.mark.parametrize("spec", ["finetune", "macil", "finetune:softmax=seen", "slca:slow=0.2"])
def test_at_a_hundred_times_the_rate_a_class_takes_nearly_all_and_the_run_says_which(spec, caplog):
    learner = learned(spec, 0.3)
    told = said(caplog)[-1]
    assert "task=2" in told
    assert "of the 32 images it learned from" in told
    where = scenario()
    part = where.train.subset(where.rows("train", 1))
    (winner,) = learner.predict(part).mode().values.unique().tolist()
    assert f"class {winner} takes " in told


def test_features_that_training_made_worse_are_spoken_of_where_predictions_are_not(caplog):
    learned("sdc", 0.3, 1)
    (told,) = said(caplog)
    assert "takes" not in told
    assert "lie closer together than before they were learned" in told


@pytest.mark.parametrize("spec", ["finetune", "macil", "slca", "sdc", "ranpac"])
def test_nothing_is_said_of_a_network_that_learns(spec, caplog):
    learned(spec, 0.003, 3)
    assert said(caplog) == []


@pytest.mark.parametrize(("factor", "collapses"), [(1, False), (100, True)])
def test_the_bundled_drawings_at_the_rate_of_the_command_and_at_a_hundred_times_it(factor, collapses, caplog):
    from clipsteer.cli.cil_settings import EMOJI_RATES

    where = emoji_scenario(20, 1993, ["noto"])
    config = strategy("slca", lr=EMOJI_RATES["slca"] * factor, first_epochs=2, batch_size=16)
    learner = ClassIncrementalLearner(Encoder.open("emojiclip")[0], config, len(where.classes))
    learner.fit_task(where.train.subset(where.rows("train", 0)), where.tasks[0])
    assert bool(said(caplog)) == collapses


def test_one_class_that_takes_all_is_told_from_one_that_is_most_of_the_images():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert taken_by_one(labels, labels) is None
    assert taken_by_one(torch.zeros(100, dtype=torch.int64), labels) == (0, 1.0)
    nine = torch.tensor([0] * 99 + [1])
    assert taken_by_one(nine, labels) == (0, 0.9)
    assert taken_by_one(torch.tensor([0] * 98 + [1] * 2), labels) is None
    # a task of one class, whose images are taken for another's
    assert taken_by_one(torch.full((20,), 3), torch.full((20,), 5)) == (3, 1.0)
    # of a handful of images anything may be said
    assert taken_by_one(labels[:9] * 0, labels[-9:]) is None


def test_features_of_classes_coincide_where_they_are_one_point_or_no_nearer_within_a_class():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 8, generator=generator)
    labels = torch.arange(60) % 3
    apart = noise + 3 * torch.eye(8)[labels]
    for scale in (1e-6, 1.0, 1e6):
        assert coincide(scale * apart, labels) is None
    assert "of their size" in coincide(torch.ones(60, 8), labels)
    assert "of their size" in coincide(100 + 1e-3 * apart, labels)
    # means that are exactly equal, and images that are not
    balanced = torch.cat([noise[:20], noise[:20], noise[:20]])
    assert separation(balanced, torch.arange(60) // 20) == pytest.approx(0, abs=1e-12)
    assert "as far from each other" in coincide(balanced, torch.arange(60) // 20)
    assert coincide(balanced, torch.zeros(60, dtype=torch.int64)) is None
    assert coincide(noise[:3] * 0, labels[:3]) is None
    # what the network before told apart
    found = separation(apart, labels)
    assert coincide(apart, labels, 1.9 * found) is None
    assert f"F = {found:.3g} after" in coincide(apart, labels, 2.1 * found)


def test_separation_is_the_f_ratio_over_all_dimensions_and_of_random_labels_one():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 200, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (5000,), generator=generator)
    # of 3 · 200 degrees of freedom: a deviation of √(2/600)
    assert separation(x, labels) == pytest.approx(1, abs=5 * (2 / 600) ** 0.5)
    assert separation(100 * x + 7, labels) == pytest.approx(separation(x, labels), rel=1e-9)
    groups = [x[labels == c] + c for c in range(4)]
    joined = torch.cat(groups)
    between = sum(len(g) * float((g.mean(0) - joined.mean(0)).square().sum()) for g in groups) / 3
    within = sum(float((g - g.mean(0)).square().sum()) for g in groups) / (5000 - 4)
    of = torch.cat([torch.full((len(g),), c) for c, g in enumerate(groups)])
    assert separation(joined, of) == pytest.approx(between / within, rel=1e-9)
    assert separation(joined[:1], of[:1]) != separation(joined[:1], of[:1])  # NaN
    assert separation(torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0, 0, 1])) == float("inf")


def test_features_that_are_not_finite_end_the_run_and_say_how_many(monkeypatch):
    where = scenario()
    learner = ClassIncrementalLearner(encoder(), strategy("finetune", lr=0.003, **QUICK), CLASSES)

    def broken(self):
        with torch.no_grad():
            next(self.encoder.module.parameters()).fill_(torch.nan)

    monkeypatch.setattr(TaskRun, "train", broken)
    with pytest.raises(RuntimeError, match="finetune: the features of 32 of 32 images are not finite after 1 tasks"):
        learner.fit_task(where.train.subset(where.rows("train", 0)), TASKS[0])


def test_an_alignment_whose_loss_is_not_finite_says_so(monkeypatch):
    monkeypatch.setattr(heads, "normalized_logits", lambda logits, *_: logits * torch.nan)
    with pytest.raises(RuntimeError, match="align: the loss is nan in epoch 1; lower align_lr"):
        learned("macil", 0.003)


def test_the_last_step_is_held_to_be_finite_without_a_folder_too(monkeypatch):
    plain = TaskRun.train_step

    def last(self, batch):
        values = plain(self, batch)
        if self.step == self.total - 1:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(torch.inf)
        return values

    monkeypatch.setattr(TaskRun, "train_step", last)
    with pytest.raises(RuntimeError, match="the weights are not finite at step 12"):
        learned("finetune", 0.003, 1)
