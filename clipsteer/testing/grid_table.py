"""What the records of `clipsteer.testing.grid` say: the smallest ratio, the mean, the cells where a
rival is faster, and tables of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipsteer.testing.records import Record
from clipsteer.testing.table import milliseconds, table_of

__all__ = ["Matrix", "Summary", "markdown", "matrices", "summary"]


@dataclass(frozen=True)
class Summary:
    """A grid in a few figures; each ratio is the fastest rival's time over ours.

    Attributes:
        ratios: how many cells have one.
        smallest, mean: the least, and the geometric mean.
        red: records below 1, the smallest ratio first.
        certain: how many of these are below 1 with their whole interval.
        wrong: records that were not timed, because a comparison was red or ours raised.
        alone: how many no rival could run.
    """

    ratios: int
    smallest: float
    mean: float
    red: tuple[Record, ...]
    certain: int
    wrong: tuple[Record, ...]
    alone: int

    def __str__(self) -> str:
        if not self.ratios:
            return "no cell has a ratio"
        red = f"{len(self.red)} below 1, {self.certain} of them with their whole interval"
        said = f"{self.ratios} ratios: smallest {self.smallest:.2f}×, geometric mean "
        return said + f"{self.mean:.2f}×; {red}; {len(self.wrong)} cells wrong"


def summary(records: Sequence[Record]) -> Summary:
    """Of records of `grid.run`."""
    compared = [r for r in records if "speedup" in r]
    ratios = [r["speedup"] for r in compared]
    red = sorted((r for r in compared if r["speedup"] < 1), key=lambda r: r["speedup"])
    wrong = [r for r in records if "wrong" in r]
    return Summary(
        ratios=len(ratios),
        smallest=min(ratios, default=math.nan),
        mean=math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan,
        red=tuple(red),
        certain=sum(r["speedup_high"] < 1 for r in red),
        wrong=tuple(wrong),
        alone=len(records) - len(ratios) - len(wrong),
    )


class Matrix(NamedTuple):
    """The ratios of all ops over all batches, NaN where there is none."""

    threads: int
    kind: str
    dtype: str
    ops: tuple[str, ...]
    rows: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]  # (ops, rows)

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{self.dtype}, {self.kind}, {threads}"


def matrices(records: Sequence[Record]) -> list[Matrix]:
    """One for each number of threads, pass and dtype that there are records of."""
    found = []
    for threads in _distinct(r["threads"] for r in records):
        for kind in _distinct(r["pass"] for r in records):
            for dtype in _distinct(r["dtype"] for r in records):
                key = (threads, kind, dtype)
                own = [r for r in records if (r["threads"], r["pass"], r["dtype"]) == key]
                if not own:
                    continue
                ratio = {(r["op"], r["rows"]): r.get("speedup", math.nan) for r in own}
                ops = tuple(_distinct(r["op"] for r in own))
                rows = tuple(sorted({r["rows"] for r in own}))
                values = [tuple(ratio.get((op, B), math.nan) for B in rows) for op in ops]
                found.append(Matrix(threads, kind, dtype, ops, rows, tuple(values)))
    return found


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


RED_HEADS = ("op", "shape", "dtype", "pass", "threads", "ratio", "95 %", "ours", "fastest rival")


def red_row(record: Record) -> tuple[str, ...]:
    """A record below 1, under `RED_HEADS`."""
    return (
        record["op"],
        record["shape"],
        record["dtype"],
        record["pass"],
        str(record["threads"]),
        f"{record['speedup']:.2f}",
        f"{record['speedup_low']:.2f} – {record['speedup_high']:.2f}",
        milliseconds(record["seconds"]),
        f"{milliseconds(record['seconds'] * record['speedup'])} ({record['baseline']})",
    )


def markdown(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """The figures, a table of every matrix, and the cells below 1 with their intervals."""
    found = summary(records)
    facts = f"{machine['chip']}, torch {machine.get('torch', 'of unknown version')}"
    lines = [f"# Every op beside its fastest rival\n\n{facts}. {found}.\n"]
    for matrix in matrices(records):
        head = ("op", *(f"{B:,}" for B in matrix.rows))
        rows = []
        for op, values in zip(matrix.ops, matrix.values):
            rows.append((op, *map(_cell, values)))
        lines.append(f"\n## {matrix.title}\n\n{table_of(head, rows)}")
    if found.red:
        lines.append(f"\n## Below 1\n\n{table_of(RED_HEADS, list(map(red_row, found.red)))}")
    if found.wrong:
        heads = ("op", "shape", "dtype", "pass", "threads", "what is wrong")
        rows = [tuple(str(r[name]) for name in (*heads[:-1], "wrong")) for r in found.wrong]
        lines.append(f"\n## Not timed\n\n{table_of(heads, rows)}")
    return "".join(lines)


def _cell(ratio: float) -> str:
    if math.isnan(ratio):
        return ""
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"
