"""Class-incremental runs in tables and sentences: results, differences, drift, costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipsteer.continual.metrics import METRICS, Run, by_strategy, paired, summarize
from clipsteer.report.intervals import clopper_pearson, excludes_zero, mean_interval, varies
from clipsteer.report.page import percent

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
        "last task. A_avg: mean over tasks of the accuracy on the classes seen by then. Balanced: "
        "mean over classes of their accuracy, after the last task. Forgetting: by how much "
        f"earlier tasks fell from their best, mean over tasks.{wide}"
    )


def shown(metric: str, value: float, sign: str = "") -> str:
    """A value of a metric as the tables have it."""
    if metric in COMPARED:
        return f"{100 * value:{sign}.1f}"
    if metric.startswith("drift_"):
        return f"{value:{sign}.3f}"
    digits = 0 if abs(value) >= 100 else 1
    return f"{value:{sign},.{digits}f}"


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
    seeds: dict[str, set[int]] = {a: set(), b: set()}
    for run in runs:
        if run.strategy in seeds and not math.isnan(run.value(metric)):
            seeds[run.strategy].add(run.seed)
    return paired(runs, a, b, metric) if seeds[a] & seeds[b] else None


def results_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """A row for each strategy; metrics that no run has are left out."""
    found = summarize(runs, TITLES)
    groups = by_strategy(runs)
    metrics = [m for m in TITLES if any(m in row for row in found.values())]
    rows = []
    for name, row in found.items():
        cells = [_cell(metric, row.get(metric)) for metric in metrics]
        rows.append([name, *cells, str(len(groups[name]))])
    return ["strategy", *(TITLES[metric] for metric in metrics), "seeds"], rows


def differences_table(runs: Sequence[Run], reference: str) -> tuple[list[str], list[list[str]]]:
    """The reference minus each other strategy, over the seeds that both have."""
    rows = []
    for other in by_strategy(runs):
        if other == reference:
            continue
        row = [f"{reference} − {other}"]
        for metric in COMPARED:
            row.append(_difference(metric, _pair(runs, reference, other, metric)))
        rows.append(row)
    return ["difference", *(TITLES[m].replace(", %", ", points") for m in COMPARED)], rows


def alike(runs: Sequence[Run], metric: str = "A_last") -> str:
    """Which pairs of strategies a metric cannot tell apart, in a sentence."""
    judged = 0
    same = []
    for a, b in itertools.combinations(by_strategy(runs), 2):
        found = _pair(runs, a, b, metric)
        if found is None or found["low"] is None:
            continue
        judged += 1
        if not excludes_zero(found):
            same.append(f"{a} and {b}")
    metric = metric[0].upper() + metric[1:]
    if not judged:
        return f"{metric}: no two strategies have two seeds in common, so none can be compared."
    if not same:
        return f"{metric} tells every pair of strategies apart ({judged})."
    named = "; ".join(same)
    return f"{metric} cannot tell apart {len(same)} of {judged} pairs of strategies: {named}."


def drift_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """What compensation does to the error of old prototypes, seed by seed; strategies without both
    are left out."""
    rows = []
    for strategy, members in by_strategy(runs).items():
        for name, kind in _ERRORS.items():
            pairs = [
                (run.value(f"drift_{kind}compensated"), run.value(f"drift_{kind}uncompensated"))
                for run in members
            ]
            known = [pair for pair in pairs if not math.isnan(sum(pair))]
            if known:
                rows.append([strategy, name, *_drift_cells(known), str(len(known))])
    return [
        "strategy",
        "error",
        "uncompensated",
        "compensated",
        "compensated − uncompensated",
        "seeds",
    ], rows


def _drift_cells(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Of (compensated, uncompensated) errors: before, after and their difference."""
    metric = "drift_compensated"
    after = mean_interval([compensated for compensated, _ in pairs])
    before = mean_interval([uncompensated for _, uncompensated in pairs])
    gap = mean_interval([compensated - uncompensated for compensated, uncompensated in pairs])
    return [_cell(metric, before), _cell(metric, after), _difference(metric, gap)]


def costs_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Mean seconds of each task and in all, and the largest peak."""
    T = max(len(run.tasks) for run in runs)
    rows = []
    for strategy, members in by_strategy(runs).items():
        row = [strategy]
        for t in range(T):
            records = [run.records[t] for run in members if t in run.records]
            spent = [record.seconds for record in records if record.seconds is not None]
            row.append(shown("seconds", mean_interval(spent)["mean"]) if spent else "–")
        found = summarize(members).get(strategy, {})
        for metric in ("seconds", "peak_mb"):
            row.append(_cell(metric, found.get(metric)))
        rows.append(row)
    return ["seconds", *(f"task {t + 1}" for t in range(T)), "in all", "peak MB"], rows


def caution(runs: Sequence[Run], reference: str) -> str:
    """How the table of differences is to be read."""
    groups = by_strategy(runs)
    comparisons = (len(groups) - 1) * len(COMPARED)
    said = (
        "Differences are taken seed by seed, with the 95 % t-interval of their mean in brackets; "
        "better and worse are said where it excludes 0. The intervals are not corrected for the "
        f"{comparisons} comparisons of the table: of so many between equals, "
        f"{comparisons / 20:.1f} would seem real by chance. They are about seeds, not about test "
        "images, which all seeds share."
    )
    records = [
        run.records[len(run.tasks) - 1]
        for run in groups[reference]
        if len(run.tasks) - 1 in run.records
    ]
    if not records:
        return said
    right = sum(records[0].correct)
    n = sum(records[0].count)
    low, high = clopper_pearson(right, n)
    return (
        f"{said} One of {n} images is {100 / n:.2f} points, and an accuracy of "
        f"{percent(right / n)} % on so many has a 95 % Clopper–Pearson interval of {percent(low)} "
        f"– {percent(high)} %."
    )
