"""Robustness curves for people: a chart on logit axes, a page, a CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipsteer.ensembles.robustness import Baseline, averages, summary
from clipsteer.report.axes import Axis, logit, sigmoid
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Dots, Layer, Line, Trend
from clipsteer.report.page import Html, Page, grid, percent, stats, table

NAMES = {"weight": "weight-space ensemble (WiSE-FT)", "output": "output-space ensemble"}
ENDS = {
    "zeroshot": "zero-shot",
    "finetuned": "fine-tuned",
    "default": "α = 0.5",
    "oracle": "oracle α",
}
_SYMBOLS = {0: "ring", 0.5: "diamond", 1: "square"}


def _smoothed(accuracy: float, n: int) -> float:
    """An accuracy over n images as `logit` takes it."""
    return sigmoid(logit(accuracy, n))


def logit_chart(
    lines: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    title: str,
    x: str,
    y: str,
    baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (),
) -> Chart:
    """Shifted against reference accuracy in log odds, where the trend of ordinary models is a
    straight line.

    Args:
        lines: name -> rows with alpha, reference, reference_n, shifted, shifted_n, as `averages`
            gives them.
        x, y: labels.
        baseline, models: the fitted trend and the points that it was fitted to, as for
            `fit_baseline`.
    """
    layers: list[Layer] = []
    if baseline is not None:
        name = f"trend of {baseline.models} models trained on the reference alone"
        layers.append(Trend(name, baseline))
    references = [_smoothed(accuracy, n) for accuracy, n, _, _ in models]
    layers.append(Dots(references, [_smoothed(accuracy, n) for _, _, accuracy, n in models]))
    for name, rows in lines.items():
        xs = [_smoothed(row["reference"], row["reference_n"]) for row in rows]
        ys = [_smoothed(row["shifted"], row["shifted_n"]) for row in rows]
        symbols = [_SYMBOLS.get(row["alpha"], "") for row in rows]
        layers.append(Line(name, xs, ys, symbols=symbols, label=name))
    return Chart(
        title,
        *layers,
        x=Axis(x, scale="logit"),
        y=Axis(y, scale="logit"),
        height=256,
        note="○ α = 0, ◆ α = 0.5, ■ α = 1",
    )


def curve_charts(
    rows: Sequence[Mapping[str, Any]],
    baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (),
    *,
    label: str = "",
) -> tuple[Chart, Chart]:
    """The curve on logit axes, and accuracy by set against alpha."""
    lines = averages(rows)
    by_method = {NAMES[m]: [row for row in lines if row["method"] == m] for m in NAMES}
    first = logit_chart(
        by_method,
        title=f"Shifted against reference accuracy{label}",
        x="reference accuracy, % (log odds)",
        y="mean accuracy on shifted sets, % (log odds)",
        baseline=baseline,
        models=models,
    )
    weight = [row for row in rows if row["method"] == "weight"]
    names = dict.fromkeys(row["set"] for row in weight)
    sets = {name: [row for row in weight if row["set"] == name] for name in names}
    second = [
        Line(name, [r["alpha"] for r in own], [100 * r["accuracy"] for r in own])
        for name, own in sets.items()
    ]
    return first, Chart(f"Accuracy by set{label}", *second, x="α", y="accuracy, %")


def summary_table(rows: Sequence[Mapping[str, Any]], baseline: Baseline | None) -> Html:
    """The table of accuracies and what averaging gains, a row a method and end."""
    body = []
    measures = [summary(rows, baseline), summary(rows, None, "balanced")]
    for method, name in NAMES.items():
        for end, title in ENDS.items():
            if (method == "output" and end in ("zeroshot", "finetuned")) or end not in measures[0][
                method
            ]:
                continue
            row, balanced = measures[0][method][end], measures[1][method][end]
            label = title if end in ("zeroshot", "finetuned") else f"{name}, {title}"
            if end == "oracle":
                label += f" = {row['alpha']:g}"
                balanced = next(
                    r
                    for r in averages(rows, "balanced")
                    if (r["method"], r["alpha"]) == (method, row["alpha"])
                )
            cells = [label, percent(row["reference"]), percent(row["shifted"])]
            cells += [percent(balanced["reference"]), percent(balanced["shifted"])]
            if baseline is not None:
                cells.append(f"{100 * row['effective_robustness']:+.1f}")
            body.append(cells)
    headers = ["", "reference, %", "shifted, %", "balanced reference, %", "balanced shifted, %"]
    return table(
        headers + (["effective robustness, points"] if baseline is not None else []),
        body,
        "Shifted: mean over the shifted sets. The oracle α is chosen on what it is measured on: a "
        "bound, not a result.",
    )


def write_page(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    subtitle: str,
    baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (),
    footer: str = "",
) -> Path:
    """The page of one curve."""
    found = summary(rows, baseline)["weight"]
    page = Page("Robustness curve", subtitle, footer=footer)
    middle = found.get("default", found["oracle"])
    page.lead(
        stats(
            [
                ("zero-shot, shifted", f"{percent(found['zeroshot']['shifted'])} %"),
                (f"α = {middle['alpha']:g}, shifted", f"{percent(middle['shifted'])} %"),
                ("fine-tuned, shifted", f"{percent(found['finetuned']['shifted'])} %"),
                ("fine-tuned, reference", f"{percent(found['finetuned']['reference'])} %"),
            ]
        )
    )
    page.section(
        "Curve", grid(*curve_charts(rows, baseline, models)), summary_table(rows, baseline)
    )
    cells = [
        [
            f"{r['set']}, α = {r['alpha']:g}",
            r["correct"],
            r["n"],
            percent(r["accuracy"]),
            f"{percent(r['low'])} – {percent(r['high'])}",
            percent(r["balanced"]),
        ]
        for r in rows
        if r["method"] == "weight"
    ]
    caption = "Intervals: Clopper–Pearson, 95 %."
    page.section(
        "Every set",
        table(
            ["weight space", "correct", "of", "accuracy, %", "interval", "balanced, %"],
            cells,
            caption,
        ),
    )
    return page.write(path)
