"""A top-k SAE on tokens of a real ViT, ours and the peers': held-out FVU at equal steps and at equal processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.real_vit.sae --tokens tokens.safetensors \\
        --out benchmarks/results/real_vit/sae.json

Every library takes the same batches and has the same grid of learning rates with a linear decay to 0; the best on
validation pictures (first seed) is tried with the library's own schedule as well, and the better of the two is run with
all seeds and reported on test pictures. clipsteer has its defaults beside. Runs are kept in a folder (``--runs``) and
are not repeated; results of other sizes, lengths and libraries that are in the file stay there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_vit.sae_cell import Rows, run, split
from benchmarks.real_vit.sae_libraries import LIBRARIES, Job, versions
from clipsteer.io.files import read_safetensors, write_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line


def searched(base: Job, lrs: Iterable[float], schedules: Sequence[str], rows: Rows, folder: Path) -> Job:
    """The learning rate, with the first schedule, and then the schedule of the least FVU on validation rows."""

    def judged(job: Job) -> float:
        return run(job, rows, folder)["validation"]

    best = min((base._replace(lr=lr, schedule=schedules[0]) for lr in lrs), key=judged)
    return min((best._replace(schedule=schedule) for schedule in schedules), key=judged)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of a result what another of the same kind takes the place of."""
    return row["n"], row["steps"], row["library"], row["lr"] is None


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with 95 % t-intervals where there are several."""
    first = records[0]
    names = ("library", "lr", "schedule", "steps", "n", "k", "batch")
    found: dict[str, Any] = {name: first[name] for name in names}
    for name in ("test", "dead", "processor_seconds"):
        values = [record[name] for record in records]
        found[name] = mean_interval(values) if len(values) > 1 else {"mean": values[0]}
    return found | {"seeds": len(records), "curves": [record["curve"] for record in records]}


def curves(found: list[dict[str, Any]], x: str) -> Chart:
    """FVU of test rows over "steps" or "processor_seconds", means over seeds."""
    layers = []
    for row in found:
        marks = list(zip(*row["curves"]))
        across = [statistics.fmean(mark[x] for mark in at) for at in marks]
        values = [statistics.fmean(mark["test"] for mark in at) for at in marks]
        name = row["library"] + (", defaults" if row["lr"] is None else "")
        layers.append(Line(name, across, values))
    return Chart("", *layers, x=Axis(x.replace("_", " "), scale="log"), y="held-out FVU")


def written(out: Path, found: Iterable[dict[str, Any]], about: dict[str, Any]) -> None:
    """Results beside those that are there, and charts of each size and length."""
    before = json.loads(out.read_text()) if out.is_file() else {}
    results = {key_of(row): row for row in (*before.get("results", ()), *found)}
    rows = [results[key] for key in sorted(results)]
    versions = before.get("versions", {}) | about.pop("versions")
    write_json(out, {**about, "versions": versions, "results": rows})
    for (n, steps), part in groupby(rows, lambda row: (row["n"], row["steps"])):
        there = list(part)
        for x in ("steps", "processor_seconds"):
            curves(there, x).write(out.with_name(f"{out.stem}_{n}_{steps}_{x}.svg"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="of benchmarks.real_vit.tokens")
    parser.add_argument("--group", type=int, default=257, help="tokens of a picture")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    ways = ["linear", "default"]
    parser.add_argument("--schedules", nargs="+", choices=ways, default=ways, help="those tried; rates by the first")
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 2000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--n", type=int, default=12288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .json file; charts lie beside it")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where runs are kept (default: beside --out)")
    args = parser.parse_args(argv)
    rows = split(read_safetensors(args.tokens)["tokens"].float(), args.group)
    folder = args.runs or args.out.with_suffix("")
    for steps, library in product(args.steps, args.libraries):
        base = Job(library, None, "default", steps, args.seeds[0], args.batch, rows.train.shape[1], args.n, args.k)
        chosen = [searched(base, args.lr, args.schedules, rows, folder)]
        if library == "clipsteer":
            chosen.append(base)
        for job in chosen:
            row = summary([run(job._replace(seed=seed), rows, folder) for seed in args.seeds])
            lr = "its default" if row["lr"] is None else f"{row['lr']:g}"
            sys.stdout.write(
                f"{library} ({lr}, {row['schedule']}), {steps} steps: FVU {row['test']['mean']:.4f}, dead "
                f"{100 * row['dead']['mean']:.1f} %, {row['processor_seconds']['mean']:.0f} s\n"
            )
            written(args.out, [row], {"threads": torch.get_num_threads(), "versions": versions([library])})


if __name__ == "__main__":
    main()
