"""The agreement of two sets of concepts: this package's ops beside loops over rows and the best plain torch.

    python -m benchmarks.alignment.speed --out benchmarks/results/alignment/speed.json
    python -m benchmarks.alignment.speed --large --out benchmarks/results/alignment/large.json

Times are the process's own, the least of several runs on one thread (``--large``: also on two, by the clock), so that
what else the machine does counts little. Loops over concepts and rows are timed for a few concepts of all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.io.files import write_json
from clipsteer.testing.machine import extra_memory, machine

FEW = 4  # concepts of which the loop over concepts and rows is timed


def memberships(N: int, K: int, seed: int) -> Tensor:
    return (2 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))).softmax(1)


def codes(N: int, K: int, k: int, seed: int) -> ops.SparseScores:
    """Of k features a row, whose sum is 1."""
    g = torch.Generator().manual_seed(seed)
    acts = torch.rand(N, k, generator=g)
    indices = torch.stack([torch.randperm(K, generator=g)[:k] for _ in range(N)])
    return ops.SparseScores.of((acts / acts.sum(1, keepdim=True), indices), K)


# ---------------------------------------------------------------- what else there is


def index_by_rows(P: Tensor, Q: Tensor) -> Tensor:
    """A loop over rows, from the paper's formula."""
    N, total = len(P), torch.zeros(())
    for i in range(N):
        alike_p = 1 - (P[i] - P[i + 1 :]).abs().sum(1) / 2
        alike_q = 1 - (Q[i] - Q[i + 1 :]).abs().sum(1) / 2
        total += (alike_p - alike_q).abs().sum()
    return 1 - 2 * total / (N * (N - 1))


def distances_by_rows(P: Tensor, Q: Tensor) -> Tensor:
    """A loop over concepts and rows, from the paper's formula."""
    N, total = len(P), torch.zeros(P.shape[1], Q.shape[1])
    for a in range(P.shape[1]):
        for i in range(N):
            u, v = (P[i, a] - P[i + 1 :, a]).abs(), (Q[i] - Q[i + 1 :]).abs()
            total[a] += (u.unsqueeze(1) - v).abs().sum(0)
    return total / (N * (N - 1))


def index_by_pdist(P: Tensor, Q: Tensor) -> Tensor:
    N = len(P)
    apart = torch.nn.functional.pdist(P, 1) - torch.nn.functional.pdist(Q, 1)
    return 1 - apart.abs().sum() / (N * (N - 1))


def index_by_cdist(P: Tensor, Q: Tensor, block: int = 256) -> Tensor:
    """Blocks of rows against those that follow."""
    N, total = len(P), torch.zeros(())
    for i in range(0, N, block):
        apart = torch.cdist(P[i : i + block], P[i:], 1) - torch.cdist(Q[i : i + block], Q[i:], 1)
        total += apart.abs().triu(1).sum()
    return 1 - total / (N * (N - 1))


def distances_by_sort(P: Tensor, Q: Tensor) -> Tensor:
    """The sorted sums, a concept of P at a time."""
    N = len(P)
    rank = (2 * torch.arange(N) - N + 1).double()
    of_p, of_q = (x.T.contiguous().sort(1).values.double() @ rank for x in (P, Q))
    both = [torch.cat([x - Q.T, x + Q.T]).sort(1).values.double() @ rank for x in P.T]
    rows = [b.view(2, -1).sum(0) - own - of_q for b, own in zip(both, of_p)]
    return (torch.stack(rows) / (N * (N - 1))).float()


# ---------------------------------------------------------------- measurements


def seconds(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def measured(call: Callable[[], Any], repeats: int = 5, share: float = 1.0) -> dict[str, float]:
    """Seconds, and MB beside inputs and result; of ``share`` of the work."""
    return {"seconds": seconds(call, repeats) / share, "extra_mb": extra_memory(call, "cpu") / 2**20}


def side_by_side(N: int, K: int) -> dict[str, Any]:
    P, Q = memberships(N, K, 0), memberships(N, K, 1)
    images = torch.arange(N) // 10
    live = [x.clone().requires_grad_() for x in (P, Q)]
    index = {
        "loop over rows": measured(lambda: index_by_rows(P, Q), 1),
        "torch pdist": measured(lambda: index_by_pdist(P, Q)),
        "torch cdist, blocks": measured(lambda: index_by_cdist(P, Q), 2),
        "ours": measured(lambda: ops.generalised_rand_index(P, Q), 9),
        "ours, with gradients": measured(lambda: torch.autograd.grad(ops.generalised_rand_index(*live), live), 3),
        "ours, jackknife": measured(lambda: ops.generalised_rand_index_jackknife(P, Q, images)),
    }
    distances = {
        "loop over concepts and rows": measured(lambda: distances_by_rows(P[:, :FEW], Q), 1, FEW / K),
        "torch sort": measured(lambda: distances_by_sort(P, Q), 1),
        "ours": measured(lambda: ops.concept_distances(P, Q)),
        "ours, jackknife": measured(lambda: ops.concept_distances_jackknife(P, Q, images), 2),
    }
    few = distances_by_rows(P[:500, :FEW], Q[:500]) - ops.concept_distances(P[:500, :FEW], Q[:500])
    off = {
        "index": float((index_by_rows(P, Q) - ops.generalised_rand_index(P, Q)).abs()),
        "distances": float(few.abs().max()),
    }
    return {"N": N, "K": K, "L": K, "index": index, "distances": distances, "largest difference": off}


def sparse(N: int, K: int, k: int) -> dict[str, Any]:
    P, Q = codes(N, K, k, 0), codes(N, K, k, 1)
    dense = [x.dense() for x in (P, Q)]
    few = [codes(N, 512, k, seed) for seed in (0, 1)]
    return {
        "N": N, "K": K, "k": k,
        "index": measured(lambda: ops.generalised_rand_index(P, Q)),
        "index of the matrices": measured(lambda: ops.generalised_rand_index(*dense), 1),
        "distances of 512 concepts": measured(lambda: ops.concept_distances(*few), 1),
    }  # fmt: skip


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log time over log size."""
    x, y = ([math.log(v) for v in values] for values in (sizes, times))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def exponents() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, op in (("index", ops.generalised_rand_index), ("distances", ops.concept_distances)):
        for what, sizes in (("N", [2000, 4000, 8000]), ("K", [32, 64, 128])):
            times = []
            for size in sizes:
                N, K = (size, 64) if what == "N" else (3000, size)
                if name == "distances":
                    K //= 2
                P, Q = memberships(N, K, 0), memberships(N, K, 1)
                times.append(seconds(lambda op=op, P=P, Q=Q: op(P, Q), 5))
            found[f"{name} in {what}"] = {"sizes": sizes, "seconds": times, "exponent": exponent(sizes, times)}
    return found


def large(N: int = 50_000, K: int = 200) -> dict[str, Any]:
    P, Q = memberships(N, K, 0), memberships(N, K, 1)
    result: dict[str, Any] = {"N": N, "K": K, "L": K}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        clock, own = time.perf_counter(), time.process_time()
        value = float(ops.generalised_rand_index(P, Q))
        clock, own = time.perf_counter() - clock, time.process_time() - own
        result[f"{threads} threads"] = {"clock_s": clock, "process_s": own, "value": value}
    torch.set_num_threads(1)
    result["extra_mb"] = extra_memory(lambda: ops.generalised_rand_index(P[:20_000], Q[:20_000]), "cpu") / 2**20
    result["extra_mb of N"] = 20_000
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--concepts", type=int, default=100)
    parser.add_argument("--large", action="store_true", help="N = 50,000, K = L = 200 instead")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.large:
        found = {"machine": machine("cpu"), "large": large()}
    else:
        found = {
            "machine": machine("cpu"),
            "side by side": side_by_side(args.rows, args.concepts),
            "sparse": sparse(args.rows, 4096, 32),
            "exponents": exponents(),
        }
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, found)


if __name__ == "__main__":
    main()
