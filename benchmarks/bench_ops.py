"""The registry's micro-benchmarks under pytest-benchmark: ``pytest benchmarks/bench_ops.py``.

Timings are processor time. ``clipsteer bench`` interleaves the contenders and is the better judge of ratios.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from clipsteer.ops import BACKENDS, REGISTRY
from clipsteer.ops._lowlevel import OPS
from clipsteer.testing import bench

CASES = [(name, label) for name, spec in REGISTRY.items() for label in spec.bench_shapes]


def contenders(name: str) -> list[str]:
    return [*OPS[name].backends[1:], *REGISTRY[name].baselines, "torch.compile"]


@pytest.mark.parametrize(("name", "label", "contender"), [(n, s, c) for n, s in CASES for c in contenders(n)])
@pytest.mark.benchmark(timer=time.process_time, warmup=True, warmup_iterations=1)
def test_forward(benchmark, name, label, contender):
    spec = REGISTRY[name]
    benchmark.group = f"{name} {label}"
    inputs = spec.make(spec.bench_shapes[label], torch.float32, torch.Generator().manual_seed(0), 1.0, False)
    calls = bench.contenders(spec, inputs, list(BACKENDS), "cpu")
    if contender not in calls:
        pytest.skip(f"{contender} cannot run here")
    bench.gate(spec, inputs, inputs, calls, "cpu")
    benchmark.pedantic(calls[contender], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(
    "way", ["kept buffer", "row-sparse", "fresh", "dense torch", "dense torch, kept", "dense matmul"]
)
@pytest.mark.benchmark(timer=time.process_time, group="dW, B = 128")
def test_dictionary_gradient(benchmark, way):
    calls = bench.dictionary_gradient(128, 768, 49152, 32)
    if way not in calls:
        pytest.skip("the C++ library is not built")
    call = calls[way]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def test_topk_stage(benchmark):
    pre: Tensor = torch.randn(256, 49152, generator=torch.Generator().manual_seed(0))
    calls = bench.topk_stage(pre, 64)
    if "cpp" not in calls:
        pytest.skip("the C++ library is not built")
    benchmark.pedantic(calls["cpp"], rounds=5, warmup_rounds=1)
