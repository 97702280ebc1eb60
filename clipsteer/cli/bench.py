"""``clipsteer bench``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsteer.cli.arguments import _text, count, whole
from clipsteer.cli.ops import BACKENDS, DTYPES, _dtype

# options of one kind of run that the other does not know, by their names in a namespace
_PLAIN = ("backends", "shape", "dtype", "device", "repeats", "markdown", "into")
_GRID = ("dtypes", "rows", "threads", "seconds", "compile")


def add_parser(commands: Any, add: Any) -> None:
    """Add the command; ``add(parent, name, function, summary, examples, options)`` makes one."""
    add(
        commands,
        "bench",
        _bench,
        "time the ops against torch on this machine",
        """
examples:
  clipsteer bench --out bench.json
  clipsteer bench --ops topk_encode --shape B=256,d=768,n=49152,k=32
  clipsteer bench --ops semantic_drift --compare bench.json
  clipsteer bench --markdown bench.json sae_step.json
  every op, dtype, batch and number of threads beside its fastest rival, a page of all ratios in
  the folder; stopped, it goes on where it was:
    clipsteer bench --grid --out grid
  some of them, in a minute:
    clipsteer bench --grid --ops topk_encode sparse_decode --dtypes bfloat16 --threads 1

exit code 1 when --compare finds something slower, or --grid something wrong
""",
        _options,
    )


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ops", nargs="+", metavar="OP", help="(default: all)")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all that run)")
    p.add_argument(
        "--shape", type=_shape, metavar="B=…,d=…", help="instead of the op's benchmark shapes"
    )
    p.add_argument("--dtype", choices=DTYPES, help="(default: float32)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    p.add_argument("--repeats", type=whole, metavar="N", help="timings of each (default: 7)")
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write .json or .csv as well; with --grid a folder",
    )
    p.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="say what changed beyond noise; 1 if slower",
    )
    p.add_argument(
        "--markdown",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="print a table of earlier runs instead",
    )
    p.add_argument(
        "--into",
        type=Path,
        metavar="FILE.md",
        help="with --markdown: put it between the marks in a file",
    )
    grid = p.add_argument_group("the grid")
    grid.add_argument(
        "--grid", action="store_true", help="every op × dtype × batch × threads, on the CPU"
    )
    grid.add_argument("--dtypes", nargs="+", choices=DTYPES, help="(default: all)")
    grid.add_argument(
        "--rows", nargs="+", type=count, metavar="B", help="(default: 1 8 32 256 4096)"
    )
    grid.add_argument("--threads", nargs="+", type=count, metavar="N", help="(default: 1 2)")
    grid.add_argument(
        "--seconds", type=float, metavar="S", help="that each pass is timed (default: 0.2)"
    )
    grid.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="let torch.compile take part, which takes seconds an op and dtype (default: yes)",
    )


def _shape(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): whole(value) for name, value in pairs}
    except (ValueError, argparse.ArgumentTypeError):
        example = "B=256,d=768,n=49152,k=32"
        raise argparse.ArgumentTypeError(
            f"expected NAME=SIZE,… such as {example}, got {text!r}"
        ) from None


def _bench(args: argparse.Namespace) -> int:
    unknown = _PLAIN if args.grid else _GRID
    for name in unknown:
        if getattr(args, name) is not None:
            where = "is not for --grid" if args.grid else "is for --grid"
            raise ValueError(f"bench: --{name} {where}")
    if args.grid:
        return _grid(args)
    if args.markdown:
        from clipsteer.testing.table import markdown, put

        table = markdown(args.markdown)
        put(args.into, table) if args.into is not None else _text(table)
        return 0
    import torch

    from clipsteer.testing import bench

    records = bench.run(
        args.ops,
        args.backends,
        shape=args.shape,
        dtype=_dtype(args.dtype or "float32"),
        device=args.device,
        repeats=7 if args.repeats is None else args.repeats,
        out=args.out,
    )
    _text(bench.table(records))
    if args.compare is None:
        return 0
    text, slower = bench.compare(
        args.compare, records, args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    _text("", text)
    return int(slower)


def _grid(args: argparse.Namespace) -> int:
    from clipsteer.testing import bench, grid, grid_table
    from clipsteer.testing.machine import machine

    given: dict[str, Any] = {}
    if args.seconds is not None:
        given["seconds"] = args.seconds
    if args.compile is not None:
        given["compiled"] = args.compile
    records = grid.run(
        args.ops, args.dtypes, rows=args.rows, threads=args.threads, out=args.out, **given
    )
    facts = machine()
    if args.out is not None:
        # all that the folder holds, not only what was asked for
        facts, records = grid.read(args.out / grid.NAME)
        grid_page(facts, records).write(args.out / "grid.html")
    text = grid_table.markdown(facts, records)
    if args.out is not None:
        (args.out / "grid.md").write_text(text, encoding="utf-8")
    _text(text)
    slower = False
    if args.compare is not None:
        text, slower = bench.compare(args.compare, records)
        _text("", text)
    return int(slower or any("wrong" in record for record in records))


def grid_page(machine: Mapping[str, Any], records: list[dict[str, Any]]) -> Any:
    """The page of a grid: its figures, a heat map for each matrix, and every red cell."""
    from clipsteer.report.charts import Chart
    from clipsteer.report.layers import Cells
    from clipsteer.report.page import Page, grid, stats, table, text
    from clipsteer.testing import grid_table

    found = grid_table.summary(records)
    subtitle = f"{machine['chip']}, torch {machine['torch']}, {machine['date']}"
    page = Page("Every op beside its fastest rival", subtitle, footer=_METHOD)
    figures: list[tuple[Any, ...]] = [("ratios", found.ratios)]
    if found.ratios:
        figures.append(("smallest", f"{found.smallest:.2f}×"))
        figures.append(("geometric mean", f"{found.mean:.2f}×"))
    figures.append(("below 1", len(found.red), f"{found.certain} with their whole interval"))
    figures.append(("wrong", len(found.wrong)))
    page.lead(stats(figures))
    page.lead(text(_LEGEND))
    matrices = grid_table.matrices(records)
    for title in dict.fromkeys(matrix.title.partition(", ")[2] for matrix in matrices):
        charts = []
        for matrix in matrices:
            dtype, _, rest = matrix.title.partition(", ")
            if rest == title:
                cells = Cells(
                    matrix.values,
                    [op.replace("_", " ") for op in matrix.ops],
                    [f"{B:,}" for B in matrix.rows],
                    peak=4.0,
                    middle=1.0,
                    show=_ratio,
                    tall=28.0,
                    names=170.0,
                )
                charts.append(Chart(dtype, cells, x="rows in a batch"))
        page.section(title[:1].upper() + title[1:], grid(*charts))
    if found.red:
        rows = map(grid_table.red_row, found.red)
        page.section("Below 1", table(grid_table.RED_HEADS, rows, words=True))
    if found.wrong:
        heads = ("op", "shape", "dtype", "pass", "threads", "wrong")
        wrong = [[record[name] for name in heads] for record in found.wrong]
        page.section("Not timed", table(heads, wrong, words=True))
    return page


_LEGEND = (
    "Each figure is the time of the fastest rival over ours: green from 1 on, red and framed "
    "below. Empty cells have no rival."
)
_METHOD = (
    "Processor time, contenders in turn, medians; ratios of neighbouring timings with intervals of "
    "95 %. Rivals: torch eager, torch.compile with dynamic shapes, and the call of a library where "
    "there is one. Values and gradients were held to their bounds before. All records, with what "
    "each rival took, are in grid.json beside this page."
)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
