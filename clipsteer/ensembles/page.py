"""Robustness curves for people: a chart on logit axes, a page, a CSV."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipsteer.ensembles.robustness import Baseline, averages, logit, summary
from clipsteer.io.files import write_atomically
from clipsteer.report import Html, Page, charts, escape, line_chart, percent, stats, table

logger = logging.getLogger(__name__)

NAMES = {"weight": "weight-space ensemble (WiSE-FT)", "output": "output-space ensemble"}
ENDS = {
    "zeroshot": "zero-shot",
    "finetuned": "fine-tuned",
    "default": "α = 0.5",
    "oracle": "oracle α",
}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_ALONE = """<style>svg{--fg:#1b1f24;--soft:#57606a;--line:#d5dae0;--s0:#0b62c4;--s1:#b94700;--s2:#0f7b3f;--s3:#7a3fc2;
background:#fff}text{fill:var(--soft);font:11px system-ui,sans-serif}.rule{stroke:var(--line)}</style>"""


def _ticks(low: float, high: float) -> list[float]:
    """Round accuracies between two log odds: the usual ones, or where fewer than three fit, finer
    ones."""
    inside = lambda ticks: [t for t in ticks if low <= math.log(t / (1 - t)) <= high]
    finer = ([i / n for i in range(1, n)] for n in (20, 50, 100))
    return next(
        (found for ticks in (_TICKS, *finer) if len(found := inside(ticks)) >= 3), inside(_TICKS)
    )


def logit_chart(
    lines: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (),
) -> Html:
    """Shifted against reference accuracy in log odds, where the trend of ordinary models is a
    straight line.

    Args:
        lines: name -> rows with alpha, reference, reference_n, shifted, shifted_n, as `averages`
            gives them. A ring marks alpha 0, a square 1, a diamond 0.5.
        baseline, models: the fitted trend and the points that it was fitted to, as for
            `fit_baseline`.
    """
    at = lambda row: (
        logit(row["reference"], row["reference_n"]),
        logit(row["shifted"], row["shifted_n"]),
    )
    dots = [(logit(a, n), logit(b, m)) for a, n, b, m in models]
    everything = [at(row) for line in lines.values() for row in line] + dots
    (x0, x1), (y0, y1) = ((min(v) - 0.15, max(v) + 0.15) for v in zip(*everything))
    w, h, left, right, top, bottom = 400, 300, 46, 10, 10, 34
    px = lambda x: left + (x - x0) / (x1 - x0) * (w - left - right)
    py = lambda y: h - bottom - (y - y0) / (y1 - y0) * (h - top - bottom)
    out = []
    for tick in _ticks(y0, y1):
        value, shown = math.log(tick / (1 - tick)), f"{100 * tick:g}"
        out.append(
            f'<line class="rule" x1="{left}" x2="{w - right}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>'
        )
        out.append(f'<text x="{left - 5}" y="{py(value) + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in _ticks(x0, x1):
        value, shown = math.log(tick / (1 - tick)), f"{100 * tick:g}"
        out.append(
            f'<line class="rule" x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{top}" y2="{h - bottom}"/>'
        )
        out.append(
            f'<text x="{px(value):.1f}" y="{h - bottom + 15}" text-anchor="middle">{shown}</text>'
        )
    out.append(
        f'<text x="{(left + w - right) / 2}" y="{h - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<text transform="translate(11 {(top + h - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    names = []
    if baseline is not None:
        # the part of the trend inside the box
        inside = [
            (
                x0 + (x1 - x0) * i / 100,
                baseline.slope * (x0 + (x1 - x0) * i / 100) + baseline.intercept,
            )
            for i in range(101)
        ]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in inside if y0 <= y <= y1)
        style = 'style="stroke:var(--soft)" stroke-dasharray="2 3" fill="none" stroke-width="1.5"'
        out.append(f'<polyline points="{path}" {style}/>')
        names.append((style, f"trend of {baseline.models} models trained on the reference alone"))
    out += [
        f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2" style="fill:var(--soft)"/>'
        for x, y in dots
    ]
    for i, (name, line) in enumerate(lines.items()):
        colour = f"var(--s{i % 4})"
        dashes = ("", "6 3", "8 3 2 3", "3 3")[(i + i // 4) % 4]
        style = f'style="stroke:{colour}" stroke-dasharray="{dashes}" fill="none" stroke-width="2"'
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in map(at, line))
        out.append(f'<polyline points="{path}" {style} stroke-linejoin="round"/>')
        for row in line:
            x, y = (round(f(v), 1) for f, v in zip((px, py), at(row)))
            if row["alpha"] == 0:
                out.append(
                    f'<circle cx="{x}" cy="{y}" r="4.5" style="stroke:{colour};fill:var(--bg,#fff)" stroke-width="2"/>'
                )
            elif row["alpha"] in (0.5, 1):
                turn = f' transform="rotate(45 {x} {y})"' if row["alpha"] == 0.5 else ""
                out.append(
                    f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" style="fill:{colour}"{turn}/>'
                )
        names.append((style, name))
    legend = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" {style}/></svg>'
        f"{escape(name)}</li>"
        for style, name in names
    )
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{escape(title)}">{"".join(out)}</svg>'
        f'<ul class="legend">{legend}<li>○ α = 0, ◆ α = 0.5, ■ α = 1</li></ul></figure>'
    )


def write_svg(path: str | Path, chart: Html) -> list[Path]:
    """The drawing of a chart as a file of its own, on white, its legend below the axes; and the
    same as a PNG.

    The PNG lies beside it, 1600 pixels wide, and needs resvg-py; without that a line in the log
    says so. Returns the files written.
    """
    start = chart.index('<svg viewBox="0 0 400')
    drawing = chart[start : chart.index("</svg>", start)]
    width, height = map(int, re.match(r'<svg viewBox="0 0 (\d+) (\d+)"', drawing).groups())
    body = drawing[drawing.index(">") + 1 :]
    keys = chart[chart.index('<ul class="legend">') :].split("<li>")[1:]
    extra = []
    for i, key in enumerate(keys):
        y = height + 14 + 16 * i
        line = key[key.index("<line") : key.index("/>") + 2] if "<line" in key else ""
        label = key.split("</svg>")[-1].split("</li>")[0]
        extra.append(
            f'<g transform="translate(46 {y - 9})">{line}</g><text x="80" y="{y}">{label}</text>'
        )
    total = height + 16 * len(keys) + 8
    title = chart[chart.index("<figcaption>") + 12 : chart.index("</figcaption>")]
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -20 {width} {total + 20}" width="{2 * width}" role="img">'
        f"{_ALONE}<title>{title}</title>"
        f'<text x="{width / 2}" y="-6" text-anchor="middle" font-weight="bold">{title}</text>'
        f"{body}{''.join(extra)}</svg>\n"
    )
    # plain colours: few programs but browsers know the names that the page gives them
    colours = dict(re.findall(r"--(\w+):(#\w+)", _ALONE))
    text = re.sub(r"var\(--(\w+)(?:,(#\w+))?\)", lambda m: colours.get(m[1]) or m[2], text)
    write_atomically(path, lambda file: file.write(text.encode()))
    path = Path(path)
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        logger.warning(
            "%s: no PNG beside it, that needs resvg-py: pip install 'clipsteer[data]'", path
        )
        return [path]
    png = svg_to_bytes(svg_string=text, width=4 * width, background="#ffffff")
    write_atomically(path.with_suffix(".png"), lambda file: file.write(bytes(png)))
    return [path, path.with_suffix(".png")]


def curve_charts(
    rows: Sequence[Mapping[str, Any]],
    baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (),
    *,
    label: str = "",
) -> tuple[Html, Html]:
    """The curve on logit axes, and accuracy by set against alpha."""
    lines = averages(rows)
    by_method = {NAMES[m]: [row for row in lines if row["method"] == m] for m in NAMES}
    first = logit_chart(
        by_method,
        title=f"Shifted against reference accuracy{label}",
        x_label="reference accuracy, % (log odds)",
        y_label="mean accuracy on shifted sets, % (log odds)",
        baseline=baseline,
        models=models,
    )
    weight = [row for row in rows if row["method"] == "weight"]
    names = dict.fromkeys(row["set"] for row in weight)
    series = {
        name: (
            [r["alpha"] for r in weight if r["set"] == name],
            [100 * r["accuracy"] for r in weight if r["set"] == name],
        )
        for name in names
    }
    return first, line_chart(
        series, title=f"Accuracy by set{label}", x_label="α", y_label="accuracy, %"
    )


def summary_table(rows: Sequence[Mapping[str, Any]], baseline: Baseline | None) -> Html:
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
        "Curve", charts(*curve_charts(rows, baseline, models)), summary_table(rows, baseline)
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
