"""Every op over dtype, batch and number of threads, beside the fastest way that torch and other
libraries have: ``clipsteer bench --grid``.

A record tells of one cell: how many times as fast as its fastest rival a call is that leaves the
backend to us, and where the median of the paired ratios lies. Values and gradients are held to the
op's bound first; a cell where they are not has no ratio.

    records = run(["topk_encode"], ["bfloat16"], rows=[1, 256], out="grid")
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import (
    Draw,
    Inputs,
    OpSpec,
    Shape,
    cotangents,
    judged,
    named_outputs,
)
from clipsteer.ops._spec import run as run_once
from clipsteer.testing.bench import backward, heads
from clipsteer.testing.records import Record, read, write
from clipsteer.testing.table import is_rival
from clipsteer.testing.timing import GROUP, Calls, compared, processor_time, take_turns

__all__ = ["DTYPES", "NAME", "PASSES", "ROWS", "THREADS", "Cell", "cells", "run", "shape_at"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS = (1, 8, 32, 256, 4096)
THREADS = (1, 2)
PASSES = ("forward", "forward+backward")
NAME = "grid.json"

# The product of rows and features, up to which a case has all 49,152 features of the main
# benchmark: a dense rival's operations grow with it. torch has no fast float16 product on most
# processors, so there it is a quarter.
_PRODUCT = 2**24
_PRODUCT_HALF = 2**22
# what the check of values is cut to where its float64 matrices would be large
_CHECKED = 2**21
_GRADIENT_CHECK = {"B": 64, "N": 200, "n": 2048}
# numbers of one tensor from which on cases share what was drawn
_SHARED = 2**22
# a rival that takes so many times the fastest one's time, and so many seconds more, does not take
# part in the turns, nor at larger batches
_HOPELESS = 3.0
_NOTICEABLE = 1e-3
# rounds: at least, where one takes long, and at most
_FEWEST = 5
_FEWEST_LONG = 3
_LONG = 1.0
_MOST = 15
OURS = "clipsteer"


class Cell(NamedTuple):
    """What is timed together: one case of an op, forward and back."""

    op: str
    dtype: str
    rows: int
    threads: int


def cells(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
) -> list[Cell]:
    """Those asked for, in the order in which they are timed.

    Raises ValueError for an op or a dtype that is not known, and for numbers below 1.
    """
    for name in ops or ():
        if name not in REGISTRY:
            raise ValueError(f"bench: op must be one of {sorted(REGISTRY)}, got {name!r}")
    for name in dtypes or ():
        if name not in DTYPES:
            raise ValueError(f"bench: dtype must be one of {DTYPES}, got {name!r}")
    for what, numbers in (("rows", rows), ("threads", threads)):
        if any(number < 1 for number in numbers or ()):
            raise ValueError(f"bench: {what} must be at least 1, got {list(numbers or ())}")
    found = []
    for thread_count in threads or THREADS:
        for dtype in dtypes or DTYPES:
            for op in ops or REGISTRY:
                for B in sorted(rows or ROWS):
                    found.append(Cell(op, dtype, B, thread_count))
    return found


def shape_at(spec: OpSpec, rows: int, dtype: str) -> Shape:
    """The op's first benchmark shape with this many rows, and with fewer features where there are
    many rows."""
    shape = dict(next(iter(spec.bench_shapes.values())))
    shape["B" if "B" in shape else "N"] = rows
    if "n" in shape:
        limit = _PRODUCT_HALF if dtype == "float16" else _PRODUCT
        shape["n"] = min(shape["n"], limit // rows)
    return shape


def label_of(shape: Shape) -> str:
    """The sizes of a shape in words, without its switches."""
    return "-".join(f"{name}{size}" for name, size in shape.items() if name not in _SWITCHES)


_SWITCHES = ("plain", "percent", "even")


def run(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    rows: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    seconds: float = 0.3,
    compiled: bool = True,
    out: str | Path | None = None,
) -> list[Record]:
    """Time the cells asked for (by default all of them) on the CPU.

    Args:
        ops, dtypes, rows, threads: which; see `cells`.
        seconds: about how long each pass of a cell is timed; at least three rounds are.
        compiled: whether torch.compile of the first baseline takes part, with dynamic shapes, made
            once for an op, dtype and number of threads.
        out: a folder. Its ``grid.json`` is written after every cell, and cells that it holds are
            not timed again.

    Returns the records of the cells asked for, those of earlier runs as well. A record has op,
    dtype, shape and its sizes, rows, threads, pass, and

    - ``seconds`` of ours, ``baseline`` (the fastest rival), ``speedup`` over it, an interval of
      95 % of the median of paired ratios ``speedup_low`` to ``speedup_high`` and ``rounds``;
    - ``rivals``: seconds of every rival, and ``left_out``: why others have none;
    - or instead of all these ``wrong``: what was outside of its bound or raised.

    Raises ValueError as `cells`; FileFormatError where ``out`` holds another file of that name.
    """
    wanted = cells(ops, dtypes, rows, threads)
    place = None if out is None else Path(out) / NAME
    kept: dict[Cell, list[Record]] = {}
    if place is not None and place.exists():
        _, earlier = read(place)
        for record in earlier:
            kept.setdefault(cell_of(record), []).append(record)
    missing = [cell for cell in wanted if cell not in kept]
    before = torch.get_num_threads()
    bar = tqdm(missing, desc="bench --grid", unit="cell", disable=None)
    race: _Race | None = None
    try:
        for cell in bar:
            bar.set_postfix_str(f"{cell.op} {cell.dtype} B={cell.rows} threads={cell.threads}")
            torch.set_num_threads(cell.threads)
            key = (cell.op, cell.dtype, cell.threads)
            if race is None or race.key != key:
                race = _Race(key, compiled)
            kept[cell] = _records(race, cell, seconds)
            if place is not None:
                every = [record for records in kept.values() for record in records]
                write(place, every, "cpu", {"threads": max(cell.threads for cell in kept)})
    finally:
        torch.set_num_threads(before)
        _drawn.clear()
    return [record for cell in wanted for record in kept[cell]]


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(record["op"], record["dtype"], record["rows"], record["threads"])


_drawn: dict[tuple[Any, ...], Tensor] = {}


@dataclass(frozen=True)
class _SharedDraw(Draw):
    """Cases of one dtype share their dictionary, which takes longest to draw."""

    def tensor(self, *size: int, scale: float | None = None) -> Tensor:
        if torch.Size(size).numel() < _SHARED:
            return super().tensor(*size, scale=scale)
        key = (self.dtype, size, scale, self.scale)
        if key not in _drawn:
            if any(known[0] != self.dtype for known in _drawn):
                _drawn.clear()
            _drawn[key] = super().tensor(*size, scale=scale)
        return _drawn[key].detach()


def _case(spec: OpSpec, shape: Shape, dtype: torch.dtype) -> Inputs:
    return spec.draw(_SharedDraw(shape, dtype, torch.Generator().manual_seed(0), 1.0, False))


class _Race:
    """The rivals of an op in one dtype at one number of threads, over all batches."""

    def __init__(self, key: tuple[str, str, int], compiled: bool) -> None:
        self.key = key
        self.threads = key[2]
        self.spec = REGISTRY[key[0]]
        self.rivals: dict[str, Callable[..., Any]] = {}
        label = label_of(next(iter(self.spec.bench_shapes.values())))
        for name, baseline in self.spec.baselines.items():
            if is_rival(self.spec.name, label, name):
                self.rivals[name] = baseline
        if compiled:
            # what was compiled for another op or number of threads counts against a limit
            torch._dynamo.reset()
            base = next(iter(self.spec.baselines.values()))
            self.rivals["torch.compile"] = torch.compile(base, dynamic=True)
        # by pass, why a rival does not take part at larger batches
        self.hopeless: dict[str, dict[str, str]] = {kind: {} for kind in PASSES}


def _records(race: _Race, cell: Cell, seconds: float) -> list[Record]:
    """Of one case forward and, where there is a gradient, back."""
    spec = race.spec
    dtype = getattr(torch, cell.dtype)
    shape = shape_at(spec, cell.rows, cell.dtype)
    head: Record = {"op": cell.op, "shape": label_of(shape), **shape, "dtype": cell.dtype}
    head |= {"rows": cell.rows, "threads": cell.threads}
    gc.collect()
    kinds = PASSES if spec.differentiable else PASSES[:1]
    inputs = _case(spec, shape, dtype)
    wrong = _wrong(spec, shape, inputs)
    records = []
    failed: dict[str, str] = {}
    for kind in kinds:
        record = head | {"pass": kind, "contender": OURS}
        if wrong is None:
            with _gradients(spec, inputs, kind == PASSES[1]) as leaves:
                record |= _timed(race, inputs, leaves, kind, failed, seconds)
        else:
            record["wrong"] = wrong
        records.append(record)
    return records


@contextmanager
def _gradients(spec: OpSpec, inputs: Inputs, wanted: bool) -> Iterator[list[Tensor]]:
    """The inputs that have a gradient inside, where one is wanted."""
    leaves = [inputs[name] for name in spec.leaves(inputs)] if wanted else []
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        yield leaves
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


def _wrong(spec: OpSpec, shape: Shape, inputs: Inputs) -> str | None:
    """None where our values and gradients keep their bounds, else what does not.

    Values are those of the case that is timed, of 8 of its rows where rows are independent; where
    they are not and the check would have large matrices, of a case with fewer rows. Gradients are
    those of a smaller case.
    """
    dtype = next(t.dtype for t in inputs.values() if _floating(t))
    try:
        values = _worst_values(spec, shape, inputs, dtype)
        if max(values.values()) > 1:
            return f"values are off by {_said(values)} of their bound"
        small = {name: min(size, _GRADIENT_CHECK.get(name, size)) for name, size in shape.items()}
        drawn = _case(spec, small, dtype)
        given = partial(cotangents, dtype=dtype, generator=torch.Generator().manual_seed(1))
        errors = judged(spec, drawn, run_once(spec.function, drawn, spec.leaves(drawn), given))
        if max(errors.values()) > 1:
            return f"values or gradients are off by {_said(errors)} of their bound"
    except Exception as error:  # one op that fails must not end the grid
        return _reason(error)
    return None


def _worst_values(
    spec: OpSpec, shape: Shape, inputs: Inputs, dtype: torch.dtype
) -> dict[str, float]:
    if spec.rows:
        outputs = named_outputs(spec, spec.function(**inputs))
        few = {name: inputs[name][:8] for name in spec.rows if isinstance(inputs[name], Tensor)}
        return spec.check(inputs | few, {name: value[:8] for name, value in outputs.items()})
    limits = dict(spec.gate_sizes)
    if "n" in shape:
        limits["B"] = max(_CHECKED // shape["n"], 1)
    small = {name: min(size, limits.get(name, size)) for name, size in shape.items()}
    if small != shape:
        inputs = _case(spec, small, dtype)
    few = {name: inputs[name][:8] for name in spec.gate}
    return spec.check(inputs | few, named_outputs(spec, spec.function(**inputs | few)))


def _said(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items() if error > 1)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"[:200]


def _timed(
    race: _Race,
    inputs: Inputs,
    leaves: list[Tensor],
    kind: str,
    failed: dict[str, str],
    seconds: float,
) -> Record:
    """Ours and the rivals that can win, in turn; those that cannot run join ``failed``."""
    calls: Calls = {}
    once: dict[str, float] = {}
    for name, function in {OURS: race.spec.function, **race.rivals}.items():
        if name in failed or name in race.hopeless[kind]:
            continue
        call = partial(function, **inputs)
        try:
            calls[name], once[name] = _warmed(call, leaves)
        except Exception as error:  # a rival lacks the dtype, the memory, its package, a compiler
            if name == OURS:
                return {"wrong": _reason(error)}
            failed[name] = _reason(error)
    left_out = failed | race.hopeless[kind]
    rivals = {name: once[name] for name in calls if name != OURS}
    fastest = min(rivals.values(), default=0.0)
    for name, spent in rivals.items():
        if spent > _HOPELESS * fastest and spent > fastest + _NOTICEABLE:
            del calls[name]
            reason = f"{spent / fastest:.1f} times the fastest rival's time at this or fewer rows"
            race.hopeless[kind][name] = reason
    # at one thread no other thread's time has to be seen
    group = 0.003 if race.threads == 1 else GROUP
    turn = sum(max(once[name], group) for name in calls)
    fewest = _FEWEST if turn < _LONG else _FEWEST_LONG
    rounds = min(max(int(seconds / turn), fewest), _MOST)
    samples = take_turns(calls, partial(processor_time, at_least=group), rounds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rivals |= {name: medians[name] for name in calls if name != OURS}
    found: Record = {"seconds": medians[OURS], "rounds": rounds, "rivals": rivals}
    found["left_out"] = left_out
    if rivals:
        best = min((name for name in calls if name != OURS), key=medians.__getitem__)
        found |= {"baseline": best} | compared(samples, best)[OURS]
    return found


def _warmed(call: Callable[[], Any], leaves: list[Tensor]) -> tuple[Callable[[], Any], float]:
    """The call, and back where there are leaves, and about how long that takes once the first is
    behind it. Raises ArithmeticError where its result is not finite."""
    results: list[Any] = []
    if leaves:
        call = backward(call, None, leaves)
        spent = processor_time(call, 0.0)
    else:
        spent = processor_time(lambda: results.append(call()), 0.0)
    # whatever is compiled or allocated at first takes longer
    spent = min(spent, processor_time(call, 0.0))
    for output in (output for result in results for output in heads(result)):
        if not bool(output.isfinite().all()):
            raise ArithmeticError("its result is not finite")
    return call, spent
