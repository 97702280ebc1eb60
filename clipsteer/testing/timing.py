"""Stopwatches for several calls in turn, and the rates that a machine reaches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

Calls = dict[str, Callable[[], Any]]
# Seconds that calls are timed for at a time: of other threads' time the system counts steps of
# milliseconds, so that short calls are timed in groups.
GROUP = 0.02


def clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """A stopwatch: seconds of processor time on the CPU, of device time on a GPU."""
    if device == "cpu":
        return processor_time
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def timed(call: Callable[[], Any]) -> float:
        flush.zero_()  # a cold L2
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return timed


def processor_time(call: Callable[[], Any], at_least: float = GROUP) -> float:
    """Seconds of processor time of a call, the mean of as many as fill ``at_least``."""
    calls = 0
    begin = time.process_time()
    while (spent := time.process_time() - begin) < at_least or not calls:
        call()
        calls += 1
    return spent / calls


def take_turns(
    calls: Calls,
    timed: Callable[[Callable[[], Any]], float],
    repeats: int,
    label: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` times: all calls once, then all again. A bar says
    ``label``."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    hidden = True if label is None else None
    for _ in tqdm(range(repeats), desc=label, disable=hidden, leave=False):
        for name, call in calls.items():
            found[name].append(timed(call))
    return found


def compared(samples: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Median seconds of each call of `take_turns`, and how much faster than ``base`` it is: over
    medians, and where the median of the ratios of neighbouring timings lies, ``speedup_low`` to
    ``speedup_high``."""
    usual = statistics.median(samples[base])
    found = {}
    for name, values in samples.items():
        median = statistics.median(values)
        low, high = median_interval([a / b for a, b in zip(samples[base], values)])
        found[name] = {
            "seconds": median,
            "speedup": usual / median,
            "speedup_low": low,
            "speedup_high": high,
        }
    return found


def measure(
    calls: Calls,
    device: str,
    repeats: int,
    label: str,
    base: str,
) -> dict[str, dict[str, float]]:
    """`compared` of so many turns, after a call of each that is not timed."""
    for call in calls.values():
        call()
    return compared(take_turns(calls, clock(device), repeats, label), base)


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


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The machine's measured rates, for the floors: operations/s of a large product, bytes/s of a
    large copy."""
    timed = clock(device)
    size = 1536 if device == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    mebibytes = 64 if device == "cpu" else 1024
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ b) for _ in range(5))
    copy = min(timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() * 4 / copy
