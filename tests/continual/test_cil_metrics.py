"""The figures of class-incremental runs, against examples worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipsteer import FileFormatError
from clipsteer.continual.metrics import METRICS, Run, by_strategy, paired, summarize
from clipsteer.io.files import read_json, write_json
from clipsteer.report.intervals import mean_interval, student_quantile

TASKS = [[4, 0], [2], [1, 3]]
# two test rows of 4, one of 0, three of 2, four of 1, none of 3
TARGETS = torch.tensor([4, 4, 0, 2, 2, 2, 1, 1, 1, 1])


def finished(strategy: str = "s", seed: int = 0) -> Run:
    run = Run(strategy, seed, TASKS, {"epochs": 3})
    run.add(0, torch.tensor([4, 0, 0]), TARGETS[:3], seconds=2.0, peak_mb=10.0)
    # rows in another order than above
    run.add(1, torch.tensor([2, 2, 4, 2, 4, 2]), torch.tensor([2, 2, 2, 0, 4, 4]), 1.5, 30.0,
            {"compensated": torch.tensor([0.25, 0.5]), "uncompensated": torch.tensor([0.5, 1.5])})  # fmt: skip
    last = {"compensated": torch.tensor([0.0, 0.5, 0.25]), "cosine_compensated": torch.tensor([1.0, 0.5, 0.0])}
    run.add(2, torch.tensor([4, 4, 1, 3, 2, 1, 1, 1, 2, 3]), TARGETS, 0.5, None, last)
    return run


def test_every_figure_by_hand():
    run = finished()
    nan = math.nan
    expected = torch.tensor([[2 / 3, nan, nan], [1 / 3, 2 / 3, nan], [2 / 3, 1 / 3, 1 / 2]], dtype=torch.float64)
    torch.testing.assert_close(run.matrix, expected, rtol=0, atol=0, equal_nan=True)
    assert run.seen.tolist() == [2 / 3, 3 / 6, 5 / 10]
    assert run.A_last == 0.5
    assert run.A_avg == pytest.approx((2 / 3 + 0.5 + 0.5) / 3, abs=1e-15)
    # task 0: best before the last 2/3, last 2/3; task 1: 2/3 and 1/3
    assert run.forgetting == pytest.approx((0 + 1 / 3) / 2, abs=1e-15)
    # classes 4, 0, 2, 1 have 2/2, 0/1, 1/3, 2/4; class 3 has no row
    assert run.balanced == pytest.approx((1 + 0 + 1 / 3 + 1 / 2) / 4, abs=1e-15)
    assert list(run.drift_error) == ["compensated", "uncompensated", "cosine_compensated", "cosine_uncompensated"]
    drift = torch.tensor([[nan, 0.375, 0.25], [nan, 1.0, nan], [nan, nan, 0.5], [nan] * 3], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(list(run.drift_error.values())), drift, rtol=0, atol=0, equal_nan=True)
    assert run.value("drift_compensated") == (0.375 + 0.25) / 2
    assert run.value("drift_uncompensated") == 1.0
    assert (run.value("seconds"), run.value("peak_mb")) == (4.0, 30.0)
    with pytest.raises(ValueError, match="metric must be one of"):
        run.value("luck")


def test_later_tasks_may_help():
    run = Run("s", 0, [[0], [1]])
    run.add(0, torch.tensor([0]), torch.tensor([0]), 1.0)
    run.records[0].correct = [0]  # wrong at first, right after the second task
    run.add(1, torch.tensor([0, 1]), torch.tensor([0, 1]), 1.0)
    assert run.forgetting == -1


def test_a_run_that_is_not_whole():
    joint = Run("joint", 0, TASKS)
    joint.add(2, TARGETS, TARGETS, 9.0)
    assert (joint.A_last, joint.balanced) == (1.0, 1.0)
    assert joint.matrix[2].tolist() == [1.0, 1.0, 1.0]
    begun = Run("begun", 0, TASKS)
    begun.add(0, TARGETS[:3], TARGETS[:3], 1.0)
    unknown = [joint.A_avg, joint.forgetting, begun.A_last, begun.A_avg, begun.forgetting, begun.balanced]
    unknown += [begun.value("peak_mb"), begun.value("drift_compensated"), Run("none", 0, [[0]]).forgetting]
    assert all(map(math.isnan, unknown))
    alone = Run("alone", 0, [[0, 1]])
    alone.add(0, torch.tensor([0, 0]), torch.tensor([0, 1]), 1.0)
    assert (alone.A_last, alone.A_avg, alone.forgetting) == (0.5, 0.5, 0.0)
    assert "A_avg" not in summarize([joint])["joint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, TARGETS[:3], TARGETS[:3], 1.0), "not recorded yet, got 0"), ((3, TARGETS, TARGETS, 1.0), "not recorded yet"),
     ((1, TARGETS[:5], TARGETS[:6], 1.0), r"got \(5,\) and \(6,\)"),
     ((1, torch.tensor([4, 4, 0, 2, 2, 1]), TARGETS[:6], 1.0), r"predictions after task 1 must .* got \[1\]"),
     ((1, TARGETS[:6], torch.tensor([4, 4, 0, 2, 3, 3]), 1.0), r"targets after task 1 must .* got \[3\]"),
     ((1, TARGETS[:3], TARGETS[:3], 1.0), r"no test row of task\(s\) \[1\]"),
     ((1, TARGETS[:6], TARGETS[:6], 1.0, None, {"compensated": torch.zeros(3)}), r"\(2,\) tensors"),
     ((1, TARGETS[:6], TARGETS[:6], 1.0, None, {"other": torch.zeros(2)}), "any of")],
)  # fmt: skip
def test_what_add_refuses(arguments, message):
    run = Run("s", 0, TASKS)
    run.add(0, TARGETS[:3], TARGETS[:3], 1.0)
    with pytest.raises(ValueError, match=message):
        run.add(*arguments)
    assert list(run.records) == [0]


@pytest.mark.parametrize("tasks", [[], [[0], []], [[0], [0]]])
def test_tasks_that_are_none(tasks):
    with pytest.raises(ValueError, match="Run: tasks must be"):
        Run("s", 0, tasks)


@given(data=st.data())
def test_json_keeps_every_bit(tmp_path_factory, data):
    run = finished()
    number = st.floats(allow_nan=False, allow_infinity=False)
    run.records[1].drift["compensated"] = [data.draw(number), math.nan]
    run.records[2].seconds = data.draw(number)
    path = tmp_path_factory.mktemp("run") / "run.json"
    write_json(path, run.to_json())
    back = Run.from_json(read_json(path))
    assert back.to_json() == run.to_json()
    assert (back.strategy, back.seed, back.tasks, back.settings) == (run.strategy, 0, TASKS, {"epochs": 3})
    assert math.isnan(back.records[1].drift["compensated"][1])
    assert back.records[1].drift["compensated"][0] == run.records[1].drift["compensated"][0]
    assert back.records[2].seconds == run.records[2].seconds
    torch.testing.assert_close(back.matrix, run.matrix, rtol=0, atol=0, equal_nan=True)


def test_json_that_is_no_run():
    good = finished().to_json()
    last = good["records"]["2"]
    records = [{"7": last}, {"0": last}, {"0": {"correct": [1]}}, 3]
    damaged = [{}, [], good | {"tasks": [[0], [0]]}, *(good | {"records": found} for found in records)]
    for value in damaged:
        with pytest.raises(FileFormatError, match="not a run"):
            Run.from_json(json.loads(json.dumps(value)))


def scored(strategy: str, seed: int, right: int) -> Run:
    """One task of ten rows of class 0, of which so many are right."""
    run = Run(strategy, seed, [[0, 1]])
    run.add(0, torch.tensor([0] * right + [1] * (10 - right)), torch.zeros(10, dtype=torch.int32), 1.0)
    return run


def test_summaries_and_differences_by_hand():
    scores = {"a": (9, 8, 10), "b": (5, 3, 7), "c": (8, 9, 9)}
    runs = [scored(name, seed, right) for name, values in scores.items() for seed, right in enumerate(values)]
    assert {name: [run.seed for run in found] for name, found in by_strategy(reversed(runs)).items()} == {
        "c": [0, 1, 2], "b": [0, 1, 2], "a": [0, 1, 2],
    }  # fmt: skip
    found = summarize(runs)["b"]["A_last"]
    assert (found["mean"], found["sd"], found["n"]) == (pytest.approx(0.5), pytest.approx(0.2), 3)
    # differences 4, 5, 3 tenths: mean 4, sd 1; t(0.975, 2) = 4.302653
    ours = paired(runs, "a", "b")
    assert ours["seeds"] == [0, 1, 2]
    assert ours["differences"] == pytest.approx([0.4, 0.5, 0.3])
    assert (ours["mean"], ours["sd"]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert ours["high"] - ours["mean"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert ours["apart"] is True
    back = paired(runs, "b", "a")
    assert (back["mean"], back["low"], back["apart"]) == (-ours["mean"], -ours["high"], True)
    assert paired(runs, "a", "c")["apart"] is False  # 1, -1, 1 tenths
    assert paired(runs, "a", "a")["apart"] is False
    # only the seeds that both have
    alone = paired([*runs[:3], scored("b", 2, 7), scored("b", 9, 1)], "a", "b")
    assert (alone["seeds"], alone["low"], alone["sd"], alone["apart"]) == ([2], None, None, False)
    assert alone["mean"] == pytest.approx(0.3)


def test_differences_that_cannot_be_taken():
    runs = [scored("a", 0, 1), scored("b", 1, 1)]
    with pytest.raises(ValueError, match="no seed in common"):
        paired(runs, "a", "b")
    with pytest.raises(ValueError, match=r"among \('a', 'b'\)"):
        paired(runs, "a", "z")
    with pytest.raises(ValueError, match="different tasks with seed 0"):
        paired([*runs, Run("b", 0, [[1, 0]])], "a", "b")
    with pytest.raises(ValueError, match="a with seed 0 is there twice"):
        summarize([*runs, scored("a", 0, 2)])
    with pytest.raises(ValueError, match="for which both have drift_compensated"):
        paired([*runs, scored("b", 0, 2)], "a", "b", "drift_compensated")
    assert set(summarize(runs)["a"]) == {"A_last", "A_avg", "balanced", "forgetting", "seconds"}
    assert set(summarize(runs)["a"]) < set(METRICS)


@given(p=st.floats(0.5, 0.9995))
def test_student_where_it_has_a_closed_form(p):
    """One degree of freedom is Cauchy's distribution; with two, t = a·√(2/(1 − a²)) where a = 2p − 1."""
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-7)
    a = 2 * p - 1
    assert student_quantile(p, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-9, abs=1e-7)


def test_student_against_scipy():
    t = pytest.importorskip("scipy.stats").t
    for degrees in (1, 2, 3, 4, 9, 29, 200):
        for p in (0.6, 0.9, 0.975, 0.995, 0.9995):
            assert student_quantile(p, degrees) == pytest.approx(t.ppf(p, degrees), rel=1e-9)


def test_intervals_cover_as_often_as_they_say():
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 7
    found = [mean_interval(row) for row in draws.tolist()]
    covered = sum(f["low"] <= 7 <= f["high"] for f in found) / len(found)
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / len(found))
    assert mean_interval([2.0]) == {"mean": 2.0, "sd": None, "n": 1, "low": None, "high": None}
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite values"):
            mean_interval(values)
