"""Class-incremental runs for people: files of every figure, a page, and a summary in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from clipsteer.io.names import spoken
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
    stacked = torch.stack(list(lines)).double()  # (seeds, T)
    n = stacked.isfinite().sum(0)
    mean = stacked.nanmean(0)
    squares = (stacked - mean).square().nansum(0)
    sd = (squares / (n - 1).clamp(min=1)).sqrt()
    sd = sd.masked_fill(n < 2, math.nan)
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
    T = max(len(values) for lines in groups.values() for values in lines)
    tasks = range(1, T + 1)
    ticks = list(tasks[:: math.ceil(T / 12)])
    drawn = []
    for name, lines in groups.items():
        mean, low, high = _mean_sd(lines)
        drawn.append(Line(name, tasks, mean, band=(low, high)))
    return Chart(
        title,
        *drawn,
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
    charts = []
    for title, of in kinds.items():
        lines = {}
        for name, members in groups.items():
            lines[name] = [100 * of(run) for run in members]
        charts.append(curves(lines, title=title, y_label="accuracy, %"))
    return grid(*charts)


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
    measured = {}
    peak = 0.0
    for name, runs in groups.items():
        lines = {kind: [run.drift_error[kind] for run in runs] for kind in kinds}
        ends = torch.tensor([_mean_sd(errors) for errors in lines.values()])
        peak = max(peak, float(ends.nan_to_num().max()))
        if ends.isfinite().any():
            measured[name] = lines
    charts = []
    for name, lines in measured.items():
        charts.append(curves(lines, title=name, y_label="relative error", y_to=peak))
    return charts


def _note(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {what}" for name, what in value.items())
    return str(value)


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
    runs = list(runs)
    notes = dict(notes or {})
    groups = by_strategy(runs)
    reference = next(iter(groups), "") if reference is None else reference
    if not any(run.records for run in runs) or reference not in groups:
        raise ValueError(
            f"write_results: expected finished runs, and a reference among {tuple(groups)}: "
            f"{reference!r}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("runs.json", "table.csv", "matrix.csv", "index.html", "summary.md")
    as_json, table_csv, matrix_csv, page, summary = paths = [folder / name for name in names]
    plain = [run.to_json() for run in runs]
    write_json(as_json, {"format": FORMAT, "notes": notes, "runs": plain})
    write_csv(table_csv, [_values(run) for run in runs])
    write_csv(matrix_csv, [row for run in runs for row in _matrix_rows(run)])
    _page(runs, notes, reference, title).write(page)
    markdown = "\n".join(_summary(runs, notes, reference, title)) + "\n"
    write_atomically(summary, lambda file: file.write(spoken(markdown).encode()))
    return paths


def _values(run: Run) -> dict[str, Any]:
    """A row of table.csv; a value that is not known is blank."""
    row: dict[str, Any] = {"strategy": run.strategy, "seed": run.seed}
    for metric in METRICS:
        value = run.value(metric)
        row[metric] = "" if math.isnan(value) else value
    return row


def _matrix_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of matrix.csv."""
    accuracy = run.matrix.tolist()
    for t in sorted(run.records):
        for j in range(t + 1):
            yield {
                "strategy": run.strategy,
                "seed": run.seed,
                "after_task": t + 1,
                "on_task": j + 1,
                "accuracy": accuracy[t][j],
            }


def _sentences(runs: Sequence[Run]) -> list[str]:
    return [alike(runs, metric) for metric in ("A_last", "A_avg", "forgetting")]


def _page(runs: Sequence[Run], notes: Mapping[str, Any], reference: str, title: str) -> Page:
    groups = by_strategy(runs)
    seeds = sorted({run.seed for run in runs})
    tasks = max(len(run.tasks) for run in runs)
    page = Page(
        title,
        f"{len(groups)} strategies, {tasks} tasks, seeds {', '.join(map(str, seeds))}",
    )
    if notes:
        rows = [[name, _note(value)] for name, value in notes.items()]
        page.lead(table(["", ""], rows, words=True))
    page.section("Results", table(*results_table(runs), explained(runs)))
    differences = table(*differences_table(runs, reference), caution(runs, reference), words=True)
    page.section("Differences", differences, *_sentences(runs))
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
    drift = drift_table(runs)
    if drift[1]:
        page.section(
            "Prototype drift", table(*drift, DRIFT, words=True), grid(*drift_curves(groups))
        )
    page.section("Time and memory", table(*costs_table(runs)))
    return page


def _summary(
    runs: Sequence[Run], notes: Mapping[str, Any], reference: str, title: str
) -> list[str]:
    """Lines of Markdown."""
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {_note(value)}" for name, value in notes.items()]
    lines += ["", *markdown_table(*results_table(runs)), "", explained(runs), ""]
    lines += ["## Differences", "", *markdown_table(*differences_table(runs, reference))]
    lines += ["", caution(runs, reference), ""]
    lines += [f"- {sentence}" for sentence in _sentences(runs)]
    drift = drift_table(runs)
    if drift[1]:
        lines += ["", "## Prototype drift", "", *markdown_table(*drift), "", DRIFT]
    return lines


def read_results(path: str | Path) -> tuple[list[Run], dict[str, Any]]:
    """Runs and notes of a runs.json. Raises FileFormatError for another file."""
    data = read_json(path)
    known = isinstance(data, dict) and data.get("format") == FORMAT
    if not known or not isinstance(data.get("runs"), list):
        raise FileFormatError(f"{path}: expected runs of the format {FORMAT}")
    try:
        return [Run.from_json(run) for run in data["runs"]], dict(data["notes"])
    except (FileFormatError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: {error}") from error
