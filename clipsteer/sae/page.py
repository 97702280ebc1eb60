"""The page of ``clipsteer sae eval``: its figures in bars, tables and words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clipsteer.report.axes import number
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Bars, Cells
from clipsteer.report.page import Html, Page, card, cards, grid, percent, stats, table, text

_WAYS = (("clean", "as it is"), ("sae", "through the SAE"), ("zero", "zeros instead"))
_SCORES = {
    "top1": ("zero-shot accuracy, %", 1.0),
    "linear": ("accuracy of a linear probe, %", 1.0),
    "knn": ("accuracy of the nearest neighbours, %", 1.0),
    "ce": ("zero-shot cross-entropy", None),
}


def evaluation_page(title: str, subtitle: str, figures: Mapping[str, Any]) -> Page:
    """The page of what ``evaluate_sae`` gives, and of what ``sae eval`` adds to it: steerability,
    names and metrics, as far as they are there."""
    page = Page(title, subtitle)
    at = f"{figures['hook_point']}, {figures['tokens']} tokens of {figures['images']} images"
    items = [
        ("explained variance", f"{figures['ev']:.4f}"),
        ("FVU", f"{figures['fvu']:.4f}"),
        ("active features a token", f"{figures['l0']:.1f}"),
        ("silent features", f"{percent(figures['dead'])} %"),
    ]
    page.lead(text(at, css="soft"), stats(items))
    kept = _kept(figures)
    if kept:
        page.section(
            "What the model still knows",
            text(
                "The tokens are replaced by their reconstructions, and by zeros for comparison; "
                "bars of a kind are in one scale."
            ),
            grid(*kept),
        )
    if len({count for row in figures.get("l0_map") or () for count in row}) > 1:
        page.section("Where features are active", _where(figures["l0_map"]))
    if "metrics" in figures:
        page.section("What its features are worth", *_metrics(figures["metrics"]))
    if "steerability" in figures:
        page.section("What its features steer", *_steerability(figures["steerability"]))
    if figures.get("names"):
        page.section("Its strongest features, in words", _names(figures["names"]))
    return page


def _kept(figures: Mapping[str, Any]) -> list[Chart]:
    charts = []
    for score, (title, limit) in _SCORES.items():
        if not all(f"{score}_{way}" in figures for way, _ in _WAYS):
            continue
        found = [(name, float(figures[f"{score}_{way}"])) for way, name in _WAYS]
        bars = [(name, v, percent(v) if limit else number(v)) for name, v in found]
        charts.append(Chart(title, Bars(bars, limit)))
    return charts


def _where(counts: list[list[float]]) -> Chart:
    peak = max(map(max, counts))
    cells = Cells(counts, range(len(counts)), range(len(counts[0])), peak, lambda v: f"{v:.1f}")
    return Chart("Active features a token, by patch", cells, x="column", y="row")


def _metrics(found: Mapping[str, Any]) -> list[Html | Chart]:
    rows = []
    bars = []
    intervals = []
    for name, estimate in found.items():
        if name == "definition":
            continue
        value, low, high = (_or_nan(estimate[key]) for key in ("value", "low", "high"))
        reach = "" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
        shown = "–" if math.isnan(value) else f"{value:.4f}"
        what = estimate["details"].get("why") or f"{estimate['scored']} {estimate['unit']}"
        rows.append([name, shown, reach, what])
        bars.append((name, value, shown))
        intervals.append((low, high))
    return [
        text(f"Definition: {found['definition']}. Intervals are of 95 %, over the images."),
        grid(Chart("value and interval", Bars(bars, intervals=intervals))),
        table(["metric", "value", "95 % interval", "scored"], rows, words=True),
        text(
            "Neither FVU nor monosemanticity tracks what an SAE is worth for a task downstream: "
            "read them beside each other.",
            css="note",
        ),
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _steerability(found: Mapping[str, Any]) -> list[Html]:
    bars = [(f"{row['feature']} → {row['concept']}", row["score"]) for row in found["best"]]
    words = (
        f"{percent(found['share'])} % of the first {found['features']} features are steerable at a "
        f"strength of {found['strength']:g}: the squares of the mean changes in probability sum "
        "up to more than 0.1 (Joseph et al. 2025)."
    )
    return [text(words), cards(card("The most steerable", Chart("", Bars(bars))))]


def _names(found: Any) -> Html:
    rows = []
    for row in found:
        named = ", ".join(f"{concept} {weight:.2f}" for concept, weight in row["names"])
        rows.append([row["feature"], f"{row['peak']:.4g}", f"{percent(row['frequency'])} %", named])
    return table(["feature", "peak", "active on", "looks like (SpLiCE)"], rows, words=True)
