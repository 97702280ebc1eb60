"""The tables of speeds in benchmarks/README.md, made from the files that ``bench`` and the scripts
in benchmarks/ write.

    clipsteer bench --markdown benchmarks/results/cpu-*.json --into benchmarks/README.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from clipsteer.io.files import read_text, write_atomically
from clipsteer.ops import BACKENDS
from clipsteer.testing.records import read

__all__ = ["markdown", "put"]

BEGIN = "<!-- bench -->\n"
END = "<!-- /bench -->\n"
# ways of ours that a stage's contenders are named by
_STAGES = ("kept buffer", "row-sparse", "fresh")
# yardsticks, which do not compute the op's result, and what a shape of these has in its label
_NO_RIVALS = {
    ("conceptor_project", "one GEMM"): "",
    ("drrho_loss", "ClipLoss, no reference"): "-r",
}

Groups = dict[tuple[str, ...], dict[str, dict[str, Any]]]


def ours(contender: str) -> bool:
    """Whether this is a way of ours to run an op."""
    return contender in (*BACKENDS, *_STAGES) or contender.startswith("clipsteer")


def is_rival(op: str, shape: str, contender: str) -> bool:
    """Whether a way that is not ours computes the op's result at a shape of this label."""
    mark = _NO_RIVALS.get((op, contender))
    return mark is None or mark not in shape


def markdown(files: Sequence[str | Path]) -> str:
    """A table for each machine and number of threads, in the order of the files: each way of ours
    to run an op, next to the fastest of the others, and the share of the floor that it reaches
    (where the file says). Of an op, shape and pass that two files hold, the later one counts.

    Raises FileFormatError for other files.
    """
    machines: dict[str, Groups] = {}
    for file in files:
        machine, records = read(file)
        threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
        torch_version = str(machine.get("torch", "of unknown version")).partition("+")[0]
        where = f"{machine['chip']}, {threads}, torch {torch_version}"
        new: Groups = {}
        for r in records:
            if "wrong" in r:
                continue
            group = new.setdefault((r["op"], r["shape"], r["pass"]), {})
            group[r["contender"]] = r
        machines.setdefault(where, {}).update(new)
    parts = []
    for where, groups in machines.items():
        parts.append(f"{where}:\n\n{_best(groups)}{_peers(groups)}")
    return "\n".join(parts)


def _best(groups: Groups) -> str:
    """Each way of ours next to the fastest of the others; an op's name stands above its rows."""
    rows: list[tuple[str, ...]] = []
    above = ""
    for (op, shape, kind), found in groups.items():
        mine = []
        rivals = []
        for name, record in found.items():
            if ours(name):
                mine.append(record)
            elif is_rival(op, shape, name):
                rivals.append(record)
        if not mine or not rivals:
            continue
        best = min(rivals, key=lambda record: record["seconds"])
        baseline = f"{milliseconds(best['seconds'])} ({best['contender']})"
        if op != above:
            rows.append((f"**{op}**", *[""] * 6))
            above = op
        for record in mine:
            seconds = record["seconds"]
            time = milliseconds(seconds)
            if len(mine) > 1:
                time += f" ({record['contender']})"
            ratio = f"{best['seconds'] / seconds:.2f}×"
            floor = ""
            share = ""
            if "floor_share" in record:
                floor = milliseconds(seconds * record["floor_share"])
                share = f"{record['floor_share']:.0%}"
            rows.append((shape, kind, time, baseline, ratio, floor, share))
    return table_of(
        ("op, shape", "pass", "ours", "best baseline", "ratio", "floor", "of floor"),
        rows,
    )


def _peers(groups: Groups) -> str:
    """Where other libraries took part: everyone's time, a row each, and how many times ours it is;
    of the shapes that the same ones were timed at, a column each."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for (op, shape, _), found in groups.items():
        if not any("version" in r for r in found.values()) or not any(map(ours, found)):
            continue
        base = next(record["seconds"] for name, record in found.items() if ours(name))
        names = [op]
        cells = [shape]
        for name, record in found.items():
            names.append(f"{name} {record.get('version', '')}".strip())
            cells.append(f"{milliseconds(record['seconds'])} ({record['seconds'] / base:.2f}×)")
        tables.setdefault(tuple(names), []).append(tuple(cells))
    parts = []
    for contenders, columns in tables.items():
        head, *rows = zip(contenders, *columns)
        parts.append("\n" + table_of(head, rows))
    return "".join(parts)


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in (head, *rows)]
    rule = "|" + "---|" * len(head) + "\n"
    return lines[0] + rule + "".join(lines[1:])


def milliseconds(seconds: float) -> str:
    """A time in three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{1000 * seconds:,.0f} ms"


def put(file: str | Path, table: str) -> None:
    """Write ``table`` between the two marks in a text file.

    Raises ValueError where there is no such pair.
    """
    text = read_text(file)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"bench: {file} has no lines {BEGIN.strip()} and {END.strip()}")
    text = before + begin + table + end + after

    def write(target: BinaryIO) -> None:
        target.write(text.encode())

    write_atomically(file, write)
