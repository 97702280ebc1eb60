"""The non-negative lasso over 10,000 concepts: ``pytest benchmarks/bench_splice.py`` (processor time).

How far each contender ends from the optimality conditions is kept beside its time (``--benchmark-json``, extra_info).
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.splice import nonnegative_lasso

E, N, B, L1 = 512, 10_000, 256, 0.25
# of the iterative methods, at most
STEPS = 1000


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


def missed(w: Tensor, slack: Tensor) -> float:
    return float(torch.where(w > 0, slack.abs(), (-slack).clamp_min(0)).max())


def ista(z: Tensor, C: Tensor, tol: float) -> Tensor:
    """Proximal gradient, step 1/L, no momentum."""
    w, step = z.new_zeros(len(z), len(C)), 1 / (2 * torch.linalg.matrix_norm(C, 2).square())
    for i in range(STEPS):
        slack = L1 - 2 * (z - w @ C) @ C.T
        if i % 50 == 0 and missed(w, slack) <= tol:
            break
        w = (w - step * slack).relu()
    return w


def admm(z: Tensor, C: Tensor, tol: float, rho: float = 5.0) -> Tensor:
    """The solver of SpLiCE's authors, ρ and all, from zero, with its linear system in the smaller e × e form."""
    factor = torch.linalg.cholesky(C.T @ C + rho / 2 * torch.eye(E))
    v = u = z.new_zeros(len(z), len(C))
    linear = 2 * z @ C.T
    for i in range(1, STEPS + 1):
        b = linear + rho * (v - u)
        x = (b - torch.cholesky_solve((b @ C).T, factor).T @ C.T) / rho
        v = (x + u - L1 / rho).relu()
        u = u + x - v
        if i % 50 == 0 and missed(v, L1 - 2 * (z - v @ C) @ C.T) <= tol:
            break
    return v


@pytest.mark.benchmark(timer=time.process_time, group=f"non-negative lasso, B = {B}, n = {N}, e = {E}")
def test_clipsteer(benchmark):
    z, C = problem()
    found = benchmark.pedantic(nonnegative_lasso, (z, C, L1), rounds=3, warmup_rounds=1)
    benchmark.extra_info["l0"] = float(found.l0.double().mean())
    benchmark.extra_info["violation"] = violation(found.weights, z, C)
    assert bool(found.converged.all())


@pytest.mark.parametrize("solver", [ista, admm])
@pytest.mark.benchmark(timer=time.process_time, group=f"non-negative lasso, B = {B}, n = {N}, e = {E}")
def test_torch(benchmark, solver):
    z, C = problem()
    w = benchmark.pedantic(solver, (z, C, 1e-2), rounds=1)
    benchmark.extra_info["violation"] = violation(w, z, C)
    benchmark.extra_info["l0"] = float((w > 0).sum(1).double().mean())


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
