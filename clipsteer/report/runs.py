"""The page of a training run: its curves and settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipsteer.report.axes import Axis, number
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Line
from clipsteer.report.page import Html, Page, grid, stats, table, text

PAGE = "report.html"
_WIDE = 100.0  # values this far apart, all positive, are drawn in decades
# what figures are, where their names do not say it
_SAID = {
    "fvu": "share of variance unexplained",
    "l0": "active features a token",
    "dead": "share of features",
    "lr": "learning rate",
    "tau": "temperature",
}
# of how it was learnt, not of what
_MANNER = re.compile("step|lr|grad_norm|tokens|images|loss_share|.*_per_second")


def write_run_page(
    folder: str | os.PathLike[str],
    title: str,
    subtitle: str = "",
    *,
    settings: Mapping[str, Any] | None = None,
    following: str = "",
) -> Path:
    """Write ``report.html`` of the run in a folder: a chart for each kind of figure in its
    ``log.jsonl``, the last of them in numbers, and the settings.

    Args:
        settings: what made the run, a row each.
        following: a command to go on with.

    A run that has logged nothing has a page without curves.
    """
    folder = Path(folder)
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    page = Page(title, subtitle, footer="Every figure is in log.jsonl beside this page.")
    if records:
        page.lead(_ends(records))
    if following:
        page.lead(text("Go on with: ", following, css="note"))
    charts = run_charts(records)
    page.section("Curves", grid(*charts) if charts else "Nothing was logged twice.")
    if settings:
        rows = [[name, _written(value)] for name, value in settings.items() if value is not None]
        page.section("Settings", table(["setting", "value"], rows, words=True))
    return page.write(folder / PAGE)


def run_charts(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Curves of a log over its steps; figures of one kind, such as fvu and fvu_24 or all of
    val/…, share a chart. One that never changes has none."""
    kinds: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                curves = kinds.setdefault(_kind(name), {})
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    charts = []
    for kind in sorted(kinds, key=lambda kind: bool(_MANNER.fullmatch(kind))):
        curves = kinds[kind]
        lines = [Line(name, *curve) for name, curve in curves.items()]
        values = [value for _, curve in curves.values() for value in curve]
        if len(set(values)) < 2 or kind == "tokens":
            continue
        low = min(values)
        wide = low > 0 and max(values) > _WIDE * low
        axis = Axis(_SAID.get(kind, kind), scale="log" if wide else "linear")
        charts.append(Chart(kind, *lines, x="step", y=axis))
    return charts


def _kind(name: str) -> str:
    return name.partition("/")[0] if "/" in name else re.sub(r"_\d+$", "", name)


def _ends(records: Sequence[Mapping[str, Any]]) -> Html:
    """The last value of each kind's first figure."""
    last: dict[str, tuple[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, (int, float)) and not _MANNER.fullmatch(_kind(name)):
                known, _ = last.setdefault(_kind(name), (name, value))
                if known == name:
                    last[_kind(name)] = (name, value)
    shown = [(name, number(value)) for name, value in last.values()]
    return stats([("step", number(records[-1]["step"])), *shown[:7]])


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_written, value))
    return str(value)
