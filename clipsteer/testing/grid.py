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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import Inputs, OpSpec
from clipsteer.testing.bench import backward, heads
from clipsteer.testing.grid_cases import (
    case_of,
    forget,
    label_of,
    reason_of,
    shape_at,
    what_is_wrong,
)
from clipsteer.testing.records import Record, read, write
from clipsteer.testing.table import is_rival
from clipsteer.testing.timing import GROUP, Calls, compared, processor_time, take_turns

__all__ = ["DTYPES", "NAME", "PASSES", "ROWS", "THREADS", "Cell", "cells", "run"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS = (1, 8, 32, 256, 4096)
THREADS = (1, 2)
PASSES = ("forward", "forward+backward")
NAME = "grid.json"

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


def run(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    *,
    rows: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    seconds: float = 0.2,
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
                every = [record for known in sorted(kept, key=place_of) for record in kept[known]]
                write(place, every, "cpu", {"threads": max(cell.threads for cell in kept)})
    finally:
        torch.set_num_threads(before)
        forget()
    return [record for cell in wanted for record in kept[cell]]


def place_of(cell: Cell) -> tuple[int, ...]:
    """Where a cell stands in a file: as those of `cells`."""
    names = list(REGISTRY)
    op = names.index(cell.op) if cell.op in names else len(names)
    dtype = DTYPES.index(cell.dtype) if cell.dtype in DTYPES else len(DTYPES)
    return cell.threads, dtype, op, cell.rows


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    return Cell(record["op"], record["dtype"], record["rows"], record["threads"])


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
    inputs = case_of(spec, shape, dtype)
    wrong = what_is_wrong(spec, shape, inputs)
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
                return {"wrong": reason_of(error)}
            failed[name] = reason_of(error)
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
