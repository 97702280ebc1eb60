"""Heads, alignment and random projections against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipsteer.continual.heads import (
    RIDGES,
    AlignConfig,
    RandomProjection,
    TaskHeads,
    align,
    nearest_mean,
    normalized_logits,
    sample_gaussians,
    shrunken_means,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heads(sizes=(3, 2), width=8, cosine=True) -> TaskHeads:
    made = TaskHeads(width, cosine=cosine)
    for size in sizes:
        made.add(size)
    return made


def test_heads_stand_side_by_side():
    x = torch.randn(5, 8, generator=generator())
    cosine, linear = heads(), heads(cosine=False)
    assert cosine.sizes == linear.sizes == [3, 2]
    weight = torch.cat(list(cosine.weights))
    expected = 20 * torch.stack([F.cosine_similarity(x, row, dim=1) for row in weight], 1)
    torch.testing.assert_close(cosine(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cosine(x, [1]), cosine(x)[:, 3:])
    with torch.no_grad():
        linear.biases[1].fill_(2.0)
    expected = torch.cat([x @ linear.weights[0].T, x @ linear.weights[1].T + 2], 1)
    torch.testing.assert_close(linear(x), expected)
    assert [len(p) for p in linear.of_task(1)] == [2, 2]
    assert len(cosine.of_task(0)) == 1


def test_logits_are_normalised_by_the_mean_norm_over_tasks():
    logits = torch.tensor([[3.0, 4.0, 0.0, 1.0]])  # norms 5 and 1
    torch.testing.assert_close(normalized_logits(logits, [2, 2], 0.1), logits / 3 / 0.1)


def test_older_means_shrink():
    means, of = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 3])
    expected = torch.tensor([0.9 + 0.1 * 1 / 4, 0.9 + 0.1 * 2 / 4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shrunken_means(means, of)[:, 0], expected)


def test_samples_have_the_mean_and_covariance_asked_for():
    roots = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator())
    means = torch.randn(2, 4, dtype=torch.float64, generator=generator(1))
    drawn = sample_gaussians(means, roots, 100_000, generator(2))
    for c in range(2):
        S = roots[c] @ roots[c].T
        assert float((drawn[c].mean(0) - means[c]).abs().max()) < 4 * float(S.diagonal().max() / 100_000) ** 0.5
        assert float((torch.cov(drawn[c].T) - S).norm() / S.norm()) < 0.02


@pytest.mark.parametrize("cosine", [True, False])
def test_alignment_tells_gaussian_classes_apart(cosine):
    means = 3 * torch.randn(5, 8, dtype=torch.float64, generator=generator())
    S = torch.eye(8).expand(5, 8, 8) * 0.1
    torch.manual_seed(0)
    made, of = heads(cosine=cosine), torch.tensor([0, 0, 0, 1, 1])
    with torch.no_grad():  # of the size that training gives them
        for weight in made.weights:
            weight.mul_(20)
    rows = sample_gaussians(means, S.double().sqrt(), 50, generator(1)).float()
    right = lambda: float((made(rows.flatten(0, 1)).argmax(1) == torch.arange(5).repeat_interleave(50)).float().mean())
    before = right()
    loss = align(made, means, S, of, AlignConfig(samples=64, epochs=20), generator(3))
    assert loss < 1.0
    assert right() > max(0.95, before)


def test_alignment_refuses_covariances_that_are_none():
    S = torch.eye(8).repeat(5, 1, 1)
    S[2, 0, 0] = -1.0
    with pytest.raises(ValueError, match="class 2"):
        align(heads(), torch.zeros(5, 8), S, torch.tensor([0, 0, 0, 1, 1]), AlignConfig(), generator())


def test_random_projection_is_ridge_regression_on_all_tasks_together():
    x = torch.randn(120, 6, generator=generator())
    labels = torch.randint(0, 4, (120,), generator=generator(1))
    made = RandomProjection(6, 4, projections=32, seed=3)
    for rows in (slice(0, 70), slice(70, 120)):
        made.update(x[rows], labels[rows], generator(4))
    H = torch.relu(x @ made.R).double()
    assert float(made.ridge) in RIDGES
    W = torch.linalg.solve(H.T @ H + made.ridge * torch.eye(32), H.T @ F.one_hot(labels, 4).double())
    torch.testing.assert_close(made(x).double(), H @ W, rtol=1e-4, atol=1e-4)


def test_the_ridge_is_the_one_with_the_least_error_on_rows_left_out():
    """Labels that are noise want the largest λ, labels that are a function of the projection a small one."""
    x = torch.randn(1000, 6, generator=generator())
    noise, clean = RandomProjection(6, 2, projections=64), RandomProjection(6, 2, projections=64)
    noise.update(x, torch.randint(0, 2, (1000,), generator=generator(1)), generator())
    clean.update(x, (x[:, 0] > 0).long(), generator())
    assert float(clean.ridge) < float(noise.ridge)


def test_nearest_mean_goes_by_the_angle():
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    assert nearest_mean(torch.tensor([[3.0, 2.9], [0.1, 0.2]]), prototypes).argmax(1).tolist() == [0, 1]
