"""A worked example: a softmax in Triton with a planted bug, found, shrunk and mended.

    python -m benchmarks.proof.softmax_example

Without a GPU its kernel is interpreted. The README shows what is printed.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import triton
import triton.language as tl

from clipsteer import testing


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, columns, other, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + at, mask=at < columns, other=other)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row + at, e / tl.sum(e, axis=0), mask=at < columns)


def launch(x: Tensor, other: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _softmax_kernel[(x.shape[0],)](x, out, x.shape[1], other, BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def wrong(x: Tensor) -> Tensor:  # (B, d); columns beyond the last count as 0, and so does their exponential
    return launch(x, 0.0)


def mended(x: Tensor) -> Tensor:
    return launch(x, -float("inf"))


def plain(x: Tensor) -> Tensor:
    return x.softmax(-1)


cases = testing.Cases({"x": "B d"})


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    verdicts = []
    for fast in (wrong, mended):
        report = testing.prove(
            fast, plain, cases, properties=["values", "layouts"], cases=20, gradients=False, device=device
        )
        sys.stdout.write(f"{report}\n\n")
        verdicts.append(report.passed)
    return int(verdicts != [False, True])


if __name__ == "__main__":
    sys.exit(main())
