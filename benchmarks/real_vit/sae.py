"""A top-k SAE on tokens of a real ViT, ours and the peers': held-out FVU at equal steps and at equal processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.real_vit.sae --tokens tokens.safetensors \\
        --out benchmarks/results/real_vit/sae.json

Every library takes the same batches and has the same grid of learning rates, each with its own schedule and with a
linear decay to 0; the best on validation pictures (first seed) is run with all seeds and reported on test pictures.
clipsteer has its defaults beside. Runs are kept in a folder beside the result, and are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_vit.sae_cell import Rows, run, split
from benchmarks.real_vit.sae_libraries import LIBRARIES, Job, versions
from clipsteer.io.files import read_safetensors, write_json
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line


def searched(base: Job, lrs: Iterable[float], rows: Rows, folder: Path) -> Job:
    """The learning rate and schedule of the least FVU on validation rows."""
    jobs = [base._replace(lr=lr, schedule=course) for lr, course in product(lrs, ("default", "linear"))]
    return min(jobs, key=lambda job: run(job, rows, folder)["validation"])


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with 95 % t-intervals where there are several."""
    first = records[0]
    found: dict[str, Any] = {name: first[name] for name in ("library", "lr", "schedule", "steps")}
    for name in ("test", "dead", "processor_seconds"):
        values = [record[name] for record in records]
        found[name] = mean_interval(values) if len(values) > 1 else {"mean": values[0]}
    return found | {"seeds": len(records), "curves": [record["curve"] for record in records]}


def curves(found: list[dict[str, Any]]) -> Chart:
    """FVU of test rows over processor time, means over seeds."""
    layers = []
    for row in found:
        marks = list(zip(*row["curves"]))
        seconds = [statistics.fmean(m["processor_seconds"] for m in at) for at in marks]
        values = [statistics.fmean(m["test"] for m in at) for at in marks]
        layers.append(Line(f"{row['library']}, {row['steps']} steps", seconds, values))
    return Chart("", *layers, x="processor seconds", y="held-out FVU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="of benchmarks.real_vit.tokens")
    parser.add_argument("--group", type=int, default=257, help="tokens of a picture")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--lr", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 2000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--n", type=int, default=12288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .json file; a .svg lies beside it")
    args = parser.parse_args()
    rows = split(read_safetensors(args.tokens)["tokens"].float(), args.group)
    folder, found = args.out.with_suffix(""), []
    for steps, library in product(args.steps, args.libraries):
        base = Job(library, None, "default", steps, args.seeds[0], args.batch, rows.train.shape[1], args.n, args.k)
        chosen = [searched(base, args.lr, rows, folder)]
        if library == "clipsteer":
            chosen.append(base)
        for job in chosen:
            found.append(summary([run(job._replace(seed=seed), rows, folder) for seed in args.seeds]))
            row = found[-1]
            lr = "its default" if row["lr"] is None else f"{row['lr']:g}"
            sys.stdout.write(
                f"{library} ({lr}, {row['schedule']}), {steps} steps: FVU {row['test']['mean']:.4f}, dead "
                f"{100 * row['dead']['mean']:.1f} %, {row['processor_seconds']['mean']:.0f} s\n"
            )
            write_json(
                args.out,
                {"threads": torch.get_num_threads(), "versions": versions(args.libraries), "results": found},
            )
            curves(found).write(args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
