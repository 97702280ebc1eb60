"""The non-negative lasso over 10,000 concepts: ``pytest benchmarks/bench_splice.py`` (processor time).

Every contender is held to the optimality conditions that it claims before its time counts.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.splice import nonnegative_lasso

E, N, B, L1 = 512, 10_000, 256, 0.25


def problem() -> tuple[Tensor, Tensor]:
    """C (n, e) with the decaying spectrum and near neighbours of text embeddings; z (B, e), half sums of 8 concepts."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=generator)
    scale = torch.arange(1, E + 1) ** -0.5
    topics = randn(N // 20, E) * scale
    texts = F.normalize(topics.repeat(20, 1) + 0.7 * randn(N, E) * scale, dim=1)
    C = F.normalize(texts - texts.mean(0), dim=1)
    chosen = torch.randint(N, (B, 8), generator=generator)
    signal = F.normalize((torch.rand(B, 8, 1, generator=generator) * C[chosen]).sum(1), dim=1)
    return F.normalize(signal + F.normalize(randn(B, E) * scale, dim=1), dim=1), C


def violation(w: Tensor, z: Tensor, C: Tensor) -> float:
    slack = L1 - 2 * (z.double() - w.double() @ C.double()) @ C.double().T
    return float(torch.where(w > 0, slack.abs(), (-slack).clamp_min(0)).max())


def ista(z: Tensor, C: Tensor, tol: float) -> Tensor:
    """Proximal gradient with the step 1/L and no momentum; it looks at the conditions every 50 steps."""
    w, step = z.new_zeros(len(z), len(C)), 1 / (2 * torch.linalg.matrix_norm(C, 2).square())
    for i in range(1, 20_001):
        slack = L1 - 2 * (z - w @ C) @ C.T
        if i % 50 == 0 and float(torch.where(w > 0, slack.abs(), (-slack).clamp_min(0)).max()) <= tol:
            break
        w = (w - step * slack).relu()
    return w


@pytest.mark.benchmark(timer=time.process_time, group=f"non-negative lasso, B = {B}, n = {N}, e = {E}")
def test_clipsteer(benchmark):
    z, C = problem()
    found = benchmark.pedantic(nonnegative_lasso, (z, C, L1), rounds=3, warmup_rounds=1)
    benchmark.extra_info["l0"] = float(found.l0.double().mean())
    benchmark.extra_info["violation"] = violation(found.weights, z, C)
    assert bool(found.converged.all())


@pytest.mark.parametrize("tol", [1e-3, 1e-4])
@pytest.mark.benchmark(timer=time.process_time, group=f"non-negative lasso, B = {B}, n = {N}, e = {E}")
def test_torch_ista(benchmark, tol):
    z, C = problem()
    w = benchmark.pedantic(ista, (z, C, tol), rounds=1)
    benchmark.extra_info["violation"] = violation(w, z, C)
    assert violation(w, z, C) <= 1.1 * tol


@pytest.mark.benchmark(timer=time.process_time, group=f"non-negative lasso, B = {B}, n = {N}, e = {E}")
def test_scikit_learn_row_by_row(benchmark):
    linear_model = pytest.importorskip("sklearn.linear_model")
    z, C = problem()
    lasso = linear_model.Lasso(L1 / (2 * E), fit_intercept=False, positive=True, max_iter=10_000, tol=1e-6)
    X = C.T.contiguous().numpy()

    def rows() -> Tensor:
        return torch.stack([torch.from_numpy(lasso.fit(X, row.numpy()).coef_.copy()) for row in z])

    w = benchmark.pedantic(rows, rounds=1)
    benchmark.extra_info["violation"] = violation(w, z, C)
