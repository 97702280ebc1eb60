"""What a class-incremental run has shown: accuracies by task, forgetting, prototype drift, time and
memory.

Sources: accuracies and forgetting as in Wu et al. 2025 (arXiv 2502.07560), forgetting from Chaudhry
et al. 2018 (arXiv 1801.10112); intervals: Student's t over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.report.intervals import excludes_zero, mean_interval

DRIFTS = ("compensated", "uncompensated", "cosine_compensated", "cosine_uncompensated")
# name -> whether more is better
METRICS = {
    **dict.fromkeys(("A_last", "A_avg", "balanced"), True),
    **dict.fromkeys(
        ("forgetting", *(f"drift_{kind}" for kind in DRIFTS), "seconds", "peak_mb"), False
    ),
}


@dataclass
class Record:
    """What was measured after one task. By class, in class order: how many test rows it has, how
    many were right."""

    correct: list[int]
    count: list[int]
    seconds: float | None
    peak_mb: float | None = None
    drift: dict[str, list[float]] | None = None


@dataclass
class Run:
    """One strategy, one seed, and what was measured after each task.

    Args:
        strategy: its name. seed: of class order and training.
        tasks: the class ids of each task, in the order in which they came.
        settings: whatever else is to be kept, JSON-able.
        records: task -> what was measured after it; filled by `add`. A strategy that learns all
            tasks at once may fill the last alone. What a missing record would tell is NaN.
    """

    strategy: str
    seed: int
    tasks: list[list[int]]
    settings: dict[str, Any] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = [c for task in self.tasks for c in task]
        if not self.tasks or not all(self.tasks) or len(set(order)) != len(order):
            raise ValueError(
                f"Run: tasks must be lists of class ids, none empty, each id once, got {self.tasks}"
            )

    def add(
        self,
        t: int,
        predictions: Tensor,
        targets: Tensor,
        seconds: float | None = None,
        peak_mb: float | None = None,
        drift: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record what was measured after task t.

        Args:
            predictions, targets: (N,) class ids of all test rows of tasks 0 … t, in any order.
            seconds: that the task took; peak_mb: its peak memory; None where not measured.
            drift: (C_old,) errors of the prototypes of earlier tasks' classes, in class order, any
                of: "compensated", "uncompensated": relative errors ‖μ̂ − μ‖/‖μ‖ with and without
                drift compensation; "cosine_compensated", "cosine_uncompensated": 1 − cos(μ̂, μ).

        Raises ValueError where t was recorded already, shapes do not fit, a class of no task so far
        occurs, or a task has no row.
        """
        if t not in range(len(self.tasks)) or t in self.records:
            raise ValueError(
                f"Run.add: t must be a task below {len(self.tasks)} not recorded yet, got {t}"
            )
        seen = self._seen(t)
        if predictions.dim() != 1 or predictions.shape != targets.shape:
            shapes = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
            raise ValueError(
                f"Run.add: predictions and targets must both be of shape (N,), got {shapes}"
            )
        predictions, targets = predictions.cpu().long(), targets.cpu().long()
        for name, ids in (("predictions", predictions), ("targets", targets)):
            if strange := sorted(set(ids.tolist()) - set(seen)):
                raise ValueError(
                    f"Run.add: {name} after task {t} must be classes of tasks 0 … {t}, got "
                    f"{strange[:5]}"
                )
        right = targets[predictions == targets]
        tally = lambda ids: torch.bincount(ids, minlength=max(seen) + 1)[
            torch.tensor(seen)
        ].tolist()
        costs = (None if cost is None else float(cost) for cost in (seconds, peak_mb))
        record = Record(tally(right), tally(targets), *costs)
        if lacking := [j for j in range(t + 1) if not sum(self._of_task(record.count, j))]:
            raise ValueError(f"Run.add: no test row of task(s) {lacking}")
        if drift is not None:
            old = len(seen) - len(self.tasks[t])
            shapes = {name: tuple(value.shape) for name, value in drift.items()}
            if not set(shapes) <= set(DRIFTS) or set(shapes.values()) - {(old,)}:
                raise ValueError(
                    f"Run.add: drift must hold ({old},) tensors, any of {DRIFTS}, got {shapes}"
                )
            record.drift = {name: value.tolist() for name, value in drift.items()}
        self.records[t] = record

    def _seen(self, t: int) -> list[int]:
        return [c for task in self.tasks[: t + 1] for c in task]

    def _of_task(self, by_class: Sequence[int], j: int) -> Sequence[int]:
        start = sum(map(len, self.tasks[:j]))
        return by_class[start : start + len(self.tasks[j])]

    @property
    def matrix(self) -> Tensor:
        """(T, T) float64: a[l, j], accuracy on task j's test rows after task l; NaN for j > l."""
        out = torch.full([len(self.tasks)] * 2, math.nan, dtype=torch.float64)
        for t, record in self.records.items():
            for j in range(t + 1):
                out[t, j] = sum(self._of_task(record.correct, j)) / sum(
                    self._of_task(record.count, j)
                )
        return out

    @property
    def seen(self) -> Tensor:
        """(T,) float64: accuracy on the test rows of all classes seen so far."""
        shares = {t: sum(record.correct) / sum(record.count) for t, record in self.records.items()}
        return torch.tensor(
            [shares.get(t, math.nan) for t in range(len(self.tasks))], dtype=torch.float64
        )

    @property
    def A_last(self) -> float:
        """Accuracy on all classes after the last task."""
        return float(self.seen[-1])

    @property
    def A_avg(self) -> float:
        """Mean over tasks of the accuracy on the classes seen by then."""
        return float(self.seen.mean())

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy before the last task − that after
        it.

        Below 0 where later tasks helped; 0 with a single task.
        """
        a = self.matrix
        falls = [
            float(a[j:-1, j].amax() - a[-1, j]) for j in range(len(a) - 1)
        ]  # amax passes NaN on
        return sum(falls) / len(falls) if falls else 0.0 * float(a[0, 0])

    @property
    def balanced(self) -> float:
        """Mean over classes of the share of their test rows that is right, after the last task."""
        record = self.records.get(len(self.tasks) - 1)
        if record is None:
            return math.nan
        shares = [right / n for right, n in zip(record.correct, record.count) if n]
        return sum(shares) / len(shares)

    @property
    def drift_error(self) -> dict[str, Tensor]:
        """Kind of drift (see `add`) -> (T,) float64 means over the old classes; NaN where nothing
        was recorded."""
        out = {
            kind: torch.full([len(self.tasks)], math.nan, dtype=torch.float64) for kind in DRIFTS
        }
        for t, record in self.records.items():
            for kind, values in (record.drift or {}).items():
                out[kind][t] = sum(values) / len(values) if values else math.nan
        return out

    def value(self, metric: str) -> float:
        """One of METRICS; drift is the mean over tasks, seconds the sum and peak_mb the maximum of
        what is recorded."""
        if metric not in METRICS:
            raise ValueError(f"Run.value: metric must be one of {tuple(METRICS)}, got {metric!r}")
        if metric.startswith("drift_"):
            return float(self.drift_error[metric.removeprefix("drift_")].nanmean())
        if metric in ("seconds", "peak_mb"):
            known = [
                v for record in self.records.values() if (v := getattr(record, metric)) is not None
            ]
            return math.nan if not known else sum(known) if metric == "seconds" else max(known)
        return getattr(self, metric)

    def untimed(self) -> Run:
        """The same without seconds and memory, which differ each time that a run is repeated."""
        bare = {
            t: replace(record, seconds=None, peak_mb=None) for t, record in self.records.items()
        }
        return replace(self, records=bare)

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes an equal run; a number that is not finite becomes
        None."""
        finite = lambda v: v if math.isfinite(v) else None
        records = {}
        for t, record in self.records.items():
            drift = record.drift and {
                kind: [finite(v) for v in values] for kind, values in record.drift.items()
            }
            records[str(t)] = vars(record) | {"drift": drift}
        return {name: getattr(self, name) for name in ("strategy", "seed", "tasks", "settings")} | {
            "records": records
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Raises FileFormatError where the data are not what `to_json` gives."""
        try:
            run = cls(data["strategy"], data["seed"], data["tasks"], data["settings"])
            for key, fields in data["records"].items():
                record, t = Record(**fields), int(key)
                if not len(record.correct) == len(record.count) == len(
                    run._seen(t)
                ) or t not in range(len(run.tasks)):
                    raise ValueError(f"record {key} does not fit the tasks")
                record.drift = record.drift and {
                    kind: [math.nan if v is None else v for v in values]
                    for kind, values in record.drift.items()
                }
                run.records[t] = record
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(f"not a run as Run.to_json gives it: {error!r}") from error
        return run


def by_strategy(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Strategies in the order in which they first occur, with their runs by seed; ValueError for a
    pair twice."""
    out: dict[str, dict[int, Run]] = {}
    for run in runs:
        if out.setdefault(run.strategy, {}).setdefault(run.seed, run) is not run:
            raise ValueError(f"runs: {run.strategy} with seed {run.seed} is there twice")
    return {strategy: [found[seed] for seed in sorted(found)] for strategy, found in out.items()}


def summarize(
    runs: Iterable[Run], metrics: Iterable[str] = METRICS
) -> dict[str, dict[str, dict[str, Any]]]:
    """strategy -> metric -> mean, sd, n, low and high of the 95 % t-interval over seeds (see
    `mean_interval`).

    Seeds whose value is NaN do not count; a metric of which no seed has a value is left out.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for strategy, members in by_strategy(runs).items():
        out[strategy] = {}
        for metric in metrics:
            values = [v for run in members if not math.isnan(v := run.value(metric))]
            if values:
                out[strategy][metric] = mean_interval(values)
    return out


def paired(runs: Iterable[Run], a: str, b: str, metric: str = "A_last") -> dict[str, Any]:
    """Differences a − b of a metric, seed by seed: mean, sd, n, low and high of the 95 %
    t-interval, and apart.

    ``apart`` says whether the interval excludes 0. It is False with one common seed, and where all
    seeds give the same difference, as frozen networks do: the interval is about seeds (class order,
    initial weights, batches), not about test images.

    Raises ValueError for an unknown strategy, no common seed with a value, or runs of a seed that
    had different tasks.
    """
    groups = by_strategy(runs)
    if a not in groups or b not in groups:
        raise ValueError(f"paired: strategies must be among {tuple(groups)}, got {a!r} and {b!r}")
    others = {run.seed: run for run in groups[b]}
    shared = [(run, others[run.seed]) for run in groups[a] if run.seed in others]
    if strange := [run.seed for run, other in shared if run.tasks != other.tasks]:
        raise ValueError(f"paired: {a} and {b} had different tasks with seed {strange[0]}")
    by_seed = {run.seed: run.value(metric) - other.value(metric) for run, other in shared}
    by_seed = {seed: gap for seed, gap in by_seed.items() if not math.isnan(gap)}
    if not by_seed:
        raise ValueError(f"paired: {a} and {b} have no seed in common for which both have {metric}")
    found = mean_interval(list(by_seed.values()))
    where = {
        "a": a,
        "b": b,
        "metric": metric,
        "seeds": list(by_seed),
        "differences": list(by_seed.values()),
    }
    return where | found | {"apart": excludes_zero(found)}
