"""LDC's map against drifts that are known, and what a run says of prototypes that were left behind."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from _tiny import CLASSES, TASKS, encoder, scenario
from clipsteer import FileFormatError, ops
from clipsteer.cli.cil_settings import EMOJI_RATES
from clipsteer.continual import learned_drift
from clipsteer.continual.drift import follow_errors
from clipsteer.continual.learner import ClassIncrementalLearner
from clipsteer.continual.strategies import STRATEGIES, strategy
from clipsteer.io import checkpoint

QUICK = {"first_epochs": 3, "epochs": 2, "batch_size": 8, "rank": 4, "align_samples": 16}


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_affine_drift_is_recovered_for_prototypes_anywhere():
    old, prototypes = rows(200, 8) * torch.logspace(0, -1, 8) + 3, 5 * rows(7, 8, 1)
    A, b = torch.eye(8) + rows(8, 8, 2) / 2, rows(1, 8, 3)
    moved = learned_drift(old, old @ A.T.double() + b, prototypes)
    # the smallest ridge, 1e-9 of the mean variance, leaves that over the least variance, 1e-2 of the largest
    torch.testing.assert_close(moved, prototypes @ A.T.double() + b, rtol=1e-5, atol=1e-5)
    # what neighbours alone say is wrong there
    assert (ops.semantic_drift(old, old @ A.T.double() + b, prototypes, "median") - moved).norm() > 1


def test_nothing_moves_where_nothing_moved_and_all_by_the_mean_where_rows_say_no_more():
    prototypes = rows(5, 6, 1)
    assert torch.allclose(learned_drift(rows(40, 6), rows(40, 6), prototypes), prototypes, rtol=0, atol=1e-13)
    shift = torch.arange(6.0, dtype=torch.float64)
    one = rows(1, 6, 2)
    torch.testing.assert_close(learned_drift(one, one + shift, prototypes), prototypes + shift)
    many = rows(50, 6, 3)
    torch.testing.assert_close(learned_drift(many, many + shift, prototypes), prototypes + shift)
    assert torch.equal(learned_drift(one[:0], one[:0], prototypes), prototypes)


def test_fewer_rows_than_features_move_prototypes_where_the_rows_are():
    old = torch.cat([rows(20, 4), torch.zeros(20, 28, dtype=torch.float64)], 1)
    A = torch.eye(32, dtype=torch.float64)
    A[:4, :4] += rows(4, 4, 2) / 2
    inside, outside = torch.zeros(2, 1, 32, dtype=torch.float64)
    inside[0, :4], outside[0, 4:] = 1.0, 1.0
    moved = learned_drift(old, old @ A.T, torch.cat([inside, inside + outside]))
    torch.testing.assert_close(moved[:1], inside @ A.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved[1:], inside @ A.T + outside, rtol=1e-6, atol=1e-6)


def test_noise_is_not_taken_for_a_map():
    """With as many features as rows an unridged map would send prototypes anywhere; left-out rows tell."""
    old, prototypes = rows(40, 40), rows(10, 40, 1)
    new = old + 0.5 * rows(40, 40, 2)
    error = (learned_drift(old, new, prototypes) - prototypes).norm(dim=1)
    # the mean of 40 movements of norm 0.5·√40 is 0.5 long; a map fitted to noise alone moves by 3
    assert float(error.max()) < 1.0


def test_bad_arguments_are_refused_and_dtypes_kept():
    x = rows(6, 4).float()
    assert learned_drift(x, 2 * x, x[:2]).dtype == torch.float32
    with pytest.raises(ValueError, match="learned_drift"):
        learned_drift(x, x[:3], x)
    with pytest.raises(TypeError, match="learned_drift"):
        learned_drift(x, x, x.long())


def test_the_strategy_maps_its_means_through_the_networks_around_the_task():
    where = scenario()
    learner = ClassIncrementalLearner(encoder(), strategy("ldc", lr=0.003, **QUICK), CLASSES)
    parts = [where.train.subset(where.rows("train", t)) for t in range(2)]
    learner.fit_task(parts[0], TASKS[0])
    old, means = learner.features(parts[1]), learner.means.clone()
    learner.fit_task(parts[1], TASKS[1])
    unit = torch.nn.functional.normalize
    new = learner.features(parts[1])
    expected = learned_drift(unit(old, dim=-1).double(), unit(new, dim=-1).double(), means)
    assert torch.equal(learner.means[:2], expected)
    assert not torch.equal(expected, means)
    assert STRATEGIES["ldc"] == {"classifier": "ncm", "compensation": "ldc"}
    assert "ldc" in EMOJI_RATES


def test_what_follows_is_measured_on_each_class_from_the_others():
    old, labels, shift = rows(60, 5), torch.arange(60) % 3, torch.full((5,), 2.0, dtype=torch.float64)
    still = lambda a, b, means: means
    torch.testing.assert_close(
        follow_errors(old, old + shift, labels, still), torch.full((3,), 20**0.5, dtype=torch.float64)
    )
    assert float(follow_errors(old, old + shift, labels, learned_drift).max()) < 1e-6
    # a class that moves alone: the others know nothing of it
    alone = old + shift * (labels == 1).unsqueeze(1)
    assert float(follow_errors(old, alone, labels, learned_drift)[1]) == pytest.approx(20**0.5, rel=0.05)
    # one class is measured on its halves, and one image on what moved it
    assert float(follow_errors(old, old + shift, labels * 0, learned_drift).max()) < 1e-6
    assert float(follow_errors(old[:1], old[:1] + shift, labels[:1], learned_drift)) == pytest.approx(20**0.5)


def _learned(caplog: pytest.LogCaptureFixture, spec: str, lr: float, out=None) -> list[list[logging.LogRecord]]:
    """What was said of drift after each task, held to the true one where there is something."""
    where = scenario()
    learner = ClassIncrementalLearner(encoder(), strategy(spec, lr=lr, **QUICK), CLASSES, out=out)
    said = []
    for t, classes in enumerate(TASKS):
        caplog.clear()
        learner.fit_task(where.train.subset(where.rows("train", t)), classes)
        said.append([r for r in caplog.records if "prototypes of the" in r.getMessage()])
        if said[-1]:
            earlier = where.train.subset(where.rows("train", *range(t)))
            truth = learner.drift_errors(earlier)["compensated"] * learner.means[: 2 * t].norm(dim=1)
            told = said[-1][0].args[3]
            assert told / 4 < float(truth.mean()) < told * 4
    return said


@pytest.mark.parametrize("spec", ["slca:slow=0.2", "macil:compensation=none", "sdc:compensation=none"])
def test_a_run_whose_prototypes_are_left_behind_says_so_once_a_task_with_figures(spec, caplog):
    first, second, third = _learned(caplog, spec, 0.3)
    assert (len(first), len(second)) == (0, 1)
    assert len(third) <= 1
    message = second[0].getMessage()
    assert "task=2" in message
    assert "2 earlier classes" in message
    assert "times their distance to the nearest other prototype" in message


@pytest.mark.parametrize("spec", ["slca", "macil", "sdc", "ldc"])
def test_prototypes_that_stay_near_are_not_spoken_of(spec, caplog):
    assert _learned(caplog, spec, 1e-4) == [[], [], []]


def test_strategies_that_read_nothing_from_means_are_not_warned_of(caplog):
    assert _learned(caplog, "finetune", 0.3) == [[], [], []]


def test_patches_that_are_frozen_stay_and_all_else_of_a_whole_tower_learns():
    where = scenario()
    config = strategy("slca:freeze_patches=1,slow=0.3", lr=0.003, **QUICK)
    learner = ClassIncrementalLearner(encoder(), config, CLASSES)
    learner.fit_task(where.train.subset(where.rows("train", 0)), TASKS[0])
    start = dict(encoder().named_parameters())
    same = {name for name, value in learner.encoder.named_parameters() if torch.equal(value, start[name])}
    assert {name for name in same if "conv1" in name} == same != set()
    # a run of before the setting is of the same settings as one without it
    assert "freeze_patches" not in strategy("slca").outcome()
    assert config.outcome()["freeze_patches"] is True
    with pytest.raises(ValueError, match="freeze_patches needs train 'full'"):
        strategy("macil:freeze_patches=1")


def test_what_was_lost_in_earlier_tasks_is_kept_with_the_run(tmp_path, monkeypatch):
    where = scenario()
    parts = [where.train.subset(where.rows("train", t)) for t in range(2)]
    make = lambda: ClassIncrementalLearner(encoder(), strategy("sdc", lr=0.003, **QUICK), CLASSES, out=tmp_path)
    first = make()
    for t in range(2):
        first.fit_task(parts[t], TASKS[t])
    again = make()
    again.resume()
    assert len(first.off) == 1
    assert again.off == first.off
    (path,) = (tmp_path / "tasks").rglob("*2*.json")
    meta = json.loads(path.read_text())
    assert any(value == first.off for value in (meta.get("off"), meta.get("meta", {}).get("off")))
    # a version that noted nothing: of its tasks nothing is known, and what goes on from it resumes as well
    with monkeypatch.context() as patch:
        real = checkpoint.save_state
        drop = lambda *given: real(*given[:-1], {k: v for k, v in given[-1].items() if k != "off"})
        patch.setattr(checkpoint, "save_state", drop)
        first.save()
    for _ in range(2):
        older = make()
        older.resume()
        assert older.off == [0.0]
        older.save()


def test_an_estimate_that_no_run_can_have_saved_is_refused(tmp_path, monkeypatch):
    where = scenario()
    part = where.train.subset(where.rows("train", 0))
    make = lambda: ClassIncrementalLearner(encoder(), strategy("sdc", lr=0.003, **QUICK), CLASSES, out=tmp_path)
    learner = make()
    learner.fit_task(part, TASKS[0])
    learner.off = [-1.0]
    learner.save()
    with pytest.raises(FileFormatError, match="'off' must be"):
        make().resume()
