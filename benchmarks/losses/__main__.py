"""clipsteer's contrastive losses beside open_clip's modules and torch.compile of these: forward + backward.

    OMP_NUM_THREADS=1 python -m benchmarks.losses [--parts table growth largest] [--rounds 9]

table: processor time, medians over rounds in which all take turns, and extra peak memory, over batch size and dtype.
growth: one call of ours at each size up to 16,384, and the exponents of time and memory in the batch size. largest: one
call of B = 65,536. Parts that are not asked for stay as they are in --out, which is written after every row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer import losses
from clipsteer.io.files import write_atomically, write_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Line
from clipsteer.testing.machine import extra_memory, machine

WIDTH = 512
NAMES = {"clip": "ClipLoss", "siglip": "SigLipLoss", "distill": "DistillClipLoss"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES, COMPILED, GROWTH, LARGEST = (4, 16, 64, 256, 1024, 2048), (16, 256, 2048), (1024, 2048, 4096, 8192, 16384), 65536
MIB = 2**20
Call = Callable[[], None]


def unit_rows(B: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(B, WIDTH) rows of norm 1, made where they stay."""
    x = torch.randn(B, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x.div_(x.norm(dim=1, keepdim=True)).to(dtype)


def call_of(module: Callable[..., Any], loss: str, B: int, dtype: torch.dtype) -> Call:
    """Forward + backward of a batch, gradients from None as after `zero_grad`."""
    live = [unit_rows(B, dtype, seed).requires_grad_() for seed in (1, 2)]
    scale = torch.tensor(10.0 if loss == "siglip" else 100.0, requires_grad=True)
    more: list[Tensor] = []
    if loss == "siglip":
        more = [torch.tensor(-10.0, requires_grad=True)]
    elif loss == "distill":
        more = [unit_rows(B, dtype, 3), unit_rows(B, dtype, 4), torch.tensor(50.0)]

    def call() -> None:
        for x in (*live, scale, *more):
            x.grad = None
        found = module(*live, scale, *more)
        sum(found[1:], found[0]).backward() if isinstance(found, tuple) else found.backward()

    return call


def contenders(loss: str, B: int, dtype: torch.dtype) -> dict[str, Call]:
    import open_clip.loss

    theirs = getattr(open_clip.loss, NAMES[loss])
    modules: dict[str, Any] = {"clipsteer": getattr(losses, NAMES[loss])(), "open_clip": theirs()}
    if B in COMPILED:
        torch._dynamo.reset()
        modules["torch.compile"] = torch.compile(theirs(), dynamic=False)
    return {name: call_of(module, loss, B, dtype) for name, module in modules.items()}


def timed(call: Call, repeats: int) -> float:
    """Milliseconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return 1000 * (time.process_time() - start) / repeats


def table_row(loss: str, B: int, dtype: str, rounds: int) -> dict[str, Any]:
    calls = contenders(loss, B, DTYPES[dtype])
    for call in calls.values():
        call()
        call()
    memory = {name: extra_memory(call, "cpu") / MIB for name, call in calls.items()}
    repeats = max(1, min(100, 4000 // B))
    each: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            each[name].append(timed(call, repeats))
    ratios = {name: statistics.median(a / b for a, b in zip(each["clipsteer"], each[name])) for name in calls}
    medians = {name: statistics.median(found) for name, found in each.items()}
    return {"loss": loss, "B": B, "dtype": dtype, "ms": medians, "ours_over": ratios, "extra_MiB": memory}


def once(loss: str, B: int) -> dict[str, Any]:
    """Seconds and extra MiB of a single call of ours."""
    call_of(getattr(losses, NAMES[loss])(), loss, 64, torch.float32)()
    call = call_of(getattr(losses, NAMES[loss])(), loss, B, torch.float32)
    start = time.process_time()
    memory = extra_memory(call, "cpu")
    return {"loss": loss, "B": B, "s": time.process_time() - start, "extra_MiB": memory / MIB}


def exponent(xs: list[float], ys: list[float]) -> float:
    """The slope of a least-squares line through the logarithms."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.mean(a), statistics.mean(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / sum((x - mean_a) ** 2 for x in a)


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for loss in NAMES:
        own = [row for row in rows if row["loss"] == loss]
        if len(own) > 1:
            sizes = [row["B"] for row in own]
            found[loss] = {what: exponent(sizes, [row[what] for row in own]) for what in ("s", "extra_MiB")}
    return found


def markdown(found: dict[str, Any]) -> str:
    facts = found["machine"]
    lines = [f"# Contrastive losses, d = {WIDTH}, forward + backward\n"]
    lines.append(
        f"{facts['chip']}, {facts['threads']} thread, torch {facts['torch']}; `python -m benchmarks.losses`.\n"
    )
    if found.get("table"):
        lines += [
            "| loss | dtype | B | clipsteer | open_clip | torch.compile | of open_clip's time | extra memory, MiB |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
    for row in found.get("table", []):
        ms = [f"{row['ms'][name]:.3g} ms" if name in row["ms"] else "" for name in ("clipsteer", "open_clip")]
        ms.append(f"{row['ms']['torch.compile']:.3g} ms" if "torch.compile" in row["ms"] else "")
        memory = " / ".join(f"{row['extra_MiB'][name]:.0f}" for name in ("clipsteer", "open_clip"))
        cells = [row["loss"], row["dtype"], str(row["B"]), *ms, f"{row['ours_over']['open_clip']:.2f}", memory]
        lines.append(f"| {' | '.join(cells)} |")
    for loss, powers in exponents(found.get("growth", [])).items():
        what = f"time grows as B^{powers['s']:.2f}, extra memory as B^{powers['extra_MiB']:.2f}"
        lines.append(f"\n{loss}: {what}, over B = {GROWTH[0]:,} to {GROWTH[-1]:,} ([picture](growth.svg)).")
    for row in found.get("largest", []):
        lines.append(
            f"\n{row['loss']}, B = {row['B']:,}: {row['s']:.0f} s, {row['extra_MiB']:.0f} MiB beyond the features."
        )
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]]) -> Chart:
    lines = []
    for loss in NAMES:
        own = [row for row in rows if row["loss"] == loss]
        lines.append(Line(loss, [row["B"] for row in own], [row["s"] for row in own]))
    x, y = Axis("pairs in a batch", scale="log"), Axis("seconds, one core", scale="log")
    return Chart(f"Forward + backward, d = {WIDTH}", *lines, x=x, y=y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["table", "growth"], choices=["table", "growth", "largest"])
    parser.add_argument("--losses", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = args.out / "losses.json"
    found: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    found["machine"] = machine()

    def keep(part: str, row: dict[str, Any]) -> None:
        names = ("loss", "B", "dtype")
        others = [r for r in found.get(part, []) if any(r.get(n) != row.get(n) for n in names)]
        found[part] = sorted([*others, row], key=lambda r: (list(NAMES).index(r["loss"]), r.get("dtype", ""), r["B"]))
        found["exponents"] = exponents(found.get("growth", []))
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(place, found)
        sys.stdout.write(f"{part} {json.dumps(row)}\n")
        sys.stdout.flush()

    for loss in args.losses:
        if "table" in args.parts:
            for dtype in DTYPES:
                for B in args.sizes:
                    keep("table", table_row(loss, B, dtype, args.rounds))
        if "growth" in args.parts:
            for B in GROWTH:
                keep("growth", once(loss, B))
        if "largest" in args.parts:
            keep("largest", once(loss, LARGEST))
    write_atomically(args.out / "losses.md", lambda file: file.write(markdown(found).encode()))
    if found.get("growth"):
        chart(found["growth"]).write(args.out / "growth.svg")


if __name__ == "__main__":
    main()
