"""What a call costs before any arithmetic: ``python benchmarks/bench_calls.py``.

Every op on a case so small that its arithmetic is nothing, in turn with two of torch's own calls of the same size, on
one thread, in processor time: µs a call, the median of many short runs. "in full" is the same call as it is before its
kind is remembered. The share of the low-level op, which no Python above it can take away, is beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import OpSpec

Call = Callable[[], Any]


def drawn(spec: OpSpec, with_grad: bool) -> dict[str, Any]:
    inputs = spec.make(spec.small_shape, torch.float32, torch.Generator().manual_seed(0))
    for name in spec.leaves(inputs) if with_grad else ():
        inputs[name].requires_grad_()
    return inputs


def forward(function: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    return lambda: function(**inputs)


def and_backward(function: Callable[..., Any], inputs: dict[str, Any], leaves: list[str]) -> Call:
    """The call and its gradients, with a cotangent that is there already."""
    tensors = [inputs[name] for name in leaves]
    given: list[Tensor] = []

    def both() -> None:
        found = function(**inputs)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad]
        if not given:
            given.extend(torch.ones_like(t) for t in outputs)
        torch.autograd.grad(outputs, tensors, given, allow_unused=True)

    return both


def contenders() -> dict[str, dict[str, Call]]:
    """By row: the columns' calls."""
    g = torch.Generator().manual_seed(0)
    W, acts, bias = (torch.randn(*size, generator=g) for size in ((9, 4), (3, 3), (4,)))
    indices = torch.randint(9, (3, 3), generator=g)
    bag = {"input": indices, "weight": W, "per_sample_weights": acts, "mode": "sum"}
    product = {"input": bias, "mat1": torch.randn(3, 9, generator=g), "mat2": W}
    rows: dict[str, dict[str, Call]] = {}
    torchs: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
        "F.embedding_bag": (F.embedding_bag, bag, ["weight", "per_sample_weights"]),
        "torch.addmm": (torch.addmm, product, ["input", "mat1", "mat2"]),
    }
    for name, (function, inputs, leaves) in torchs.items():
        tracked = {k: v.clone().requires_grad_() if k in leaves else v for k, v in inputs.items()}
        rows[name] = {
            "inference": forward(function, inputs),
            "with a graph": forward(function, tracked),
            "and backward": and_backward(function, tracked, leaves),
        }
    for name, spec in REGISTRY.items():
        inputs = drawn(spec, False)
        rows[name] = {
            "in full": forward(spec.function.__wrapped__, inputs) if hasattr(spec.function, "__wrapped__") else None,
            "inference": forward(spec.function, inputs),
        }
        if leaves := spec.leaves(inputs):
            tracked = drawn(spec, True)
            rows[name]["with a graph"] = forward(spec.function, tracked)
            rows[name]["and backward"] = and_backward(spec.function, tracked, leaves)
    return rows


def measured(rows: dict[str, dict[str, Call]], repeats: int, calls: int) -> dict[str, dict[str, float]]:
    """µs a call; all take turns, so that what else the machine does meets them alike."""
    pairs = [(row, column, call) for row, columns in rows.items() for column, call in columns.items() if call]
    times: dict[tuple[str, str], list[float]] = {(row, column): [] for row, column, _ in pairs}
    for _, _, call in pairs:
        for _ in range(3):
            call()
    for _ in range(repeats):
        for row, column, call in pairs:
            start = time.process_time_ns()
            for _ in range(calls):
                call()
            times[row, column].append((time.process_time_ns() - start) / calls / 1000)
    found: dict[str, dict[str, float]] = {row: {} for row in rows}
    for (row, column), seen in times.items():
        found[row][column] = statistics.median(seen)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="short runs of each (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="calls of a short run (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(contenders(), options.repeats, options.calls)
    columns = ("in full", "inference", "with a graph", "and backward")
    print(f"| µs a call, torch {torch.__version__} | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for row, times in found.items():
        cells = (f"{times[column]:.1f}" if column in times else "" for column in columns)
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
