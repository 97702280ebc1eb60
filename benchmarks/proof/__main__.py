"""Seeded bugs, and who finds them.

    python -m benchmarks.proof --out benchmarks/results/proofs/mutations.json

Every judge sees every wrong twin once, and every right one ``--rights`` times with other seeds: a right one that it
refuses is a false alarm. The others judge five draws of the size at which the kernel is used; ``prove`` draws its own.
The same command goes on after a run that ended early.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.proof.judges import JUDGES
from benchmarks.proof.kernels import KERNELS
from clipsteer.testing import bench


def measure(rights: int, part: Path | None = None) -> dict[str, Any]:
    """Every verdict; those in ``part``, a line each, are of a run that ended early."""
    found: dict[str, list[str]] = {name: [] for name in JUDGES}
    alarms: dict[str, list[str]] = {name: [] for name in JUDGES}
    kernels = [make() for make in KERNELS]
    bugs = [(kernel, name, fast) for kernel in kernels for name, fast in kernel.wrong.items()]
    twins = [(kernel, name, fast) for kernel in kernels for name, fast in kernel.right.items()]
    work = [(judge, *bug, 0, False) for judge in JUDGES for bug in bugs]
    work += [(judge, *twin, seed, True) for judge in JUDGES for twin in twins for seed in range(rights)]
    kept: dict[str, bool] = {}
    if part is not None and part.exists():
        kept = dict(json.loads(line) for line in part.read_text().splitlines())
    for judge, kernel, name, fast, seed, is_right in tqdm(work, unit="verdict", disable=None):
        key = f"{judge}: {kernel.name}: {name}, seed {seed}"
        if key not in kept:
            kept[key] = JUDGES[judge](kernel, fast, seed)
            if part is not None:
                with part.open("a") as lines:
                    lines.write(json.dumps([key, kept[key]]) + "\n")
        if is_right and not kept[key]:
            alarms[judge].append(f"{kernel.name}: {name}, seed {seed}")
        if not is_right and not kept[key]:
            found[judge].append(f"{kernel.name}: {name}")
    return {
        "machine": bench.machine("cpu"),
        "bugs": [f"{kernel.name}: {name}" for kernel, name, _ in bugs],
        "rights": rights * len(twins),
        "found": found,
        "false_alarms": alarms,
    }


def table(results: dict[str, Any]) -> str:
    total = len(results["bugs"])
    lines = ["| check | bugs found | false alarms |", "|---|---|---|"]
    for judge, found in results["found"].items():
        share = f"{len(found)} of {total} ({len(found) / total:.0%})"
        lines.append(f"| {judge} | {share} | {len(results['false_alarms'][judge])} of {results['rights']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rights", type=int, default=20, help="times that each right twin is judged")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    part = None
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
    results = measure(args.rights, part)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".part").unlink(missing_ok=True)
    missed = sorted(set(results["bugs"]) - set(results["found"]["prove"]))
    sys.stdout.write(table(results) + "\n")
    sys.stdout.write("".join(f"missed by prove: {bug}\n" for bug in missed))
    sys.stdout.write("".join(f"false alarm of prove: {case}\n" for case in results["false_alarms"]["prove"]))


if __name__ == "__main__":
    main()
