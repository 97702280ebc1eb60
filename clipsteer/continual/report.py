"""Class-incremental runs for people: files of every figure, a page, and a summary in Markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer._intervals import clopper_pearson, excludes_zero, mean_interval, varies
from clipsteer.continual.metrics import METRICS, Run, by_strategy, paired, summarize
from clipsteer.io.files import FileFormatError, read_json, write_atomically, write_json
from clipsteer.report import (
    Html,
    Page,
    charts,
    heat_map,
    line_chart,
    markdown_table,
    percent,
    table,
    text,
    write_csv,
)

FORMAT = "clipsteer-cil-1"
DRIFT = (
    "‖μ̂ − μ‖/‖μ‖, and 1 − cos(μ̂, μ), between a prototype as it is kept and the true class mean "
    "under the network of "
    "today; mean over the classes of earlier tasks and over tasks."
)


def _mean_sd(lines: Sequence[Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Mean and mean ∓ standard deviation at each task; NaN where no, or fewer than two seeds have a
    value."""
    stacked = torch.stack(list(lines)).double()
    n = stacked.isfinite().sum(0)
    mean = stacked.nanmean(0)
    sd = (
        ((stacked - mean).square().nansum(0) / (n - 1).clamp(min=1))
        .sqrt()
        .masked_fill(n < 2, math.nan)
    )
    return mean.tolist(), (mean - sd).tolist(), (mean + sd).tolist()


def curves(
    groups: Mapping[str, Sequence[Tensor]],
    *,
    title: str,
    y_label: str,
    y_from: float | None = 0.0,
    y_to: float | None = None,
) -> Html:
    """name -> (T,) values of each seed: the mean over seeds against the task, with a band of ± a
    standard deviation."""
    drawn = {name: _mean_sd(lines) for name, lines in groups.items()}
    tasks = range(1, max(len(mean) for mean, _, _ in drawn.values()) + 1)
    ticks = [t for t in tasks if (t - 1) % math.ceil(len(tasks) / 12) == 0]
    return line_chart(
        {name: (list(tasks), mean) for name, (mean, _, _) in drawn.items()},
        title=title,
        x_label="after task",
        y_label=y_label,
        y_from=y_from,
        y_to=y_to,
        x_ticks=ticks,
        bands={name: ends for name, (_, *ends) in drawn.items()},
    )


def accuracy_curves(runs: Sequence[Run]) -> Html:
    """Accuracy on the classes seen, on the newest task and on the first, against the task."""
    groups = by_strategy(runs)
    kinds: dict[str, Callable[[Run], Tensor]] = {
        "Accuracy on all classes seen, %": lambda run: run.seen,
        "On the task just learnt, %": lambda run: run.matrix.diagonal(),
        "On the first task, %": lambda run: run.matrix[:, 0],
    }
    lines = lambda of: {
        name: [100 * of(run) for run in members] for name, members in groups.items()
    }
    return charts(
        *(curves(lines(of), title=title, y_label="accuracy, %") for title, of in kinds.items())
    )


def matrix_map(runs: Sequence[Run], title: str, peak: float) -> Html:
    """The mean over runs of the accuracy matrix, in per cent."""
    mean = torch.stack([run.matrix for run in runs]).mean(0)
    names = [str(t + 1) for t in range(len(mean))]
    return heat_map(
        mean.tolist(),
        title=title,
        rows=names,
        columns=names,
        peak=peak,
        show=percent,
        x_label="accuracy on task, %",
        y_label="after task",
    )


def matrix_maps(groups: Mapping[str, Sequence[Run]]) -> Html:
    """A map for each group of runs, all in one scale."""
    peak = max(float(run.matrix.nan_to_num().max()) for runs in groups.values() for run in runs)
    return charts(*(matrix_map(runs, name, peak) for name, runs in groups.items()))


def drift_curves(groups: Mapping[str, Sequence[Run]]) -> list[Html]:
    """For each group that has it, the prototypes' error with and without compensation, against the
    task; one scale."""
    kinds = ("uncompensated", "compensated")
    lines = {
        name: {k: [run.drift_error[k] for run in runs] for k in kinds}
        for name, runs in groups.items()
    }
    ends = {
        name: torch.tensor([_mean_sd(found) for found in by_kind.values()])
        for name, by_kind in lines.items()
    }
    peak = max((float(e.nan_to_num().max()) for e in ends.values()), default=0.0)
    return [
        curves(by_kind, title=name, y_label="relative error", y_to=peak)
        for name, by_kind in lines.items()
        if ends[name].isfinite().any()
    ]


def _note(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, Mapping)
        else str(value)
    )


def write_results(
    folder: str | Path,
    runs: Iterable[Run],
    notes: Mapping[str, Any] | None = None,
    *,
    reference: str | None = None,
    title: str = "Class-incremental learning",
) -> list[Path]:
    """runs.json, table.csv, matrix.csv, index.html and summary.md, in ``folder``.

    Args:
        runs: of every strategy and seed; each pair once.
        notes: what the reader needs to know, JSON-able: data, model, machine, the command that
            repeats it.
        reference: the strategy that the others are compared with; by default the first.

    Raises ValueError where no run has a record, or the reference is not among the strategies.
    """
    runs, notes = list(runs), dict(notes or {})
    groups = by_strategy(runs)
    reference = next(iter(groups), "") if reference is None else reference
    if not any(run.records for run in runs) or reference not in groups:
        raise ValueError(
            f"write_results: expected finished runs, and a reference among {tuple(groups)}: "
            f"{reference!r}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        folder / name
        for name in ("runs.json", "table.csv", "matrix.csv", "index.html", "summary.md")
    ]
    write_json(
        paths[0], {"format": FORMAT, "notes": notes, "runs": [run.to_json() for run in runs]}
    )
    blank = lambda v: "" if isinstance(v, float) and math.isnan(v) else v
    head = lambda run: {"strategy": run.strategy, "seed": run.seed}
    write_csv(paths[1], [head(run) | {m: blank(run.value(m)) for m in METRICS} for run in runs])
    write_csv(
        paths[2],
        [
            head(run) | {"after_task": t + 1, "on_task": j + 1, "accuracy": float(run.matrix[t, j])}
            for run in runs
            for t in sorted(run.records)
            for j in range(t + 1)
        ],
    )
    results, differences, drift = (
        results_table(runs),
        differences_table(runs, reference),
        drift_table(runs),
    )
    sentences = [alike(runs, metric) for metric in ("A_last", "A_avg", "forgetting")]
    seeds = sorted({run.seed for run in runs})
    warning = caution(runs, reference)
    page = Page(
        title,
        f"{len(groups)} strategies, {max(len(run.tasks) for run in runs)} tasks, "
        f"seeds {', '.join(map(str, seeds))}",
    )
    if notes:
        page.lead(table(["", ""], [[k, _note(v)] for k, v in notes.items()], words=True))
    page.section("Results", table(*results, explained(runs)))
    page.section("Differences", table(*differences, warning, words=True), *sentences)
    page.section(
        "Accuracy, task by task",
        accuracy_curves(runs),
        text("Lines are means over seeds, bands ± one standard deviation.", css="note"),
    )
    page.section(
        "Accuracy matrices",
        "Each row: accuracy on every task so far, after one more task was learnt; "
        "mean over seeds, all strategies in one scale.",
        matrix_maps(groups),
    )
    if drift[1]:
        page.section(
            "Prototype drift", table(*drift, DRIFT, words=True), charts(*drift_curves(groups))
        )
    page.section("Time and memory", table(*costs_table(runs)))
    page.write(paths[3])
    lines = [
        f"# {title}",
        "",
        *(f"- {k}: {_note(v)}" for k, v in notes.items()),
        "",
        *markdown_table(*results),
        "",
    ]
    lines += [
        explained(runs),
        "",
        "## Differences",
        "",
        *markdown_table(*differences),
        "",
        warning,
        "",
    ]
    lines += [f"- {sentence}" for sentence in sentences]
    if drift[1]:
        lines += ["", "## Prototype drift", "", *markdown_table(*drift), "", DRIFT]
    write_atomically(paths[4], lambda file: file.write(("\n".join(lines) + "\n").encode()))
    return paths


def read_results(path: str | Path) -> tuple[list[Run], dict[str, Any]]:
    """Runs and notes of a runs.json. Raises FileFormatError for another file."""
    data = read_json(path)
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not isinstance(data.get("runs"), list)
    ):
        raise FileFormatError(f"{path}: expected runs of the format {FORMAT}")
    try:
        return [Run.from_json(run) for run in data["runs"]], dict(data["notes"])
    except (FileFormatError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: {error}") from error


TITLES = {
    "A_last": "A_last, %",
    "A_avg": "A_avg, %",
    "balanced": "balanced, %",
    "forgetting": "forgetting, points",
    "seconds": "seconds",
    "peak_mb": "peak MB",
}


_ERRORS = {"relative": "", "1 − cosine": "cosine_"}


COMPARED = ("A_last", "A_avg", "balanced", "forgetting")


def explained(runs: Sequence[Run]) -> str:
    """What the columns of the table of results are."""
    orders = {str(run.tasks) for run in runs}
    wide = (
        " Seeds differ in class order too: compare strategies seed by seed, below."
        if len(orders) > 1
        else ""
    )
    return (
        "Mean over seeds ± half of its 95 % t-interval. A_last: accuracy on all classes after the "
        "last task. A_avg: "
        "mean over tasks of the accuracy on the classes seen by then. Balanced: mean over classes "
        "of their accuracy, "
        f"after the last task. Forgetting: by how much earlier tasks fell from their best, mean "
        f"over tasks.{wide}"
    )


def shown(metric: str, value: float, sign: str = "") -> str:
    """A value of a metric as the tables have it."""
    if metric in COMPARED:
        return f"{100 * value:{sign}.1f}"
    return (
        f"{value:{sign}.3f}"
        if metric.startswith("drift_")
        else f"{value:{sign},.{0 if abs(value) >= 100 else 1}f}"
    )


def _cell(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    bare = found["low"] is None or metric in ("seconds", "peak_mb")
    spread = "" if bare else f"\u00a0±\u00a0{shown(metric, found['high'] - found['mean'])}"
    return shown(metric, found["mean"]) + spread


def _difference(metric: str, found: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval, and in words what it shows."""
    if found is None:
        return "–"
    mean = shown(metric, found["mean"], "+")
    if found["low"] is None:
        return f"{mean} one\u00a0seed:\u00a0cannot\u00a0be\u00a0judged"
    if not varies(found):
        return f"{mean} the\u00a0same\u00a0at\u00a0every\u00a0seed"
    verdict = "cannot be told apart"
    if excludes_zero(found):
        verdict = "better" if (found["mean"] > 0) == METRICS[metric] else "worse"
    figures = f"{mean} ({shown(metric, found['low'], '+')} … {shown(metric, found['high'], '+')})"
    # figures in one line, the verdict in another where room is short
    return " ".join(part.replace(" ", "\u00a0") for part in (figures, verdict))


def _pair(runs: Sequence[Run], a: str, b: str, metric: str) -> dict[str, Any] | None:
    """`paired`, or None without a common seed that has a value."""
    has = (
        {run.seed for run in runs if run.strategy == s and not math.isnan(run.value(metric))}
        for s in (a, b)
    )
    return paired(runs, a, b, metric) if set.intersection(*has) else None


def results_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """A row for each strategy; metrics that no run has are left out."""
    found = summarize(runs, TITLES)
    metrics = [m for m in TITLES if any(m in row for row in found.values())]
    rows = [
        [name, *(_cell(m, row.get(m)) for m in metrics), str(len(by_strategy(runs)[name]))]
        for name, row in found.items()
    ]
    return ["strategy", *(TITLES[m] for m in metrics), "seeds"], rows


def differences_table(runs: Sequence[Run], reference: str) -> tuple[list[str], list[list[str]]]:
    """The reference minus each other strategy, over the seeds that both have."""
    others = [name for name in by_strategy(runs) if name != reference]
    rows = [
        [f"{reference} − {b}", *(_difference(m, _pair(runs, reference, b, m)) for m in COMPARED)]
        for b in others
    ]
    return ["difference", *(TITLES[m].replace(", %", ", points") for m in COMPARED)], rows


def alike(runs: Sequence[Run], metric: str = "A_last") -> str:
    """Which pairs of strategies a metric cannot tell apart, in a sentence."""
    pairs = list(itertools.combinations(by_strategy(runs), 2))
    found = {(a, b): _pair(runs, a, b, metric) for a, b in pairs}
    judged = {p: f for p, f in found.items() if f is not None and f["low"] is not None}
    metric = metric[0].upper() + metric[1:]
    if not judged:
        return f"{metric}: no two strategies have two seeds in common, so none can be compared."
    same = [f"{a} and {b}" for (a, b), f in judged.items() if not excludes_zero(f)]
    if not same:
        return f"{metric} tells every pair of strategies apart ({len(judged)})."
    return f"{metric} cannot tell apart {len(same)} of {len(judged)} pairs of strategies: {'; '.join(same)}."


def drift_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """What compensation does to the error of old prototypes, seed by seed; strategies without both
    are left out."""
    rows = []
    for (strategy, members), (name, kind) in itertools.product(
        by_strategy(runs).items(), _ERRORS.items()
    ):
        ends = (
            [run.value(f"drift_{kind}{way}") for run in members]
            for way in ("compensated", "uncompensated")
        )
        pairs = [(a, b) for a, b in zip(*ends) if not math.isnan(a + b)]
        if pairs:
            after, before = (
                _cell("drift_compensated", mean_interval(values)) for values in zip(*pairs)
            )
            gap = _difference("drift_compensated", mean_interval([a - b for a, b in pairs]))
            rows.append([strategy, name, before, after, gap, str(len(pairs))])
    return [
        "strategy",
        "error",
        "uncompensated",
        "compensated",
        "compensated − uncompensated",
        "seeds",
    ], rows


def costs_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Mean seconds of each task and in all, and the largest peak."""
    T, rows = max(len(run.tasks) for run in runs), []
    for strategy, members in by_strategy(runs).items():
        row = [strategy]
        for t in range(T):
            records = [run.records[t] for run in members if t in run.records]
            spent = [record.seconds for record in records if record.seconds is not None]
            row.append(shown("seconds", mean_interval(spent)["mean"]) if spent else "–")
        found = summarize(members).get(strategy, {})
        rows.append([*row, *(_cell(m, found.get(m)) for m in ("seconds", "peak_mb"))])
    return ["seconds", *(f"task {t + 1}" for t in range(T)), "in all", "peak MB"], rows


def caution(runs: Sequence[Run], reference: str) -> str:
    """How the table of differences is to be read."""
    groups = by_strategy(runs)
    comparisons = (len(groups) - 1) * len(COMPARED)
    said = (
        "Differences are taken seed by seed, with the 95 % t-interval of their mean in brackets; "
        "better and worse are "
        f"said where it excludes 0. The intervals are not corrected for the {comparisons} "
        f"comparisons of the table: of "
        f"so many between equals, {comparisons / 20:.1f} would seem real by chance. They are about "
        f"seeds, not about "
        "test images, which all seeds share."
    )
    records = [
        run.records[len(run.tasks) - 1]
        for run in groups[reference]
        if len(run.tasks) - 1 in run.records
    ]
    if not records:
        return said
    right, n = sum(records[0].correct), sum(records[0].count)
    low, high = clopper_pearson(right, n)
    return (
        f"{said} One of {n} images is {100 / n:.2f} points, and an accuracy of "
        f"{percent(right / n)} % on so many has a "
        f"95 % Clopper–Pearson interval of {percent(low)} – {percent(high)} %."
    )
