"""Micro-benchmarks from the op registry: each backend against its baselines, interleaved in one
run.

On the CPU the figure is processor time at one thread count, on a GPU device events with a flushed
cache. A backend is timed only after its result has passed the bound.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer._files import FileFormatError, read_json
from clipsteer.ops import BACKENDS, REGISTRY, _dispatch
from clipsteer.ops._spec import measured_on
from clipsteer.testing.machine import chip, extra_memory, machine

__all__ = ["chip", "compare", "extra_memory", "machine", "run", "table"]


def clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """A stopwatch: seconds of processor time on the CPU, of device time on a GPU."""
    if device == "cpu":

        def timed(call: Callable[[], Any]) -> float:
            # the time of other threads is counted in steps of milliseconds, so short calls are
            # timed in groups
            calls = 0
            begin = time.process_time()
            while (spent := time.process_time() - begin) < 0.02 or not calls:
                call()
                calls += 1
            return spent / calls
    else:
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

        def timed(call: Callable[[], Any]) -> float:
            flush.zero_()  # a cold L2
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1000

    return timed


def contenders(
    spec: Any,
    inputs: dict[str, Any],
    backends: list[str],
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], Any]]:
    """Everything that computes this op here: our backends, the baselines, and the compiled first
    baseline."""
    found: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        if backend != "reference" and not _dispatch.unusable(
            backend,
            torch.device(device),
            dtype,
            spec.name,
        ):
            found[backend] = lambda b=backend: spec.function(**inputs, backend=b)
    for name, baseline in spec.baselines.items():
        found[name] = lambda f=baseline: f(**inputs)
    compiled = torch.compile(next(iter(spec.baselines.values())))
    found["torch.compile"] = lambda: compiled(**inputs)
    return found


def backward(forward: Callable[[], Any], grad: Tensor, leaves: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        try:
            result = forward()
            (result[0] if isinstance(result, tuple) else result).backward(grad)
        finally:  # a call that fails half-way must not leave gradients for the next to add to
            for leaf in leaves:
                leaf.grad = None

    return step


def measure(
    calls: dict[str, Callable[[], Any]],
    device: str,
    repeats: int,
    label: str,
    base: str,
) -> dict[str, dict[str, float]]:
    """Median seconds of each call, and how much faster than ``base`` it is: over medians, and where
    the median of the ratios of neighbouring timings lies, ``speedup_low`` to ``speedup_high``."""
    timed = clock(device)
    samples = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in tqdm(range(repeats), desc=label, disable=None, leave=False):
        for name, call in calls.items():
            samples[name].append(timed(call))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    found = {}
    for name, values in samples.items():
        low, high = median_interval([a / b for a, b in zip(samples[base], values)])
        found[name] = {
            "seconds": medians[name],
            "speedup": medians[base] / medians[name],
            "speedup_low": low,
            "speedup_high": high,
        }
    return found


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median of what is drawn from with at least this probability,
    where there are enough values for it (6 for 95 %); else the extremes."""
    ordered = sorted(values)
    n = len(values)
    cut = 0
    outside = 2 * 0.5**n
    while outside + 2 * math.comb(n, cut + 1) * 0.5**n <= 1 - level:
        cut += 1
        outside += 2 * math.comb(n, cut) * 0.5**n
    return ordered[cut], ordered[n - 1 - cut]


def topk_stage(pre: Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """The selection alone, on given pre-activations."""
    calls: dict[str, Callable[[], Any]] = {"torch.topk": lambda: torch.topk(pre, k)}
    if _dispatch.missing("cpp") is None:
        calls = {"cpp": lambda: torch.ops.clipsteer_cpp.topk(pre, k), **calls}
    return calls


def dictionary_gradient(B: int, d: int, n: int, k: int) -> dict[str, Callable[[], Any]]:
    """dW of a decoder in every way there is: (B, k) codes and (B, d) gradients into (n, d)."""
    g = torch.Generator().manual_seed(0)
    acts = torch.rand(B, k, generator=g)
    rows = torch.randn(B, d, generator=g)
    indices = torch.randint(0, n, (B, k), generator=g)
    buffer = torch.empty(n, d)
    bias = torch.empty(n)
    code = torch.zeros(B, n).scatter_add_(1, indices, acts)

    def row_sparse() -> Tensor:
        features, compact = torch.unique(indices, return_inverse=True)
        values, _ = torch.ops.clipsteer_cpp.sparse_outer(acts, compact, rows, features.numel())
        return torch.sparse_coo_tensor(
            features[None],
            values,
            (n, d),
            is_coalesced=True,
            check_invariants=False,
        )

    products = (acts.unsqueeze(-1) * rows.unsqueeze(1)).flatten(0, 1)
    calls: dict[str, Callable[[], Any]] = {
        "dense torch": lambda: torch.zeros(n, d).index_add_(0, indices.flatten(), products),
        "dense torch, kept": lambda: buffer.zero_().index_add_(0, indices.flatten(), products),
        "dense matmul": lambda: code.T @ rows,
    }
    if _dispatch.missing("cpp") is None:
        ours = {
            "kept buffer": lambda: torch.ops.clipsteer_cpp.sparse_outer_out(
                acts,
                indices,
                rows,
                buffer,
                bias,
            ),
            "row-sparse": row_sparse,
            "fresh": lambda: torch.ops.clipsteer_cpp.sparse_outer(acts, indices, rows, n),
        }
        calls = ours | calls
    return calls


def stages(repeats: int) -> list[dict[str, Any]]:
    """The parts of a CPU training step that have goals of their own, at the main shape."""
    records: list[dict[str, Any]] = []
    pre = torch.randn(256, 49152, generator=torch.Generator().manual_seed(0))
    cases = [("topk stage", f"B256-k{k}", topk_stage(pre, k), "torch.topk") for k in (32, 64)]
    cases.append(("dW", "B128-k32", dictionary_gradient(128, 768, 49152, 32), "dense torch"))
    for op, label, calls, base in cases:
        for name, times in measure(calls, "cpu", repeats, op, base).items():
            records.append(
                {
                    "op": op,
                    "shape": label,
                    "pass": "stage",
                    "contender": name,
                    "baseline": base,
                    **times,
                }
            )
    return records


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The machine's measured rates, for the floors: operations/s of a large product, bytes/s of a
    large copy."""
    timed = clock(device)
    size = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.randn((64 if device == "cpu" else 1024) * 2**18, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ b) for _ in range(5))
    copy = min(timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() * 4 / copy


def run(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    *,
    shape: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    repeats: int = 7,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Time every op at its benchmark shapes (or at ``shape``), forward and forward + backward.

    Returns one record per op × shape × pass × contender: median seconds; the first baseline's time
    over it, eager (``speedup``, with an interval of 95 %) and under torch.compile
    (``speedup_compiled``); for forward passes also the share of the floor and the peak extra memory
    in bytes. ``out`` names a .json or .csv file to write.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rates = ceilings(device, dtype)
    records = []
    for name in ops or list(REGISTRY):
        if name not in REGISTRY:
            raise ValueError(f"bench: op must be one of {sorted(REGISTRY)}, got {name!r}")
        spec = REGISTRY[name]
        given = (
            {"given": shape}
            if shape
            else spec.bench_shapes
            if device == "cpu"
            else spec.gpu_bench_shapes
        )
        for label, sizes in given.items():
            drawn, inputs = draw(spec, sizes, dtype, device)
            calls = contenders(spec, inputs, backends or list(BACKENDS), device, dtype)
            small = {n: min(size, spec.gate_sizes.get(n, size)) for n, size in sizes.items()}
            gate(
                spec,
                *((drawn, inputs) if small == sizes else draw(spec, small, dtype, device)),
                calls,
                device,
            )
            del drawn
            flops, bytes_ = spec.floor(sizes)
            floor = max(flops / rates[0], bytes_ * dtype.itemsize / 4 / rates[1])
            passes = {"forward": calls}
            if leaves := [inputs[n].requires_grad_() for n in spec.leaves(inputs)]:
                result = next(iter(calls.values()))()
                grad = torch.randn_like(result[0] if isinstance(result, tuple) else result)
                del result
                passes["forward+backward"] = {
                    n: backward(c, grad, leaves) for n, c in calls.items()
                }
            for kind, steps in passes.items():
                for leaf in leaves:
                    leaf.requires_grad_(kind != "forward")
                if not (steps := runnable(steps, f"{name} {label} {kind}")):
                    continue
                base = next(n for n in (*spec.baselines, *steps) if n in steps)
                memory = {n: extra_memory(c, device) for n, c in steps.items()}
                found = measure(steps, device, repeats, f"{name} {label} {kind}", base)
                for contender, times in found.items():
                    record = {
                        "op": name,
                        "shape": label,
                        **sizes,
                        "pass": kind,
                        "contender": contender,
                    }
                    record |= {"baseline": base, **times, "extra_bytes": memory[contender]}
                    if "torch.compile" in found:
                        record["speedup_compiled"] = (
                            found["torch.compile"]["seconds"] / times["seconds"]
                        )
                    if kind == "forward":
                        record["floor_share"] = floor / times["seconds"]
                    records.append(record)
    if device == "cpu" and ops is None and shape is None:
        records += stages(repeats)
    if out is not None:
        write(Path(out), records, device)
    return records


def runnable(calls: dict[str, Callable[[], Any]], what: str) -> dict[str, Callable[[], Any]]:
    """The calls that can run here, as to packages, dtype and memory; a warning names the others."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except (ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"bench: {what}: {name} is left out: {reason}", stacklevel=2)
            torch.cuda.empty_cache()
    return found


def draw(
    spec: Any,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case, on the host and on ``device``."""
    drawn = spec.make(sizes, dtype, torch.Generator().manual_seed(0), 1.0, False)
    return drawn, {n: v.to(device) if isinstance(v, Tensor) else v for n, v in drawn.items()}


def gate(
    spec: Any,
    drawn: dict[str, Any],
    inputs: dict[str, Any],
    calls: dict[str, Callable],
    device: str,
) -> None:
    """No time is taken of a wrong result: a few rows of every backend of ours are held to the bound
    first."""
    rows = {n for n in spec.rows or spec.gate if isinstance(drawn[n], Tensor)}
    few = {n: v[:8] if n in rows else v for n, v in drawn.items()}
    for backend in set(calls) & set(BACKENDS):
        cut = {n: v[:8] if n in rows else v for n, v in inputs.items()}
        result = spec.function(**cut, backend=backend)
        host = dict(
            zip(
                spec.outputs,
                (t.cpu() for t in (result if isinstance(result, tuple) else (result,))),
            )
        )
        with measured_on(device):
            worst = spec.check(few, host)
        if max(worst.values()) > 1:
            raise RuntimeError(
                f"bench: {backend} {spec.name} is wrong here, and is not timed: {worst}"
            )


def write(path: Path, records: list[dict[str, Any]], device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            fields = list(dict.fromkeys(k for r in records for k in r))
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text(
            json.dumps({"machine": machine(device), "records": records}, indent=1) + "\n"
        )


def table(records: list[dict[str, Any]]) -> str:
    """``run``'s records as text."""
    op, shape = (max([len(name), *(len(r[name]) for r in records)]) + 2 for name in ("op", "shape"))
    head = f"{'op':<{op}}{'shape':<{shape}}{'pass':<18}{'contender':<20}"
    head += f"{'ms':>10}{'vs eager':>10}{'vs compiled':>13}{'of floor':>10}{'extra MB':>10}"
    lines = [head, "-" * len(head)]
    for r in records:
        compiled = f"{r['speedup_compiled']:>11.2f}×" if "speedup_compiled" in r else " " * 12
        share = f"{r['floor_share']:>9.0%}" if "floor_share" in r else " " * 9
        extra = f"{r['extra_bytes'] / 2**20:>10.1f}" if "extra_bytes" in r else ""
        lines.append(
            f"{r['op']:<{op}}{r['shape']:<{shape}}{r['pass']:<18}{r['contender']:<20}"
            f"{1000 * r['seconds']:>10.2f}{r['speedup']:>9.2f}×{compiled}  {share}{extra}"
        )
    return "\n".join(lines)


def compare(
    old: str | Path,
    records: list[dict[str, Any]],
    device: str = "cpu",
) -> tuple[str, bool]:
    """What has changed beyond noise since ``old``, a .json file of `run`, as text, and whether
    anything is slower.

    A speed is the ratio to the baseline that was timed beside it in the same run, so a busier or
    slower machine does not count. A change is one where the two runs' intervals of that ratio lie
    apart; a file without intervals gets ± 15 %.

    Raises FileFormatError for another file.
    """
    found = read_json(old)
    try:
        before = {_key(r): r for r in found["records"]}
        there = {name: found["machine"][name] for name in ("chip", "threads")}
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{old}: not a file of clipsteer bench: {error!r}") from error
    lines = []
    slower = False
    here = {name: value for name, value in machine(device).items() if name in there}
    if here != there:
        lines.append(f"measured on {there} then and {here} now: ratios of unlike machines")
    shared = [
        (before[_key(r)], r)
        for r in records
        if _key(r) in before and r["contender"] != r["baseline"]
    ]
    for then, now in shared:
        (a, b), (c, d) = (
            (r.get("speedup_low", r["speedup"] / 1.15), r.get("speedup_high", r["speedup"] * 1.15))
            for r in (then, now)
        )
        if c > b or d < a:
            slower |= d < a
            way = "faster" if c > b else "slower"
            what = f"{now['op']} {now['shape']} {now['pass']} {now['contender']}"
            lines.append(
                f"{way}: {what}: {then['speedup']:.2f}× [{a:.2f}, {b:.2f}] then, {now['speedup']:.2f}× "
                f"[{c:.2f}, {d:.2f}] now, against {now['baseline']}"
            )
    changed = sum(line.startswith(("faster", "slower")) for line in lines)
    lines.append(f"{len(shared)} figures compared, {changed} changed beyond noise")
    return "\n".join(lines), slower


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(record[name]) for name in ("op", "shape", "pass", "contender", "baseline"))
