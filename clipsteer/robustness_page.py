"""Robustness curves for people: a chart on logit axes, a page, a CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipsteer._files import write_atomically
from clipsteer.report import (
    Axis,
    Chart,
    Dots,
    Html,
    Layer,
    Line,
    Page,
    Trend,
    grid,
    logit,
    markdown_table,
    percent,
    sigmoid,
    stats,
    table,
)
from clipsteer.robustness import ALPHAS, Baseline, averages, summary

NAMES = {"weight": "weight-space ensemble (WiSE-FT)", "output": "output-space ensemble"}
ENDS = {"zeroshot": "zero-shot", "finetuned": "fine-tuned", "default": "α = 0.5", "oracle": "oracle α"}
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
    """Shifted against reference accuracy in log odds, where the trend of ordinary models is a straight line.

    Args:
        lines: name -> rows with alpha, reference, reference_n, shifted, shifted_n, as `averages` gives them.
        x, y: labels.
        baseline, models: the fitted trend and the points that it was fitted to, as for `fit_baseline`.
    """
    layers: list[Layer] = []
    if baseline is not None:
        name = f"trend of {baseline.models} models trained on the reference alone"
        layers.append(Trend(name, baseline))
    layers.append(Dots([_smoothed(a, n) for a, n, _, _ in models], [_smoothed(b, m) for _, _, b, m in models]))
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
    rows: Sequence[Mapping[str, Any]], baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (), *, label: str = "",
) -> tuple[Chart, Chart]:  # fmt: skip
    """The curve on logit axes, and accuracy by set against alpha."""
    lines = averages(rows)
    by_method = {NAMES[m]: [row for row in lines if row["method"] == m] for m in NAMES}
    first = logit_chart(
        by_method, title=f"Shifted against reference accuracy{label}", x="reference accuracy, % (log odds)",
        y="mean accuracy on shifted sets, % (log odds)", baseline=baseline, models=models,
    )  # fmt: skip
    weight = [row for row in rows if row["method"] == "weight"]
    names = dict.fromkeys(row["set"] for row in weight)
    sets = {name: [row for row in weight if row["set"] == name] for name in names}
    second = [Line(name, [r["alpha"] for r in own], [100 * r["accuracy"] for r in own]) for name, own in sets.items()]
    return first, Chart(f"Accuracy by set{label}", *second, x="α", y="accuracy, %")


def summary_table(rows: Sequence[Mapping[str, Any]], baseline: Baseline | None) -> Html:
    body = []
    measures = [summary(rows, baseline), summary(rows, None, "balanced")]
    for method, name in NAMES.items():
        for end, title in ENDS.items():
            if (method == "output" and end in ("zeroshot", "finetuned")) or end not in measures[0][method]:
                continue
            row, balanced = measures[0][method][end], measures[1][method][end]
            label = title if end in ("zeroshot", "finetuned") else f"{name}, {title}"
            if end == "oracle":
                label += f" = {row['alpha']:g}"
                balanced = next(
                    r for r in averages(rows, "balanced") if (r["method"], r["alpha"]) == (method, row["alpha"])
                )
            cells = [label, percent(row["reference"]), percent(row["shifted"])]
            cells += [percent(balanced["reference"]), percent(balanced["shifted"])]
            if baseline is not None:
                cells.append(f"{100 * row['effective_robustness']:+.1f}")
            body.append(cells)
    headers = ["", "reference, %", "shifted, %", "balanced reference, %", "balanced shifted, %"]
    return table(
        headers + (["effective robustness, points"] if baseline is not None else []), body,
        "Shifted: mean over the shifted sets. The oracle α is chosen on what it is measured on: a bound, not a result.",
    )  # fmt: skip


def write_page(
    path: str | Path, rows: Sequence[Mapping[str, Any]], *, subtitle: str, baseline: Baseline | None = None,
    models: Sequence[tuple[float, int, float, int]] = (), footer: str = "",
) -> Path:  # fmt: skip
    """The page of one curve."""
    found = summary(rows, baseline)["weight"]
    page = Page("Robustness curve", subtitle, footer=footer)
    middle = found.get("default", found["oracle"])
    page.lead(
        stats([
            ("zero-shot, shifted", f"{percent(found['zeroshot']['shifted'])} %"),
            (f"α = {middle['alpha']:g}, shifted", f"{percent(middle['shifted'])} %"),
            ("fine-tuned, shifted", f"{percent(found['finetuned']['shifted'])} %"),
            ("fine-tuned, reference", f"{percent(found['finetuned']['reference'])} %"),
        ])
    )  # fmt: skip
    page.section("Curve", grid(*curve_charts(rows, baseline, models)), summary_table(rows, baseline))
    cells = [
        [f"{r['set']}, α = {r['alpha']:g}", r["correct"], r["n"], percent(r["accuracy"]),
         f"{percent(r['low'])} – {percent(r['high'])}", percent(r["balanced"])]
        for r in rows if r["method"] == "weight"
    ]  # fmt: skip
    caption = "Intervals: Clopper–Pearson, 95 %."
    page.section(
        "Every set", table(["weight space", "correct", "of", "accuracy, %", "interval", "balanced, %"], cells, caption)
    )
    return page.write(path)


def _gain(found: Mapping[str, Any], measure: str, name: str) -> str:
    gain = found[f"{measure}_gain_over_both_ends"][name]
    spread = "" if gain["sd"] is None else f" ± {100 * gain['sd']:.1f}"
    return f"{100 * gain['mean']:+.1f}{spread} ({gain['seeds_above_both']} of {len(gain['by_seed'])})"


_ACCURACY = ["tuned on", "zero-shot", "α = 0.5", "α from validation", "oracle α", "fine-tuned", "output space, α = 0.5"]
_GAINS = ["tuned on", "α = 0.5", "α from validation", "oracle α", "ρ zero-shot", "ρ α = 0.5", "ρ fine-tuned"]


def _experiment_tables(found: Mapping[str, Any], measure: str) -> tuple[list[list[str]], list[list[str]]]:
    pair = lambda row: f"{percent(row['reference'])} / {percent(row['shifted'])}"
    accuracy, gains = [], []
    for style, result in found["styles"].items():
        weight, output = result[measure]["weight"], result[measure]["output"]
        named = (f"{weight[name]['alpha']:g}: {pair(weight[name])}" for name in ("validation", "oracle"))
        ends = (pair(weight[name]) for name in ("zeroshot", "default"))
        accuracy.append([style, *ends, *named, pair(weight["finetuned"]), pair(output["default"])])
        robust = (f"{100 * weight[end]['effective_robustness']:+.1f}" for end in ("zeroshot", "default", "finetuned"))
        beaten = [_gain(result, measure, name) for name in ("default", "validation", "oracle")]
        gains.append([style, *beaten, *(robust if measure == "accuracy" else ())])
    return accuracy, gains


def write_experiment(
    stem: Path, found: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Path]:
    """The page, the Markdown summary and a chart for each style: what `style_shift.run` found, and its mean curves."""
    m, settings = found["machine"], found["concepts"]
    where = f"{m['chip']}, {m['threads']} thread(s), torch {m['torch']}, Python {m['python']}, {m['date']}"
    what = (
        f"EmojiCLIP tuned ({found['mode']}) on Classify-30 in one style, {settings['fit'] + settings['validation']} "
        "concepts; "
        f"test: {settings['test']} other concepts, in that style (reference) and in the two others (shifted). "
        f"Means over seeds {', '.join(map(str, found['seeds']))}. Cells: reference / mean of the shifted sets, %."
    )
    page = Page("WiSE-FT across drawing styles", what, footer=where)
    written = []
    accuracy, gains = _experiment_tables(found, "accuracy")
    balanced, balanced_gains = _experiment_tables(found, "balanced")
    explained = (
        "Gains on the mean of the shifted sets over the better of the two ends, in points: mean ± sd over seeds (seeds "
        "above both ends). The oracle α is chosen on the test sets, for each seed, and its gain comes out too high. "
        "ρ: effective robustness in points, against pixel classifiers trained on the reference style alone."
    )
    parts = [("Accuracy", _ACCURACY, accuracy, ""), ("Gains", _GAINS, gains, explained),
             ("Balanced accuracy", _ACCURACY, balanced, ""),
             ("Gains in balanced accuracy", _GAINS[:4], balanced_gains, "")]  # fmt: skip
    for heading, headers, cells, caption in parts:
        page.section(heading, table(headers, cells, caption))
    for style, result in found["styles"].items():
        own, baseline = curves[style], Baseline(**result["baseline"])
        drawn = curve_charts(own, baseline, result["models"], label=f", tuned on {style}")
        tried = [
            [f"{t['head']}, lr {t['lr']:g}, {t['epochs']} epochs, α = {t['alpha']:g}", percent(t["accuracy"]),
             f"{t['cross_entropy']:.3f}"]
            for t in result["tried"]
        ]  # fmt: skip
        chosen = result["chosen"]
        picks = (
            f"Chosen: head from {result['head']}, lr {chosen['lr']:g}, {chosen['epochs']} epochs, "
            f"α = {chosen['alpha']:g}."
        )
        page.section(
            f"Tuned on {style}", grid(*drawn), summary_table(own, baseline),
            table(["on validation concepts", "accuracy, %", "cross-entropy"], tried, picks),
        )  # fmt: skip
        path = stem.with_name(f"{stem.name}_{style}.svg")
        written += drawn[0].write(path)
    written.append(page.write(stem.with_suffix(".html")))
    lines = ["# WiSE-FT across drawing styles", "", what]
    for heading, headers, cells, caption in parts:
        lines += ["", f"## {heading}", "", *([caption, ""] if caption else []), *markdown_table(headers, cells)]
    given = {"styles": found["styles"], **{name: found[name] for name in ("seeds", "lrs", "epochs")}}
    if found["alphas"] != list(ALPHAS):
        given["alphas"] = found["alphas"]
    options = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in given.items())
    lines += ["", f"Repeat: `clipsteer wise-ft emoji --mode {found['mode']} {options} --out DIR`.", "", f"{where}.", ""]
    path = stem.with_suffix(".md")
    write_atomically(path, lambda file: file.write("\n".join(lines).encode()))
    return [*written, path]
