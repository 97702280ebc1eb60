"""What ``bench.run`` returns, as files, as text, and beside an earlier run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsteer.io.files import FileFormatError, read_json, write_atomically
from clipsteer.testing.machine import machine

Record = dict[str, Any]


def write(
    path: Path,
    records: list[Record],
    device: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """A .csv file of the records, or (any other name) a .json file of them and the machine, of
    which ``facts`` may say more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        fields = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fields)
        writer.writeheader()
        writer.writerows(records)
        written = text.getvalue()
    else:
        found = {"machine": machine(device) | dict(facts or {}), "records": records}
        written = json.dumps(found, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(written.encode()))


def table(records: list[Record]) -> str:
    """``run``'s records as text."""
    op = _width(records, "op")
    shape = _width(records, "shape")
    head = f"{'op':<{op}}{'shape':<{shape}}{'pass':<18}{'contender':<20}"
    head += f"{'ms':>10}{'vs eager':>10}{'vs compiled':>13}{'of floor':>10}{'extra MB':>10}"
    lines = [head, "-" * len(head)]
    for r in records:
        compiled = f"{r['speedup_compiled']:>11.2f}×" if "speedup_compiled" in r else " " * 12
        share = f"{r['floor_share']:>9.0%}" if "floor_share" in r else " " * 9
        extra = f"{r['extra_bytes'] / 2**20:>10.1f}" if "extra_bytes" in r else ""
        what = f"{r['op']:<{op}}{r['shape']:<{shape}}{r['pass']:<18}{r['contender']:<20}"
        times = f"{1000 * r['seconds']:>10.2f}{r['speedup']:>9.2f}×{compiled}"
        lines.append(f"{what}{times}  {share}{extra}")
    return "\n".join(lines)


def _width(records: list[Record], name: str) -> int:
    return max([len(name), *(len(r[name]) for r in records)]) + 2


_TEXTS = ("op", "shape", "pass", "contender", "baseline", "version")
_NUMBERS = ("seconds", "speedup", "speedup_low", "speedup_high", "floor_share")


def read(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """The machine and the records of a .json file of ``run``, or of a script in benchmarks/.

    Raises FileFormatError for another file.
    """
    found = read_json(path)
    try:
        machine = found["machine"]
        parts = {name: machine[name] for name in ("chip", "threads")}
        records = found["records"]
        wrong = not isinstance(records, list) or not isinstance(parts["threads"], int)
        for record in records:
            needed = {"op", "shape", "pass", "contender"} - record.keys()
            # what was wrong was not timed
            timed = isinstance(record.get("wrong"), str) or bool(record["seconds"])
            texts = all(isinstance(record.get(name, ""), str) for name in _TEXTS)
            numbers = all(_is_number(record.get(name, 1.0)) for name in _NUMBERS)
            wrong |= bool(needed) or not texts or not numbers or not timed
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: not a file of clipsteer bench: {error!r}") from error
    if wrong or not isinstance(machine, dict):
        raise FileFormatError(f"{path}: not a file of clipsteer bench: a record is of another form")
    return machine, records


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= 1e30


def compare(old: str | Path, records: list[Record], device: str = "cpu") -> tuple[str, bool]:
    """What has changed beyond noise since ``old``, a .json file of ``run``, as text, and whether
    anything is slower.

    A speed is the ratio to the baseline that was timed beside it in the same run, so a busier or
    slower machine does not count. A change is one where the two runs' intervals of that ratio lie
    apart; a file without intervals gets ± 15 %.

    Raises FileFormatError for another file.
    """
    machine_then, records_then = read(old)
    before = {_key(r): r for r in records_then if "baseline" in r and "speedup" in r}
    there = {name: machine_then[name] for name in ("chip", "threads")}
    lines = []
    here = {name: value for name, value in machine(device).items() if name in there}
    if here != there:
        lines.append(f"measured on {there} then and {here} now: ratios of unlike machines")
    shared = 0
    changed = 0
    slower = False
    for now in records:
        then = before.get(_key(now))
        if then is None or now["contender"] == now["baseline"]:
            continue
        shared += 1
        low_then, high_then = _interval(then)
        low, high = _interval(now)
        if low <= high_then and high >= low_then:
            continue
        changed += 1
        way = "faster" if low > high_then else "slower"
        slower |= way == "slower"
        what = f"{now['op']} {now['shape']} {now['pass']} {now['contender']}"
        line = f"{way}: {what}: {then['speedup']:.2f}× [{low_then:.2f}, {high_then:.2f}] then, "
        line += f"{now['speedup']:.2f}× [{low:.2f}, {high:.2f}] now, against {now['baseline']}"
        lines.append(line)
    lines.append(f"{shared} figures compared, {changed} changed beyond noise")
    return "\n".join(lines), slower


def _interval(record: Mapping[str, Any]) -> tuple[float, float]:
    """Of the speed-up, in a record that may be older than intervals."""
    speedup = record["speedup"]
    low = record.get("speedup_low", speedup / 1.15)
    high = record.get("speedup_high", speedup * 1.15)
    return low, high


_KEY = ("op", "shape", "dtype", "threads", "pass", "contender", "baseline")


def _key(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(record.get(name, "")) for name in _KEY)
