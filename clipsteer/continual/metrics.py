"""What a class-incremental run has shown: accuracies by task, forgetting, prototype drift, time
and memory.

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
from clipsteer.training.settings import Range

DRIFTS = ("compensated", "uncompensated", "cosine_compensated", "cosine_uncompensated")
# name -> whether more is better
METRICS = {
    "A_last": True,
    "A_avg": True,
    "balanced": True,
    "forgetting": False,
    **{f"drift_{kind}": False for kind in DRIFTS},
    "seconds": False,
    "peak_mb": False,
}


@dataclass
class Record:
    """What was measured after one task; lists are by class, in class order."""

    correct: list[int]
    """test rows that were right"""
    count: list[int]
    """test rows"""
    seconds: float | None
    peak_mb: float | None = None
    drift: dict[str, list[float]] | None = None
    """kind, of DRIFTS -> error of each earlier class's prototype"""


@dataclass
class Run:
    """One strategy, one seed, and what was measured after each task.

    Args:
        strategy: its name.
        seed: of class order and training.
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
        order = self._seen(len(self.tasks))
        if not self.tasks or not all(self.tasks) or len(set(order)) != len(order):
            raise ValueError(
                f"Run: tasks must be lists of class ids, none empty, each id once, got {self.tasks}"
            )

    def add(
        self,
        t: int,
        predictions: Tensor,  # (N,)
        targets: Tensor,  # (N,)
        seconds: float | None = None,
        peak_mb: float | None = None,
        drift: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record what was measured after task t.

        Args:
            predictions, targets: class ids of all test rows of tasks 0 … t, in any order.
            seconds: that the task took; None where not measured.
            peak_mb: its peak memory; None where not measured.
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
        if predictions.dim() != 1 or predictions.shape != targets.shape:
            shapes = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
            raise ValueError(
                f"Run.add: predictions and targets must both be of shape (N,), got {shapes}"
            )
        predictions = predictions.cpu().long()
        targets = targets.cpu().long()
        for name, ids in (("predictions", predictions), ("targets", targets)):
            if strange := sorted(set(ids.tolist()) - set(self._seen(t))):
                raise ValueError(
                    f"Run.add: {name} after task {t} must be classes of tasks 0 … {t}, got "
                    f"{strange[:5]}"
                )
        record = Record(
            correct=self._tally(targets[predictions == targets], t),
            count=self._tally(targets, t),
            seconds=None if seconds is None else float(seconds),
            peak_mb=None if peak_mb is None else float(peak_mb),
            drift=None if drift is None else self._drift(drift, t),
        )
        if lacking := [j for j in range(t + 1) if not sum(self._of_task(record.count, j))]:
            raise ValueError(f"Run.add: no test row of task(s) {lacking}")
        self.records[t] = record

    def _tally(self, ids: Tensor, t: int) -> list[int]:
        """How often each class of tasks 0 … t occurs among (n,) ids, in class order."""
        seen = torch.tensor(self._seen(t))
        counts = torch.bincount(ids, minlength=int(seen.max()) + 1)
        return counts[seen].tolist()

    def _drift(self, drift: Mapping[str, Tensor], t: int) -> dict[str, list[float]]:
        old = len(self._seen(t)) - len(self.tasks[t])
        shapes = {kind: tuple(errors.shape) for kind, errors in drift.items()}
        if not set(shapes) <= set(DRIFTS) or set(shapes.values()) - {(old,)}:
            raise ValueError(
                f"Run.add: drift must hold ({old},) tensors, any of {DRIFTS}, got {shapes}"
            )
        return {kind: errors.tolist() for kind, errors in drift.items()}

    def _seen(self, t: int) -> list[int]:
        """Class ids of tasks 0 … t, in class order."""
        return [c for task in self.tasks[: t + 1] for c in task]

    def _of_task(self, by_class: Sequence[int], j: int) -> Sequence[int]:
        start = sum(map(len, self.tasks[:j]))
        return by_class[start : start + len(self.tasks[j])]

    @property
    def matrix(self) -> Tensor:
        """(T, T) float64: a[l, j], accuracy on task j's test rows after task l; NaN for j > l."""
        T = len(self.tasks)
        accuracy = torch.full((T, T), math.nan, dtype=torch.float64)
        for t, record in self.records.items():
            for j in range(t + 1):
                right = sum(self._of_task(record.correct, j))
                accuracy[t, j] = right / sum(self._of_task(record.count, j))
        return accuracy

    @property
    def seen(self) -> Tensor:
        """(T,) float64: accuracy on the test rows of all classes seen so far."""
        accuracy = torch.full((len(self.tasks),), math.nan, dtype=torch.float64)
        for t, record in self.records.items():
            accuracy[t] = sum(record.correct) / sum(record.count)
        return accuracy

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
        """Best accuracy before the last task − accuracy after it, mean over all tasks but the last.

        Below 0 where later tasks helped; 0 with a single task.
        """
        a = self.matrix
        # amax passes NaN on
        falls = [float(a[j:-1, j].amax() - a[-1, j]) for j in range(len(a) - 1)]
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
        """Kind of drift (see `add`) -> (T,) float64 means over the old classes.

        NaN where nothing was recorded.
        """
        unknown = torch.full((len(self.tasks),), math.nan, dtype=torch.float64)
        means = {kind: unknown.clone() for kind in DRIFTS}
        for t, record in self.records.items():
            for kind, errors in (record.drift or {}).items():
                if errors:
                    means[kind][t] = sum(errors) / len(errors)
        return means

    def value(self, metric: str) -> float:
        """One of METRICS; drift is the mean over tasks, seconds the sum and peak_mb the maximum of
        what is recorded.

        Raises ValueError for another name.
        """
        if metric not in METRICS:
            raise ValueError(f"Run.value: metric must be one of {tuple(METRICS)}, got {metric!r}")
        if metric.startswith("drift_"):
            return float(self.drift_error[metric.removeprefix("drift_")].nanmean())
        if metric not in ("seconds", "peak_mb"):
            return getattr(self, metric)
        costs = [getattr(record, metric) for record in self.records.values()]
        known = [cost for cost in costs if cost is not None]
        if not known:
            return math.nan
        return sum(known) if metric == "seconds" else max(known)

    def untimed(self) -> Run:
        """The same without seconds and memory, which differ each time that a run is repeated."""
        bare = {}
        for t, record in self.records.items():
            bare[t] = replace(record, seconds=None, peak_mb=None)
        return replace(self, records=bare)

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes an equal run; drift that is not finite becomes
        None."""
        records = {}
        for t, record in self.records.items():
            drift: dict[str, list[float | None]] = {}
            for kind, errors in (record.drift or {}).items():
                drift[kind] = [error if math.isfinite(error) else None for error in errors]
            records[str(t)] = vars(record) | {"drift": record.drift and drift}
        return {
            "strategy": self.strategy,
            "seed": self.seed,
            "tasks": self.tasks,
            "settings": self.settings,
            "records": records,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Raises FileFormatError where the data are not what `to_json` gives."""
        try:
            run = cls(data["strategy"], data["seed"], data["tasks"], data["settings"])
            if not isinstance(run.settings, dict):
                raise TypeError("settings must be an object")
            if not all(type(c) is int and 0 <= c < 1 << 31 for c in run._seen(len(run.tasks))):
                raise ValueError("tasks must hold class ids")
            for key, fields in data["records"].items():
                run.records[int(key)] = run._record(int(key), fields)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(f"not a run as Run.to_json gives it: {error!r}") from error
        return run

    def _record(self, t: int, fields: Mapping[str, Any]) -> Record:
        record = Record(**fields)
        classes = len(self._seen(t))
        if t not in range(len(self.tasks)) or not _are_counts(record, classes):
            raise ValueError(f"record {t} does not fit the tasks")
        costs = (record.seconds, record.peak_mb)
        if not all(cost is None or cost in Range("finite") for cost in costs):
            raise ValueError(f"seconds and peak_mb of record {t} must be finite, got {costs}")
        if record.drift is None:
            return record
        old = classes - len(self.tasks[t])
        drift = {}
        for kind, errors in record.drift.items():
            drift[kind] = [math.nan if error is None else float(error) for error in errors]
            if kind not in DRIFTS or len(errors) != old:
                raise ValueError(f"drift of record {t} must be lists of {old}, any of {DRIFTS}")
        return replace(record, drift=drift)


def _are_counts(record: Record, classes: int) -> bool:
    """Whether of each class as many rows are right as there are, at the most."""
    lists = (record.correct, record.count)
    if not all(isinstance(found, list) and len(found) == classes for found in lists):
        return False
    pairs = list(zip(*lists))
    are_whole = all(type(right) is int and type(n) is int for right, n in pairs)
    return are_whole and all(0 <= right <= n < 1 << 53 for right, n in pairs)


def by_strategy(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Strategies in the order in which they first occur, with their runs by seed.

    Raises ValueError for a strategy and seed that is there twice.
    """
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        members = found.setdefault(run.strategy, {})
        if members.setdefault(run.seed, run) is not run:
            raise ValueError(f"runs: {run.strategy} with seed {run.seed} is there twice")
    groups = {}
    for strategy, members in found.items():
        groups[strategy] = [members[seed] for seed in sorted(members)]
    return groups


def summarize(
    runs: Iterable[Run], metrics: Iterable[str] = METRICS
) -> dict[str, dict[str, dict[str, Any]]]:
    """strategy -> metric -> mean, sd, n, low and high of the 95 % t-interval over seeds (see
    `mean_interval`).

    Seeds whose value is NaN do not count; a metric of which no seed has a value is left out.
    """
    metrics = list(metrics)
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for strategy, members in by_strategy(runs).items():
        summary[strategy] = {}
        for metric in metrics:
            values = [run.value(metric) for run in members]
            known = [value for value in values if not math.isnan(value)]
            if known:
                summary[strategy][metric] = mean_interval(known)
    return summary


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
    differences = {}
    for run in groups[a]:
        if run.seed not in others:
            continue
        other = others[run.seed]
        if run.tasks != other.tasks:
            raise ValueError(f"paired: {a} and {b} had different tasks with seed {run.seed}")
        difference = run.value(metric) - other.value(metric)
        if not math.isnan(difference):
            differences[run.seed] = difference
    if not differences:
        raise ValueError(f"paired: {a} and {b} have no seed in common for which both have {metric}")
    found = mean_interval(list(differences.values()))
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "seeds": list(differences),
        "differences": list(differences.values()),
        **found,
        "apart": excludes_zero(found),
    }
