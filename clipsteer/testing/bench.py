"""Micro-benchmarks from the op registry: each backend against its baselines, interleaved in one
run.

On the CPU the figure is processor time at one thread count, on a GPU device events with a flushed
cache. A backend is timed only after its result has passed the bound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.ops import BACKENDS, REGISTRY, _dispatch
from clipsteer.ops._bounds import measured_on
from clipsteer.ops._spec import Inputs, OpSpec, Shape, named_outputs
from clipsteer.testing.machine import chip, extra_memory, machine
from clipsteer.testing.records import Record, compare, table, write
from clipsteer.testing.stages import dictionary_gradient, topk_stage
from clipsteer.testing.timing import Calls, ceilings, clock, measure, median_interval

__all__ = [
    "backward",
    "ceilings",
    "chip",
    "clock",
    "compare",
    "contenders",
    "dictionary_gradient",
    "extra_memory",
    "gate",
    "heads",
    "machine",
    "measure",
    "median_interval",
    "run",
    "runnable",
    "stages",
    "table",
    "topk_stage",
    "write",
]


def contenders(
    spec: OpSpec,
    inputs: Inputs,
    backends: list[str],
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Calls:
    """Everything that computes this op here: our backends, the baselines, and the compiled first
    baseline."""
    found: Calls = {}
    place = torch.device(device)
    for backend in backends:
        if backend == "reference":
            continue
        if _dispatch.unusable(backend, place, dtype, spec.name) is None:
            found[backend] = partial(spec.function, **inputs, backend=backend)
    for name, baseline in spec.baselines.items():
        found[name] = partial(baseline, **inputs)
    compiled = torch.compile(next(iter(spec.baselines.values())))
    found["torch.compile"] = partial(compiled, **inputs)
    return found


def heads(result: Any) -> list[Tensor]:
    """What one goes back from: every loss of a call, or else its first output."""
    outputs = list(result) if isinstance(result, tuple) else [result]
    losses = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad and t.dim() == 0]
    return losses or outputs[:1]


def backward(
    forward: Callable[[], Any],
    grad: Tensor | None,
    leaves: list[Tensor],
) -> Callable[[], None]:
    """The call, and back from its `heads`, as a training step has them.

    Without ``grad`` one is drawn for each at the first call: a rival's output need not be of our
    shape, as with codes that it keeps as a matrix.
    """
    grads = None if grad is None else [grad]

    def step() -> None:
        nonlocal grads
        try:
            outputs = heads(forward())
            if grads is None:
                grads = [torch.randn_like(output) for output in outputs]
            torch.autograd.backward(outputs, grads)
        finally:  # a call that fails half-way must not leave gradients for the next to add to
            for leaf in leaves:
                leaf.grad = None

    return step


def stages(repeats: int) -> list[Record]:
    """The parts of a CPU training step that have goals of their own, at the main shape."""
    pre = torch.randn(256, 49152, generator=torch.Generator().manual_seed(0))
    gradient = dictionary_gradient(128, 768, 49152, 32)
    cases = (
        ("topk stage", "B256-k32", topk_stage(pre, 32), "torch.topk"),
        ("topk stage", "B256-k64", topk_stage(pre, 64), "torch.topk"),
        ("dW", "B128-k32", gradient, "dense torch"),
    )
    records: list[Record] = []
    for op, label, calls, base in cases:
        for name, times in measure(calls, "cpu", repeats, op, base).items():
            record: Record = {
                "op": op,
                "shape": label,
                "pass": "stage",
                "contender": name,
                "baseline": base,
            }
            records.append(record | times)
    return records


def run(
    ops: list[str] | None = None,
    backends: list[str] | None = None,
    *,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    repeats: int = 7,
    out: str | Path | None = None,
) -> list[Record]:
    """Time every op at its benchmark shapes (or at ``shape``), forward and forward + backward.

    Returns one record per op × shape × pass × contender: median seconds; the first baseline's time
    over it, eager (``speedup``, with an interval of 95 %) and under torch.compile
    (``speedup_compiled``); for forward passes also the share of the floor and the peak extra memory
    in bytes. ``out`` names a .json or .csv file to write.

    Raises ValueError for an op that is not known, and for a shape that lacks a size of an op or has
    others; RuntimeError where a backend is wrong.
    """
    names = ops or list(REGISTRY)
    for name in names:
        if name not in REGISTRY:
            raise ValueError(f"bench: op must be one of {sorted(REGISTRY)}, got {name!r}")
        if shape is not None:
            check_shape(REGISTRY[name], shape)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rates = ceilings(device, dtype)
    wanted = backends or list(BACKENDS)
    records: list[Record] = []
    for name in names:
        spec = REGISTRY[name]
        given = spec.bench_shapes if device == "cpu" else spec.gpu_bench_shapes
        if shape is not None:
            given = {"given": shape}
        for label, sizes in given.items():
            passes, leaves = _passes(spec, sizes, wanted, device, dtype)
            operations, moved = spec.floor(sizes)
            floor = max(operations / rates[0], moved * dtype.itemsize / 4 / rates[1])
            for kind, calls in passes.items():
                for leaf in leaves:
                    leaf.requires_grad_(kind != "forward")
                what = f"{name} {label} {kind}"
                for record in _timed(spec, calls, device, repeats, what):
                    if kind == "forward":
                        record["floor_share"] = floor / record["seconds"]
                    head = {"op": name, "shape": label, **sizes, "pass": kind}
                    records.append(head | record)
    if device == "cpu" and ops is None and shape is None:
        records += stages(repeats)
    if out is not None:
        write(Path(out), records, device)
    return records


def check_shape(spec: OpSpec, shape: Shape) -> None:
    """Raise ValueError where a shape lacks a size of this op, has others, or one is below 1."""
    known = [*spec.shapes, *spec.device_shapes, spec.small_shape, spec.repeat_shape]
    known += [*spec.bench_shapes.values(), *spec.gpu_bench_shapes.values()]
    wanted = [name for name in spec.small_shape if all(name in other for other in known)]
    more = {name: None for other in known for name in other if name not in wanted}
    example = ",".join(f"{n}={size}" for n, size in next(iter(spec.bench_shapes.values())).items())
    says = f"{spec.name} has the sizes {', '.join(wanted)}"
    if more:
        says += f" and may have {', '.join(more)}"
    lost = [name for name in wanted if name not in shape]
    other = [name for name in shape if name not in wanted and name not in more]
    if lost or other:
        parts = [f"lacks {', '.join(lost)}"] * bool(lost)
        parts += [f"has {', '.join(other)}"] * bool(other)
        raise ValueError(f"bench: the shape {' and '.join(parts)}; {says}, such as {example}")
    if wrong := [f"{name}={shape[name]}" for name in wanted if shape[name] < 1]:
        raise ValueError(f"bench: sizes must be at least 1, got {', '.join(wrong)}; {says}")


def _passes(
    spec: OpSpec,
    sizes: Shape,
    backends: list[str],
    device: str,
    dtype: torch.dtype,
) -> tuple[dict[str, Calls], list[Tensor]]:
    """The contenders forward, and back as well where there is a gradient, once ours are found
    right; and the inputs that have one."""
    drawn, inputs = draw(spec, sizes, dtype, device)
    calls = contenders(spec, inputs, backends, device, dtype)
    small = {name: min(size, spec.gate_sizes.get(name, size)) for name, size in sizes.items()}
    if small == sizes:
        gate(spec, drawn, inputs, calls, device)
    else:
        gate(spec, *draw(spec, small, dtype, device), calls, device)
    passes = {"forward": calls}
    leaves = [inputs[name].requires_grad_() for name in spec.leaves(inputs)]
    if leaves:
        passes["forward+backward"] = {n: backward(call, None, leaves) for n, call in calls.items()}
    return passes, leaves


def _timed(spec: OpSpec, calls: Calls, device: str, repeats: int, what: str) -> list[Record]:
    """A record of each call that runs here, without what it is of."""
    calls = runnable(calls, what)
    if not calls:
        return []
    base = next(name for name in (*spec.baselines, *calls) if name in calls)
    memory = {name: extra_memory(call, device) for name, call in calls.items()}
    found = measure(calls, device, repeats, what, base)
    records = []
    for contender, times in found.items():
        record: Record = {"contender": contender, "baseline": base, **times}
        record["extra_bytes"] = memory[contender]
        if "torch.compile" in found:
            compiled = found["torch.compile"]["seconds"]
            record["speedup_compiled"] = compiled / times["seconds"]
        records.append(record)
    return records


def runnable(calls: Calls, what: str) -> Calls:
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
    spec: OpSpec,
    sizes: Shape,
    dtype: torch.dtype,
    device: str,
) -> tuple[Inputs, Inputs]:
    """A case, on the host and on ``device``."""
    drawn = spec.make(sizes, dtype, torch.Generator().manual_seed(0), 1.0, False)
    moved = dict(drawn)
    for name, value in drawn.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
    return drawn, moved


def gate(spec: OpSpec, drawn: Inputs, inputs: Inputs, calls: Calls, device: str) -> None:
    """No time is taken of a wrong result: a few rows of every backend of ours are held to the bound
    first."""
    rows = [name for name in spec.rows or spec.gate if isinstance(drawn[name], Tensor)]
    few = drawn | {name: drawn[name][:8] for name in rows}
    cut = inputs | {name: inputs[name][:8] for name in rows}
    for backend in set(calls) & set(BACKENDS):
        outputs = named_outputs(spec, spec.function(**cut, backend=backend))
        host = {name: value.cpu() for name, value in outputs.items()}
        with measured_on(device):
            worst = spec.check(few, host)
        if max(worst.values()) > 1:
            what = f"{backend} {spec.name} is wrong here, and is not timed"
            raise RuntimeError(f"bench: {what}: {worst}")
