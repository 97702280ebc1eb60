"""Measure on the bundled drawings what conceptors tell apart, steer and compose.

The full evaluation (six minutes of processor time), figures and a page; then one seed, for a first look:

    python -m benchmarks.conceptors.run --out conceptors.json --page conceptors.html
    python -m benchmarks.conceptors.run --seeds 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.conceptors.experiment import evaluate
from benchmarks.conceptors.report import lines, page
from clipsteer.cli.arguments import add_model, device_of, setup_options
from clipsteer.clip.model import load
from clipsteer.io.files import write_json
from clipsteer.testing.machine import machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="splits of the concepts (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with tables and curves")
    args = parser.parse_args(argv)
    began, spent = time.monotonic(), time.process_time()
    result = evaluate(load(args.model, args.pretrained, device=device_of(args), **setup_options(args)), args.seeds)
    result["model"] = args.model
    result["seconds"] = round(time.monotonic() - began)
    result["processor_seconds"] = round(time.process_time() - spent)
    result["machine"] = machine(device_of(args))
    sys.stdout.write("\n".join(lines(result)) + "\n")
    for path in (args.out, args.page):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.out is not None:
        write_json(args.out, result)
    if args.page is not None:
        page(result).write(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
