"""How time and peak memory of encode, decode, batch_topk and a training step grow with features and rows.

    OMP_NUM_THREADS=1 python -m benchmarks.growth [--parts n B] [--tokens FILE] [--rounds 5] [--out DIR]
    OMP_NUM_THREADS=2 python -m benchmarks.growth --parts threads

n: features from 4,096 to 1,048,576 at 256 rows; B: rows from 1 to 16,384 at 16,384 features. Time is processor time on
one thread, every size once in each round, so that a round gives an exponent and the rounds an interval. Memory is all
that a call holds at its peak: what it is given and what it needs beyond. Activations are Gaussian, and real tokens with
``--tokens`` (of `benchmarks.real_vit.tokens`), whose dictionary has differences of two tokens as rows. A size whose
tensors do not fit what memory is left is left out, and said to be.

threads: wall time at one and at two threads, in turn, for encode, decode, batch_topk, the step and the losses; on a
machine that does nothing else.

Sizes that --out holds already are not timed again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from clipsteer import losses, ops
from clipsteer.io.files import write_atomically, write_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.intervals import mean_interval
from clipsteer.report.layers import Line
from clipsteer.report.page import markdown_table
from clipsteer.sae.config import TrainConfig
from clipsteer.sae.model import SAE
from clipsteer.sae.trainer import SAETrainer
from clipsteer.testing.machine import extra_memory, machine
from clipsteer.testing.timing import median_interval, processor_time

D, K = 384, 32
FEATURES = tuple(2**i for i in range(12, 21))
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
FIXED = {"n": {"B": 256}, "B": {"n": 16384}}
WHATS = ("encode", "batch_topk", "decode", "step")
LIMIT, JUMP = 1.05, 1.5  # of an exponent, and of one between neighbours
PAIRS = 2048  # of the losses, whose rows are 512 wide
MIB = 2**20
Call = Callable[[], Any]
Row = dict[str, Any]


class Source:
    """Activations and dictionaries, Gaussian or of real tokens (N, D)."""

    def __init__(self, tokens: Tensor | None, seed: int = 0) -> None:
        self.tokens = None if tokens is None else tokens - tokens.mean(0)
        self.seed = seed

    def rows(self, B: int) -> Tensor:
        """(B, D)"""
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.tokens is None:
            return torch.randn(B, D, generator=generator)
        return self.tokens[torch.randint(len(self.tokens), (B,), generator=generator)]

    def dictionary(self, n: int) -> Tensor:
        """(n, D) rows of norm 1."""
        generator = torch.Generator().manual_seed(self.seed)
        W = torch.empty(n, D)
        for part in W.split(65536):
            if self.tokens is None:
                torch.randn(part.shape, generator=generator, out=part)
            else:
                N = len(self.tokens)
                one = torch.randint(N, (len(part),), generator=generator)
                other = (one + torch.randint(1, N, (len(part),), generator=generator)) % N
                torch.sub(self.tokens[one], self.tokens[other], out=part)
            part.div_(torch.linalg.vector_norm(part, dim=1, keepdim=True))
        return W


def call_of(what: str, W: Tensor, x: Tensor) -> Call:
    """A call without gradients on (n, D) and (B, D)."""
    b = torch.zeros(len(W))
    if what == "encode":
        return lambda: ops.topk_encode(x, W, b, k=K)
    if what == "batch_topk":
        return lambda: ops.batch_topk_encode(x, W, b, count=K * len(x))
    assert what == "decode", what
    generator = torch.Generator().manual_seed(2)
    acts = torch.rand(len(x), K, generator=generator)
    indices = torch.randint(len(W), (len(x), K), generator=generator)
    return lambda: ops.sparse_decode(acts, indices, W)


def step_of(W: Tensor, x: Tensor) -> Call:
    """A training step of an SAE whose dictionaries start as W (n, D), which is not kept."""
    sae = SAE(D, len(W), "topk", K)
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.W_enc.copy_(W)
    trainer = SAETrainer(sae, TrainConfig(warmup_steps=0, cosine=False), 10**6)
    return lambda: trainer.step(x)


def needed(what: str, n: int, B: int) -> int:
    """Bytes that a case holds: for a step the weights of both dictionaries, their moments, and where they came from."""
    return 4 * D * (n * (7 if what == "step" else 1) + 4 * B) + 8 * B * K * 16


def available() -> int:
    """Bytes that the system can give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measured(call: Call, held: int) -> Row:
    """Seconds of a call and bytes at its peak, after one that is not looked at."""
    call()
    seconds = processor_time(call)
    return {"seconds": seconds, "bytes": held + extra_memory(call, "cpu")}


def sweep(along: str, sizes: Sequence[int], what: str, source: Source) -> Iterable[tuple[int, Row]]:
    """Every size once."""
    shapes = [{**FIXED[along], along: size} for size in sizes]
    n_most, B_most = (max(shape[name] for shape in shapes) for name in ("n", "B"))
    whole = source.dictionary(n_most) if what != "step" else torch.empty(0)
    x = source.rows(B_most)
    for size, shape in zip(sizes, shapes):
        n, B = shape["n"], shape["B"]
        if needed(what, n, B) > 0.8 * available():
            yield size, {"left_out": f"needs {needed(what, n, B) / 2**30:.1f} GiB"}
            continue
        W = whole[:n] if what != "step" else source.dictionary(n)
        call = step_of(W, x[:B]) if what == "step" else call_of(what, W, x[:B])
        del W
        held = 4 * D * (n * (6 if what == "step" else 1) + B)
        yield size, measured(call, held)
        del call


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of a least-squares line through the logarithms."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / sum((x - mean_a) ** 2 for x in a)


def curve(rows: Sequence[Row], figure: str) -> tuple[list[int], list[float]]:
    """Sizes and medians over rounds."""
    sizes = sorted({row["size"] for row in rows if figure in row})
    return sizes, [statistics.median(row[figure] for row in rows if row["size"] == size) for size in sizes]


def exponents(rows: Sequence[Row], figure: str) -> Row:
    """Of one sweep: over all sizes and over the upper half, where what a call costs at least weighs less, mean and
    interval of the rounds' own slopes; and the largest between neighbours, of medians."""
    sizes, medians = curve(rows, figure)
    found: Row = {}
    for name, kept in (("all", sizes), ("upper", sizes[len(sizes) // 2 :])):
        slopes = []
        for number in sorted({row["round"] for row in rows}):
            own = {row["size"]: row[figure] for row in rows if row["round"] == number and figure in row}
            if all(size in own for size in kept):
                slopes.append(slope(kept, [own[size] for size in kept]))
        found[name] = mean_interval(slopes)
    steps = [(slope(sizes[i : i + 2], medians[i : i + 2]), sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1)]
    found["steepest"] = max(steps)
    found["jumps"] = [step for step in steps if step[0] > JUMP]
    return found


def sweeps(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows of each, by axis, op and data."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["along"], row["what"], row["data"]), []).append(row)
    return found


def thread_calls(source: Source) -> dict[str, Call]:
    """What is timed at one and at two threads."""
    W, x = source.dictionary(16384), source.rows(1024)
    calls = {what: call_of(what, W, x) for what in WHATS if what != "step"}
    calls["step"] = step_of(W, x)
    generator = torch.Generator().manual_seed(3)
    features = [F.normalize(torch.randn(PAIRS, 512, generator=generator)) for _ in range(4)]
    live = [t.clone().requires_grad_() for t in features[:2]]
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    temperature = torch.tensor(0.01)

    def loss(function: Callable[..., Any], *more: Any) -> Call:
        def call() -> None:
            value = function(*live, *more)
            value = sum(value[1:], value[0]) if isinstance(value, tuple) else value
            torch.autograd.grad(value, live)

        return call

    def drrho(image: Tensor, text: Tensor) -> Tensor:
        return ops.drrho_loss(image, text, *features[2:], temperature=temperature)[0]

    calls["ClipLoss"] = loss(losses.ClipLoss(), scale)
    calls["SigLipLoss"] = loss(losses.SigLipLoss(), torch.tensor(10.0), bias)
    calls["DistillClipLoss"] = loss(losses.DistillClipLoss(), scale, *features[2:], scale)
    calls["drrho_loss"] = loss(drrho)
    return calls


def thread_row(call: Call, rounds: int) -> Row:
    """Wall time at one and at two threads in turn, and the ratio's interval."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds + 1):
        for threads, found in times.items():
            torch.set_num_threads(threads)
            call()
            begin = time.perf_counter()
            calls = 0
            while not calls or time.perf_counter() - begin < 0.2:
                call()
                calls += 1
            if number:
                found.append((time.perf_counter() - begin) / calls)
    ratios = [one / two for one, two in zip(times[1], times[2])]
    low, high = median_interval(ratios)
    medians = {f"ms_{threads}": 1000 * statistics.median(found) for threads, found in times.items()}
    return {**medians, "faster": statistics.median(ratios), "low": low, "high": high}


def markdown(found: Row) -> str:
    facts = found["machine"]
    lines = [
        "# Growth\n",
        f"{facts['chip']}, torch {facts['torch']}; d = {D}, k = {K}; `python -m benchmarks.growth`.\n",
    ]
    rows = []
    for (along, what, data), own in sweeps(found.get("rows", [])).items():
        if len({row["size"] for row in own if "seconds" in row}) < 4:
            continue
        cells = [what, data, f"{along}, {min(r['size'] for r in own):,} – {max(r['size'] for r in own):,}"]
        for figure in ("seconds", "bytes"):
            powers = exponents(own, figure)
            cells += [_said(powers["all"]), _said(powers["upper"])]
        steepest, low, high = exponents(own, "seconds")["steepest"]
        rows.append([*cells, f"{steepest:.2f} ({low:,} → {high:,})"])
    if rows:
        heads = ["", "data", "over", "time", "upper half", "memory", "upper half", "time's steepest step"]
        lines += ["Exponents with intervals of 95 % over rounds:\n", *markdown_table(heads, rows)]
    lines += [f"\n{said}" for said in too_steep(found.get("rows", []))]
    left = sorted({(r["what"], r["along"], r["size"], r["left_out"]) for r in found.get("rows", []) if "left_out" in r})
    lines += [f"\nLeft out: {what} at {along} = {size:,}, which {why}." for what, along, size, why in left]
    if found.get("threads"):
        rows = []
        for r in found["threads"]:
            ratio = f"{r['faster']:.2f} ({r['low']:.2f} – {r['high']:.2f})"
            rows.append([r["what"], f"{r['ms_1']:.3g} ms", f"{r['ms_2']:.3g} ms", ratio])
        heads = ["wall time", "one thread", "two threads", "times as fast"]
        lines += ["", *markdown_table(heads, rows)]
    return "\n".join(lines) + "\n"


def too_steep(rows: Iterable[Row]) -> Iterable[str]:
    """Exponents above the limit, and jumps between neighbours."""
    for (along, what, data), own in sweeps(rows).items():
        for figure, name in (("seconds", "time"), ("bytes", "memory")):
            if len({row["size"] for row in own if figure in row}) < 4:
                continue
            powers = exponents(own, figure)
            for part, over in (("all", "all sizes"), ("upper", "the upper half")):
                if powers[part]["mean"] > LIMIT:
                    power = _said(powers[part])
                    yield f"Above {LIMIT}: {what}, {data}, {name} over {along}, {over}: {power}."
            for steep, low, high in powers["jumps"]:
                yield f"A jump: {what}, {data}, {name} over {along}, {low:,} → {high:,}: {steep:.2f}."


def _said(power: Row) -> str:
    spread = "" if power["low"] is None else f" ({power['low']:.2f} – {power['high']:.2f})"
    return f"{power['mean']:.2f}{spread}"


def charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Time and memory along each axis, by file name."""
    found = {}
    for along, axis in (("n", "features"), ("B", "rows")):
        for figure, label, unit in (("seconds", "seconds, one core", 1.0), ("bytes", "MiB at the peak", MIB)):
            lines = []
            for (axis_of, what, data), own in sweeps(rows).items():
                sizes, values = curve(own, figure)
                if axis_of == along and sizes:
                    lines.append(Line(f"{what}, {data}", sizes, [value / unit for value in values]))
            if lines:
                fixed = ", ".join(f"{name} = {size:,}" for name, size in FIXED[along].items())
                x, y = Axis(axis, scale="log"), Axis(label, scale="log")
                found[f"{figure}_{along}"] = Chart(f"{fixed}, d = {D}, k = {K}", *lines, x=x, y=y, height=240.0)
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["n", "B"], choices=["n", "B", "threads"])
    parser.add_argument("--whats", nargs="+", default=list(WHATS), choices=WHATS)
    parser.add_argument("--features", nargs="+", type=int, default=list(FEATURES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="a .safetensors file of benchmarks.real_vit.tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth")
    args = parser.parse_args(given)
    place = args.out / "growth.json"
    found: Row = json.loads(place.read_text()) if place.exists() else {}
    found["machine"] = machine()
    sources = {"Gaussian": Source(None)}
    if args.tokens is not None:
        sources["real"] = Source(load_file(args.tokens)["tokens"])
    before = torch.get_num_threads()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[Row] = found.setdefault("rows", [])
    names = ("along", "what", "data", "round")
    todo = []
    for number in range(args.rounds):
        for along in args.parts:
            for data in sources:
                todo += [(along, what, data, number) for what in args.whats if along != "threads"]
    for along, what, data, number in tqdm(todo, unit="sweep", disable=None):
        head = dict(zip(names, (along, what, data, number)))
        there = {row["size"] for row in rows if all(row[name] == head[name] for name in names)}
        sizes = [size for size in (args.features if along == "n" else args.rows) if size not in there]
        for size, figures in sweep(along, sizes, what, sources[data]) if sizes else ():
            rows.append({**head, "size": size, **figures})
            write_json(place, found)
    if "threads" in args.parts:
        calls = thread_calls(sources.get("real", sources["Gaussian"]))
        found["threads"] = [{"what": name, **thread_row(call, args.rounds)} for name, call in calls.items()]
        write_json(place, found)
    torch.set_num_threads(before)
    text = markdown(found)
    write_atomically(args.out / "growth.md", lambda file: file.write(text.encode()))
    for name, chart in charts(rows).items():
        chart.write(args.out / f"{name}.svg")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
