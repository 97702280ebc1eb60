"""Class-incremental runs for people: files of every figure, a page, and a summary in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.continual.metrics import METRICS, Run, by_strategy
from clipsteer.continual.tables import (
    alike,
    caution,
    costs_table,
    differences_table,
    drift_table,
    explained,
    results_table,
)
from clipsteer.io.files import FileFormatError, read_json, write_atomically, write_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Cells, Line
from clipsteer.report.page import (
    Html,
    Page,
    grid,
    markdown_table,
    percent,
    table,
    text,
    write_csv,
)

FORMAT = "clipsteer-cil-1"
DRIFT = (
    "‖μ̂ − μ‖/‖μ‖, and 1 − cos(μ̂, μ), between a prototype as it is kept and the true class mean "
    "under the network of today; mean over the classes of earlier tasks and over tasks."
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
) -> Chart:
    """name -> (T,) values of each seed: the mean over seeds against the task, with a band of ± a
    standard deviation."""
    drawn = {name: _mean_sd(lines) for name, lines in groups.items()}
    tasks = range(1, max(len(mean) for mean, _, _ in drawn.values()) + 1)
    ticks = [t for t in tasks if (t - 1) % math.ceil(len(tasks) / 12) == 0]
    return Chart(
        title,
        *(Line(name, tasks, mean, band=(low, high)) for name, (mean, low, high) in drawn.items()),
        x=Axis("after task", ticks=ticks),
        y=Axis(y_label, low=y_from, high=y_to),
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
    return grid(
        *(curves(lines(of), title=title, y_label="accuracy, %") for title, of in kinds.items())
    )


def matrix_map(runs: Sequence[Run], title: str, peak: float) -> Chart:
    """The mean over runs of the accuracy matrix, in per cent."""
    mean = torch.stack([run.matrix for run in runs]).mean(0)
    names = [str(t + 1) for t in range(len(mean))]
    cells = Cells(mean.tolist(), rows=names, columns=names, peak=peak, show=percent)
    return Chart(title, cells, x="accuracy on task, %", y="after task")


def matrix_maps(groups: Mapping[str, Sequence[Run]]) -> Html:
    """A map for each group of runs, all in one scale."""
    peak = max(float(run.matrix.nan_to_num().max()) for runs in groups.values() for run in runs)
    return grid(*(matrix_map(runs, name, peak) for name, runs in groups.items()))


def drift_curves(groups: Mapping[str, Sequence[Run]]) -> list[Chart]:
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
        f"{len(groups)} strategies, {max(len(run.tasks) for run in runs)} tasks, seeds "
        f"{', '.join(map(str, seeds))}",
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
        "Each row: accuracy on every task so far, after one more task was learnt; mean over "
        "seeds, all strategies in one scale.",
        matrix_maps(groups),
    )
    if drift[1]:
        page.section(
            "Prototype drift", table(*drift, DRIFT, words=True), grid(*drift_curves(groups))
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
