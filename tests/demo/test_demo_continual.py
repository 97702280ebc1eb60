"""The demo's class-incremental section; most of the runs are made up."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from clipsteer.continual.metrics import Run
from clipsteer.continual.scenario import Scenario, emoji_scenario
from clipsteer.demo import continual as demo_continual
from clipsteer.report import Page

CLASSES = ["ant", "bee", "<cat>"]
TITLES = ("without compensation", "with compensation")


def made_up(right: int, drift: bool = True, seconds: float = 3.0) -> Run:
    """Two tasks; so many of the last 30 rows are right, and 20 of the first 20."""
    run = Run("sdc", 0, [[2, 0], [1]])
    old, new = torch.tensor([2] * 10 + [0] * 10), torch.tensor([2] * 10 + [0] * 10 + [1] * 10)
    run.add(0, old, old, seconds, 100.0)
    errors = {"compensated": torch.tensor([0.1, 0.3]), "uncompensated": torch.tensor([0.5, 0.7])} if drift else None
    run.add(1, torch.where(torch.arange(30) < right, new, (new + 1) % 3), new, seconds, 100.0, errors)
    return run


def drawn(first: Run, second: Run) -> str:
    page = Page("t")
    page.section("s", *demo_continual.section(dict(zip(TITLES, (first, second))), CLASSES, "About & so on."))
    return page.html()


def test_the_section_says_what_the_runs_say():
    markup = drawn(made_up(15), made_up(24))
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", markup))
    assert "About &amp; so on." in words
    assert "&lt;cat&gt;, ant" in words
    assert "all classes at the end, without compensation 50.0 %" in words
    assert "all classes at the end, with compensation 80.0 %" in words
    # task 1 had 20 of 20 right, then 15 of 20, and 20 of 20
    assert "forgetting, without compensation 25.0 points" in words
    assert "forgetting, with compensation 0.0 points" in words
    assert "2 30 50.0 (31.3–68.7) 80.0 (61.4–92.3)" in words
    assert "is 30.0 points higher with compensation than without compensation, on 30 images" in words
    assert "off by 0.200 of their length with compensation, on average; left where they were" in words
    assert "they would be off by 0.600" in words
    assert "One run does not tell chance from effect" in words
    assert markup.count("<rect") == 6
    # two accuracy curves, two of the prototypes
    assert markup.count("<polyline") == 4


def test_other_outcomes():
    assert "10.0 points lower with compensation than" in drawn(made_up(15), made_up(12))
    bare = drawn(made_up(15, drift=False), made_up(15, drift=False))
    assert "at the end is the same, on 30 images" in bare
    assert "of their length" not in bare.split("</table>")[-1]
    assert bare.count("<polyline") == 2


def test_time_and_memory_leave_no_trace():
    slow, quick = made_up(15, seconds=3.0), made_up(15, seconds=9.0)
    assert drawn(slow, slow) == drawn(quick, quick) == drawn(slow.untimed(), slow.untimed())
    assert slow.untimed().to_json() == quick.untimed().to_json() != quick.to_json()
    assert slow.value("seconds") == 6.0  # the run itself keeps them


def test_what_is_refused():
    one, whole = made_up(15), made_up(24)
    with pytest.raises(ValueError, match="two runs"):
        demo_continual.section({"a": one}, CLASSES, "")
    with pytest.raises(ValueError, match="two runs of the same tasks"):
        demo_continual.section({"a": one, "b": dataclasses.replace(whole, tasks=[[0, 2], [1]])}, CLASSES, "")
    del one.records[0]
    with pytest.raises(ValueError, match="finished runs"):
        demo_continual.section({"a": one, "b": whole}, CLASSES, "")


def test_the_demos_own_runs_in_little():
    """Two drawings a class of four classes to learn from, one to test on: what the demo does, in little."""
    whole = emoji_scenario(5, 3, ("twemoji",), validation=0)

    def few(part, n):
        count, rows = {}, []
        for row, c in enumerate(part.targets):
            count[c] = count.get(c, 0) + 1
            if c in (0, 1, 2, 3) and count[c] <= n:
                rows.append(row)
        return part.subset(rows)

    little = Scenario(few(whole.train, 2), few(whole.train, 0), few(whole.test, 1), [[2, 0], [1, 3]], whole.classes[:4])
    found = demo_continual.measure(3, scenario=little)
    assert found == demo_continual.measure(3, scenario=little)
    assert json.loads(json.dumps(found)) == found
    runs = [Run.from_json(run) for run in found["runs"].values()]
    assert [run.settings["compensation"] for run in runs] == ["none", "mean_shift"]
    # without compensation prototypes stay, with it they move
    plain, moved = (run.records[1].drift for run in runs)
    assert plain["compensated"] == plain["uncompensated"] != moved["compensated"]
    markup = "".join(demo_continual.of_measured(found))
    assert "8 to learn from and 4 others" in markup
    assert demo_continual.of_measured({"skipped": "why not"})[0].find("why not") > 0
