"""The bounds of the ops' specs beside those that ``testing.bound`` finds by itself.

    python -m benchmarks.proof.bounds --cases 10000 --out benchmarks/results/proofs/bounds.json

Of every output and gradient in float32: the hand-derived bound over the automatic one, at elements that are moved far
enough to be judged alone; how long either takes; and how many right results (of the reference and of C++, scales 1,
1e-2 and 1e2) the automatic one calls wrong. Kept after every op; the same command goes on after the last one kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer import testing
from clipsteer.ops import REGISTRY
from clipsteer.ops._spec import OpSpec, Ran, cotangents, judged, run

BACKENDS = ("reference", "cpp")
SCALES = (1.0, 1e-2, 1e2)
ELEMENTS = 2  # of each output and gradient, whose bounds are compared
FAR = 1e4  # bounds that they are moved by


def moved(ran: Ran, name: str, at: int, step: float, names: tuple[str, ...]) -> tuple[Ran, float]:
    """One element off by ``step``, and how far it is then from where it was."""
    own = name.removeprefix("d ")
    tensors = dict(zip(names, ran.outputs)) if own == name else dict(ran.gradients)
    changed = tensors[own].clone()
    changed.view(-1)[at] += step
    far = abs(float(changed.view(-1)[at]) - float(tensors[own].reshape(-1)[at]))
    tensors[own] = changed
    if own == name:
        return ran._replace(outputs=tuple(tensors.values())), far
    return ran._replace(gradients=tensors), far


def one(spec: OpSpec, number: int, found: dict[str, Any]) -> None:
    """One case: its verdict, and every third time the bounds side by side."""
    backend = BACKENDS[number % 2]
    shape = spec.shapes[number % len(spec.shapes)]
    generator = torch.Generator().manual_seed(number)
    inputs = spec.make(shape, torch.float32, generator, SCALES[number % 3])
    given = partial(cotangents, dtype=torch.float32, generator=generator)
    # one cotangent of each output for both
    drawn: list[tuple[Tensor | None, ...]] = []

    def once(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        drawn.append(given(outputs))
        return drawn[-1]

    ran = run(partial(spec.function, backend=backend), inputs, spec.leaves(inputs), once)
    start = time.perf_counter()
    auto = testing.bound(spec.reference, inputs, dtype=torch.float32, grad_outputs=ran.cotangents if drawn else None)
    middle = time.perf_counter()
    judged(spec, inputs, ran)
    found["automatic ms"].append(1e3 * (middle - start))
    found["by hand ms"].append(1e3 * (time.perf_counter() - middle))
    found["cases"] += 1
    bounded = dict(zip(spec.outputs, auto.outputs)) | {f"d {n}": b for n, b in auto.gradients.items()}
    results = dict(zip(spec.outputs, ran.outputs)) | {f"d {n}": g for n, g in ran.gradients.items()}
    for name, result in results.items():
        if name not in bounded or result.numel() == 0:
            continue
        share = float(bounded[name].fraction(result).max())
        found["worst"] = max(found["worst"], share)
        if share > 1:
            found["alarms"].append(
                f"{backend} {name} at {shape}, seed {number}, scale {SCALES[number % 3]:g}: {share:g}"
            )
        if number % 3 or not result.is_floating_point():
            continue
        limit = bounded[name].allowed(torch.float32).reshape(-1)
        for _ in range(ELEMENTS):
            at = int(torch.randint(result.numel(), (), generator=generator))
            if not 0 < float(limit[at]) < math.inf:
                continue
            other, far = moved(ran, name, at, FAR * float(limit[at]), spec.outputs)
            by_hand = judged(spec, inputs, other).get(name, math.nan)
            if far > 0 and 0 < by_hand < math.inf:
                found["ratios"].setdefault(name, []).append(far / by_hand / float(limit[at]))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Figures of one op."""
    ratios = {}
    for name, values in found["ratios"].items():
        ratios[name] = {
            "least": min(values),
            "median": statistics.median(values),
            "most": max(values),
            "of": len(values),
        }
    return {
        "cases": found["cases"],
        "false alarms": found["alarms"],
        "worst share": found["worst"],
        "automatic ms": statistics.median(found["automatic ms"]),
        "by hand ms": statistics.median(found["by hand ms"]),
        "by hand over automatic": ratios,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| op | cases | false alarms | worst share | bound by hand / automatic (medians) | ms by hand, automatic |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["ops"].items():
        ratios = ", ".join(f"{n} {r['median']:.2g}" for n, r in row["by hand over automatic"].items())
        times = f"{row['by hand ms']:.1f}, {row['automatic ms']:.1f}"
        alarms = len(row["false alarms"])
        lines.append(f"| {name} | {row['cases']} | {alarms} | {row['worst share']:.2g} | {ratios} | {times} |")
    return "\n".join(lines)


def kept(out: Path | None, each: int) -> dict[str, Any]:
    """The ops of an earlier run that took as many cases of them."""
    if out is None or not out.exists():
        return {}
    earlier = json.loads(out.read_text())["ops"]
    return {name: row for name, row in earlier.items() if name in REGISTRY and row["cases"] == each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all ops together")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    each = math.ceil(args.cases / len(REGISTRY))
    results: dict[str, Any] = {"machine": testing.bench.machine("cpu"), "ops": kept(args.out, each)}
    missing = [(name, spec) for name, spec in REGISTRY.items() if name not in results["ops"]]
    with tqdm(total=each * len(missing), unit="case", disable=None) as progress:
        for name, spec in missing:
            found: dict[str, Any] = {"cases": 0, "alarms": [], "worst": 0.0, "ratios": {}}
            found |= {"automatic ms": [], "by hand ms": []}
            for number in range(each):
                one(spec, number, found)
                progress.update()
            results["ops"][name] = summary(found)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
