"""Classifier alignment: heads trained anew on Gaussian samples of every class seen.

Sources: Zhang et al. 2023 (SLCA, arXiv 2303.05118, section 3.3 and equation 6); Wu et al. 2025 (arXiv 2502.07560).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer._training import cosine_lr
from clipsteer.continual.heads import TaskHeads

__all__ = ["AlignConfig", "align", "normalized_logits", "sample_gaussians"]


@dataclass(frozen=True)
class AlignConfig:
    """Settings of alignment; the published ones by default.

    Attributes:
        samples: of each class in each epoch, and rows of a step.
        ridge: added to each covariance; temperature: that logits of unit norm are divided by.
    """

    samples: int = 256
    epochs: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ridge: float = 1e-3
    temperature: float = 0.1


def shrunken_means(means: Tensor, task_of: Tensor) -> Tensor:
    """μ_c · (0.9 + 0.1 (t_c + 1)/(t + 1)): older classes (task_of (C,), from 0) are drawn nearer to the origin."""
    return means * (0.9 + 0.1 * (task_of + 1) / (task_of.max() + 1)).unsqueeze(1).to(means)


def sample_gaussians(means: Tensor, roots: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """(C, samples, d) draws from N(means (C, d), roots rootsᵀ), roots (C, d, d)."""
    C, d = means.shape
    noise = torch.randn(C, samples, d, generator=generator).to(means)
    return means.unsqueeze(1) + noise @ roots.mT


def normalized_logits(logits: Tensor, sizes: list[int], temperature: float) -> Tensor:
    """Logits over the mean over tasks of the norm of each task's logits, over the temperature (SLCA, equation 6)."""
    norms = torch.stack([part.norm(dim=-1) + 1e-7 for part in logits.split(sizes, dim=-1)], -1)
    return logits / norms.mean(-1, keepdim=True) / temperature


def align(
    heads: TaskHeads,
    means: Tensor,
    covariances: Tensor,
    task_of: Tensor,
    config: AlignConfig,
    generator: torch.Generator,
) -> float:
    """Train every head on samples of N(μ_c (0.9 + 0.1 (t_c + 1)/(t + 1)), Σ_c + ridge·I) of every class seen.

    Args:
        means (C, d), covariances (C, d, d), task_of (C,): in the order of the heads' logits.
        generator: of the samples and their order, on the CPU.

    Returns the mean loss of the last epoch.

    Raises:
        ValueError: a covariance plus ridge is not positive definite.
    """
    C, d = means.shape
    roots = torch.empty(C, d, d, device=means.device)
    for c in range(C):  # one at a time: in float64 all of them would take gigabytes
        S = covariances[c].double()
        S.diagonal().add_(config.ridge)
        root, info = torch.linalg.cholesky_ex(S)
        if int(info):
            raise ValueError(f"align: the covariance of class {c} is not positive definite")
        roots[c] = root
    means = shrunken_means(means, task_of).float()
    labels = torch.arange(C, device=means.device).repeat_interleave(config.samples)
    optimizer = torch.optim.SGD(
        heads.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    loss = 0.0
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(epoch, config.epochs, config.lr, 0)
        rows = sample_gaussians(means, roots, config.samples, generator).flatten(0, 1)
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        total = 0.0
        for picked in order.split(config.samples):
            logits = normalized_logits(heads(rows[picked]), heads.sizes, config.temperature)
            step = F.cross_entropy(logits, labels[picked])
            optimizer.zero_grad(set_to_none=True)
            step.backward()
            optimizer.step()
            total += step.item()
        loss = total / C
    return loss
