"""The page of class-incremental runs. All runs here are made up."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from clipsteer import FileFormatError
from clipsteer.continual import tables
from clipsteer.continual.metrics import Run, paired
from clipsteer.continual.report import accuracy_curves, curves, matrix_maps, read_results, write_results

QUALITY = {"macil": 0.75, "slca": 0.72, "sdc": 0.6, "sequential <fine>": 0.3, "joint": 0.9}


def made_up(strategy: str, seed: int, tasks: int = 5, per_class: int = 40) -> Run:
    """Rows are right with a probability that the strategy and the task's age set."""
    g = torch.Generator().manual_seed(100 * list(QUALITY).index(strategy) + seed)
    shift = 0.06 * torch.randn((), generator=torch.Generator().manual_seed(seed))  # the same for all strategies
    order = torch.randperm(2 * tasks, generator=torch.Generator().manual_seed(seed)).tolist()
    run = Run(strategy, seed, [order[2 * t : 2 * t + 2] for t in range(tasks)])
    for t in range(tasks):
        if strategy == "joint" and t < tasks - 1:
            continue
        targets = torch.tensor(order[: 2 * t + 2]).repeat_interleave(per_class)
        age = torch.tensor([t - j // 2 for j in range(2 * t + 2)]).repeat_interleave(per_class)
        p = (QUALITY[strategy] + shift) ** (1 + 0.3 * age)
        right = torch.rand(len(targets), generator=g) < p
        wrong = torch.tensor([order[(order.index(int(c)) + 1) % (2 * t + 2)] for c in targets])
        drift = None
        if t and strategy in ("macil", "sdc"):
            base = 0.2 * t + 0.02 * torch.rand(2 * t, generator=g)
            drift = {"compensated": base / 2, "uncompensated": base}
        run.add(t, torch.where(right, targets, wrong), targets, 12.5 + t, 830.0, drift)
    return run


@pytest.fixture(scope="module")
def runs():
    return [made_up(strategy, seed) for strategy in QUALITY for seed in range(3)]


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_files(runs, tmp_path):
    notes = {"data": "none & made up", "machine": {"chip": "x", "threads": 1}}
    paths = write_results(tmp_path / "out", runs, notes)
    assert [p.name for p in paths] == ["runs.json", "table.csv", "matrix.csv", "index.html", "summary.md"]
    back, kept = read_results(paths[0])
    assert [run.to_json() for run in back] == [run.to_json() for run in runs]
    assert kept == notes
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_results(tmp_path / "again", back, kept)] == first

    rows = list(csv.DictReader(paths[1].open()))
    assert len(rows) == 15
    for run, row in zip(runs, rows):
        assert (row["strategy"], row["seed"]) == (run.strategy, str(run.seed))
        assert float(row["A_last"]) == pytest.approx(run.A_last, abs=1e-6)
    assert rows[-1]["A_avg"] == rows[-1]["drift_compensated"] == ""
    cells = list(csv.DictReader(paths[2].open()))
    assert len(cells) == 12 * 15 + 3 * 5
    for row in cells:
        run = next(r for r in runs if (r.strategy, str(r.seed)) == (row["strategy"], row["seed"]))
        a = run.matrix[int(row["after_task"]) - 1, int(row["on_task"]) - 1]
        assert float(row["accuracy"]) == pytest.approx(float(a), abs=1e-6)

    page = Balanced()
    markup = paths[3].read_text(encoding="utf-8")
    page.feed(markup)
    assert page.open == []
    assert "nan" not in markup.lower().replace("finance", "")
    assert "sequential <" not in markup
    assert not re.search(r"<script|https?://", markup)
    summary = paths[4].read_text(encoding="utf-8")
    for header, body in (tables.results_table(runs), tables.differences_table(runs, "macil"), tables.drift_table(runs)):
        for row in (header, *body):
            assert "| " + " | ".join(row) + " |" in summary
            assert set(row) - {""} <= set(page.cells)
    sentence = tables.alike(runs, "A_last")
    assert sentence in summary
    assert f"<p>{sentence.replace('<', '&lt;').replace('>', '&gt;')}</p>" in markup


def test_tables_say_what_the_differences_show(runs):
    header, body = tables.differences_table(runs, "macil")
    assert header[1:] == ["A_last, points", "A_avg, points", "balanced, points", "forgetting, points"]
    by_name = {row[0]: row[1:] for row in body}
    assert list(by_name) == [f"macil − {name}" for name in list(QUALITY)[1:]]
    for name in list(QUALITY)[1:]:
        for metric, cell in zip(tables.COMPARED, by_name[f"macil − {name}"]):
            if name == "joint" and metric in ("A_avg", "forgetting"):
                assert cell == "–"
                continue
            found = paired(runs, "macil", name, metric)
            cell = cell.replace("\u00a0", " ")
            assert cell.startswith(
                f"{100 * found['mean']:+.1f} ({100 * found['low']:+.1f} … {100 * found['high']:+.1f})"
            )
            more = (found["mean"] > 0) == (metric != "forgetting")
            assert cell.endswith(("better" if more else "worse") if found["apart"] else "cannot be told apart")
    assert by_name["macil − sequential <fine>"][0].endswith("better")
    assert by_name["macil − joint"][0].endswith("worse")
    one = tables.differences_table([made_up("macil", 0), made_up("slca", 0)], "slca")[1][0]
    assert one[1].endswith("one\u00a0seed:\u00a0cannot\u00a0be\u00a0judged")


def test_pairs_that_are_alike():
    same = [made_up("macil", seed) for seed in range(3)] + [made_up("joint", seed) for seed in range(3)]
    assert tables.alike(same) == "A_last tells every pair of strategies apart (1)."
    twins = [*same[:3], *(Run("twin", r.seed, r.tasks, records=r.records) for r in same[:3])]
    assert tables.alike(twins) == "A_last cannot tell apart 1 of 1 pairs of strategies: macil and twin."
    assert tables.alike(twins[:4]).startswith("A_last: no two strategies have two seeds in common")
    # a mistake is no reason to leave a pair out
    twins[3] = Run("twin", 0, twins[0].tasks[::-1], records=twins[0].records)
    with pytest.raises(ValueError, match="different tasks"):
        tables.alike(twins)


def test_drift_table_by_hand():
    members = []
    for seed, (with_, without) in enumerate([(0.1, 0.3), (0.2, 0.4), (0.3, 0.501)]):
        run, after, before = Run("s", seed, [[0], [1]]), torch.tensor([with_]), torch.tensor([without])
        errors = {"compensated": after, "uncompensated": before}
        run.add(1, torch.tensor([0, 1]), torch.tensor([0, 1]), 1.0, None,
                errors | {"cosine_compensated": after, "cosine_uncompensated": after})  # fmt: skip
        members.append(run)
    row, angle = ([cell.replace("\u00a0", " ") for cell in cells] for cells in tables.drift_table(members)[1])
    # differences -0.2, -0.2, -0.201: sd 0.000577, so ± 4.303·0.000577/√3 = 0.0014
    assert row == ["s", "relative", "0.400 ± 0.250", "0.200 ± 0.248", "-0.200 (-0.202 … -0.199) better", "3"]
    assert angle[:2] == ["s", "1 − cosine"]
    assert angle[4] == "+0.000 the same at every seed"
    assert tables.drift_table([Run("s", 0, [[0]])])[1] == []


def test_costs(runs):
    header, body = tables.costs_table(runs)
    assert header == ["seconds", "task 1", "task 2", "task 3", "task 4", "task 5", "in all", "peak MB"]
    assert body[0] == ["macil", "12.5", "13.5", "14.5", "15.5", "16.5", "72.5", "830"]
    assert body[-1][:7] == ["joint", "–", "–", "–", "–", "16.5", "16.5"]


def test_bands_are_the_mean_and_a_deviation():
    lines = [
        torch.tensor([0.0, 2.0, float("nan")]),
        torch.tensor([4.0, 2.0, 3.0]),
        torch.tensor([2.0, 5.0, float("nan")]),
    ]
    chart = str(curves({"s": lines}, title="t", y_label="y", y_from=0.0, y_to=6.0))
    numbers = lambda name: [
        float(v) for v in re.search(rf'<{name} points="([^"]+)"', chart)[1].replace(",", " ").split()
    ]
    height = lambda y: pytest.approx(186 - y / 6 * 176, abs=0.06)
    assert numbers("polyline")[1::2] == [height(2), height(3), height(3)]
    # the third task has one seed and so no band: up along the top of two tasks, back along the bottom
    assert numbers("polygon")[1::2] == [height(4), height(3 + 3**0.5), height(3 - 3**0.5), height(0)]


def test_charts_hold_every_strategy(runs):
    groups = {name: [run for run in runs if run.strategy == name] for name in QUALITY}
    drawn = accuracy_curves(runs)
    # three charts; joint has a single point, which is no band
    assert drawn.count("<polyline") == 15
    assert drawn.count("<polygon") == 12
    maps = matrix_maps(groups)
    assert maps.count("<rect") == 4 * 15 + 5
    mean = torch.stack([run.matrix for run in groups["sdc"]]).mean(0)
    assert f"4, 2: {100 * mean[3, 1]:.1f}</title>" in maps
    full = max(float(torch.stack([run.matrix for run in m]).mean(0).nan_to_num().max()) for m in groups.values())
    opacity = max(float(v) for v in re.findall(r'fill-opacity="([\d.]+)"', maps))
    peak = max(float(run.matrix.nan_to_num().max()) for run in runs)
    assert opacity == pytest.approx(0.5 * full / peak, abs=1e-3)


def test_what_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="reference among"):
        write_results(tmp_path, runs, reference="other")
    with pytest.raises(ValueError, match="finished runs"):
        write_results(tmp_path, [Run("s", 0, [[0]])])
    with pytest.raises(ValueError, match="is there twice"):
        write_results(tmp_path, [*runs, made_up("sdc", 0)])
    assert not any(tmp_path.iterdir())
    path = tmp_path / "runs.json"
    for value in ([], {"format": "other"}, {"format": "clipsteer-cil-1", "runs": [{}], "notes": {}},
                  {"format": "clipsteer-cil-1", "runs": [], "notes": 3}):  # fmt: skip
        path.write_text(json.dumps(value))
        with pytest.raises(FileFormatError, match=re.escape(str(path))):
            read_results(path)


def test_frozen_networks_are_not_told_apart_by_seeds():
    """Three seeds that all give one difference are one measurement, not three."""
    frozen = []
    for name, right in (("a", 6), ("b", 5)):
        for seed in range(3):
            run = Run(name, seed, [[0, 1]])
            run.add(0, torch.tensor([0] * right + [1] * (10 - right)), torch.zeros(10, dtype=torch.long))
            frozen.append(run)
    assert not paired(frozen, "a", "b")["apart"]
    cells = tables.differences_table(frozen, "a")[1][0]
    assert cells[1].replace("\u00a0", " ") == "+10.0 the same at every seed"
    assert tables.alike(frozen).endswith("1 of 1 pairs of strategies: a and b.")
    said = tables.caution(frozen, "a")
    assert "the 4 comparisons of the table: of so many between equals, 0.2 would" in said
    assert "One of 10 images is 10.00 points, and an accuracy of 60.0 % on so many has" in said
    assert said.endswith("a 95 % Clopper–Pearson interval of 26.2 – 87.8 %.")
