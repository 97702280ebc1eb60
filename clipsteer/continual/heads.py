"""Classifiers over features that grow with every task: a head per task, class means, ridge on a
random projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.continual.config import AlignConfig
from clipsteer.training.schedule import cosine_lr

__all__ = ["RandomProjection", "TaskHeads", "nearest_mean"]

RIDGES = tuple(10.0**e for e in range(-8, 9))


class TaskHeads(nn.Module):
    """One linear head per task; logits of several stand side by side.

    Args:
        cosine: logits are ``scale`` · cos(feature, weight), the heads of Wu et al. 2025 (arXiv
            2502.07560); False is W f + b, as in SLCA (Zhang et al. 2023, arXiv 2303.05118).
    """

    def __init__(self, width: int, *, cosine: bool = True, scale: float = 20.0) -> None:
        super().__init__()
        self.width, self.cosine, self.scale = width, cosine, scale
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()

    def add(self, classes: int, *, device: torch.device | str = "cpu") -> None:
        """A head of so many classes, from a normal distribution of deviation 0.02."""
        self.weights.append(
            nn.Parameter(torch.empty(classes, self.width).normal_(0, 0.02).to(device))
        )
        if not self.cosine:
            self.biases.append(nn.Parameter(torch.zeros(classes, device=device)))

    @property
    def sizes(self) -> list[int]:
        return [len(weight) for weight in self.weights]

    def of_task(self, task: int) -> list[nn.Parameter]:
        return [self.weights[task], *([] if self.cosine else [self.biases[task]])]

    def forward(self, features: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """(B, d) -> (B, classes of those tasks), of all tasks by default."""
        tasks = range(len(self.weights)) if tasks is None else tasks
        weight = torch.cat([self.weights[t] for t in tasks])
        if self.cosine:
            return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1))
        return F.linear(features, weight, torch.cat([self.biases[t] for t in tasks]))


def nearest_mean(features: Tensor, prototypes: Tensor) -> Tensor:
    """(B, d), (C, d) -> (B, C) cosines: the nearest-class-mean classifier on unit features."""
    return F.normalize(features, dim=-1) @ F.normalize(prototypes.to(features), dim=-1).T


class RandomProjection(nn.Module):
    """Ridge regression to one-hot classes on relu(features · R), from sums that are kept: nothing
    is forgotten.

    After McDonnell et al. 2023 (RanPAC, arXiv 2307.02251): with H = relu(F R), G = Σ HᵀH and Q = Σ
    HᵀY over all tasks, logits are H (G + λI)⁻¹ Q. λ is the one of 1e-8 … 1e8 with the least squared
    error on a fifth of the latest task's rows, from the sums without them. The paper's
    first-session adaptation of the tower is not done.

    Args:
        width: d; projections: M (about 40 M² bytes while a task is added); num_classes: C; seed: of
            R, standard normal.
    """

    def __init__(
        self, width: int, num_classes: int, *, projections: int = 10_000, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "R", torch.randn(width, projections, generator=generator), persistent=False
        )
        self.register_buffer("G", torch.zeros(projections, projections, dtype=torch.float64))
        self.register_buffer("Q", torch.zeros(projections, num_classes, dtype=torch.float64))
        self.register_buffer("W", torch.zeros(projections, num_classes))
        self.register_buffer("ridge", torch.zeros((), dtype=torch.float64))

    def _project(self, features: Tensor) -> Tensor:
        return torch.relu(features.to(self.R) @ self.R)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        """Add a task's rows (N, d) with labels (N,) in [0, C)."""
        H = self._project(features).double()
        Y = F.one_hot(labels, self.Q.shape[1]).to(H)
        order = torch.randperm(len(H), generator=generator).to(H.device)
        held = order[: len(H) // 5]
        kept = order[len(held) :]
        G, Q = self.G + H[kept].T @ H[kept], self.Q + H[kept].T @ Y[kept]
        if len(held):
            self.ridge.fill_(self._choose(G, Q, H[held], Y[held]))
        elif not self.ridge:
            self.ridge.fill_(1.0)
        self.G.copy_(G + H[held].T @ H[held])
        self.Q.copy_(Q + H[held].T @ Y[held])
        G = self.G.clone()
        G.diagonal().add_(self.ridge)
        self.W.copy_(torch.linalg.solve(G, self.Q))

    @staticmethod
    def _choose(G: Tensor, Q: Tensor, H: Tensor, Y: Tensor) -> float:
        # one eigendecomposition serves every λ
        values, vectors = torch.linalg.eigh(G)
        HV, VQ = H @ vectors, vectors.T @ Q
        errors = [
            float((HV @ (VQ / (values.clamp(min=0) + r).unsqueeze(1)) - Y).square().mean())
            for r in RIDGES
        ]
        return RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, C) scores."""
        return self._project(features) @ self.W


def shrunken_means(means: Tensor, task_of: Tensor) -> Tensor:
    """μ_c · (0.9 + 0.1 (t_c + 1)/(t + 1)): older classes (task_of (C,), from 0) are drawn nearer to
    the origin."""
    return means * (0.9 + 0.1 * (task_of + 1) / (task_of.max() + 1)).unsqueeze(1).to(means)


def sample_gaussians(
    means: Tensor, roots: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """(C, samples, d) draws from N(means (C, d), roots rootsᵀ), roots (C, d, d)."""
    C, d = means.shape
    noise = torch.randn(C, samples, d, generator=generator).to(means)
    return means.unsqueeze(1) + noise @ roots.mT


def normalized_logits(logits: Tensor, sizes: list[int], temperature: float) -> Tensor:
    """Logits over the mean over tasks of the norm of each task's logits, over the temperature
    (SLCA, equation 6)."""
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
    """Train every head on samples of N(μ_c (0.9 + 0.1 (t_c + 1)/(t + 1)), Σ_c + ridge·I) of every
    class seen.

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
