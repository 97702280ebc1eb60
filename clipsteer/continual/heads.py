"""Classifiers over features that grow with every task: a head per task, class means, ridge on a
random projection."""

from __future__ import annotations

import math
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
        self.width = width
        self.cosine = cosine
        self.scale = scale
        self.weights = nn.ParameterList()  # (C_t, d) of each task
        self.biases = nn.ParameterList()  # (C_t,) of each task; none for cosines

    def add(self, classes: int, *, device: torch.device | str = "cpu") -> None:
        """A head of so many classes, from a normal distribution of deviation 0.02."""
        weight = torch.empty(classes, self.width).normal_(0, 0.02)
        self.weights.append(nn.Parameter(weight.to(device)))
        if not self.cosine:
            self.biases.append(nn.Parameter(torch.zeros(classes, device=device)))

    @property
    def sizes(self) -> list[int]:
        """How many classes each task has."""
        return [len(weight) for weight in self.weights]

    def of_task(self, task: int) -> list[nn.Parameter]:
        """The parameters of one task's head."""
        if self.cosine:
            return [self.weights[task]]
        return [self.weights[task], self.biases[task]]

    def forward(
        self,
        features: Tensor,  # (B, d)
        tasks: Sequence[int] | None = None,
    ) -> Tensor:  # (B, classes of those tasks)
        """Logits of the classes of some tasks, of all by default."""
        tasks = range(len(self.weights)) if tasks is None else tasks
        weight = torch.cat([self.weights[t] for t in tasks])
        if self.cosine:
            unit = F.normalize(features, dim=-1)
            return self.scale * F.linear(unit, F.normalize(weight, dim=-1))
        bias = torch.cat([self.biases[t] for t in tasks])
        return F.linear(features, weight, bias)


def nearest_mean(
    features: Tensor,  # (B, d)
    prototypes: Tensor,  # (C, d)
) -> Tensor:  # (B, C)
    """Cosines: the nearest-class-mean classifier on unit features."""
    means = F.normalize(prototypes.to(features), dim=-1)
    return F.normalize(features, dim=-1) @ means.T


class RandomProjection(nn.Module):
    """Ridge regression to one-hot classes on relu(features · R), from sums that are kept: nothing
    is forgotten.

    After McDonnell et al. 2023 (RanPAC, arXiv 2307.02251): with H = relu(F R), G = Σ HᵀH and
    Q = Σ HᵀY over all tasks, logits are H (G + λI)⁻¹ Q. λ is the one of 1e-8 … 1e8 with the least
    squared error on a fifth of the latest task's rows, from the sums without them. The paper's
    first-session adaptation of the tower is not done.

    Args:
        width: d.
        num_classes: C.
        projections: M; about 40 M² bytes are taken while a task is added.
        seed: of R, standard normal.
    """

    R: Tensor  # (d, M)
    G: Tensor  # (M, M) float64
    Q: Tensor  # (M, C) float64
    W: Tensor  # (M, C)
    ridge: Tensor  # () float64, the λ in use; 0 before the first task

    def __init__(
        self, width: int, num_classes: int, *, projections: int = 10_000, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        R = torch.randn(width, projections, generator=generator)
        G = torch.zeros(projections, projections, dtype=torch.float64)
        Q = torch.zeros(projections, num_classes, dtype=torch.float64)
        self.register_buffer("R", R, persistent=False)
        self.register_buffer("G", G)
        self.register_buffer("Q", Q)
        self.register_buffer("W", torch.zeros(projections, num_classes))
        self.register_buffer("ridge", torch.zeros((), dtype=torch.float64))

    def _project(
        self,
        features: Tensor,  # (B, d)
    ) -> Tensor:  # (B, M)
        return torch.relu(features.to(self.R) @ self.R)

    @torch.no_grad()
    def update(
        self,
        features: Tensor,  # (N, d)
        labels: Tensor,  # (N,)
        generator: torch.Generator,
    ) -> None:
        """Add a task's rows, with labels in [0, C); the generator picks those that λ is chosen
        on."""
        H = self._project(features).double()
        Y = F.one_hot(labels, self.Q.shape[1]).to(H)
        order = torch.randperm(len(H), generator=generator).to(H.device)
        held = order[: len(H) // 5]
        kept = order[len(held) :]
        G = self.G + H[kept].T @ H[kept]
        Q = self.Q + H[kept].T @ Y[kept]
        if len(held):
            self.ridge.fill_(_best_ridge(G, Q, H[held], Y[held]))
        elif not self.ridge:
            self.ridge.fill_(1.0)
        self.G.copy_(G + H[held].T @ H[held])
        self.Q.copy_(Q + H[held].T @ Y[held])
        ridged = self.G.clone()
        ridged.diagonal().add_(self.ridge)
        self.W.copy_(torch.linalg.solve(ridged, self.Q))

    def forward(
        self,
        features: Tensor,  # (B, d)
    ) -> Tensor:  # (B, C)
        """Scores of every class."""
        return self._project(features) @ self.W


def _best_ridge(
    G: Tensor,  # (M, M)
    Q: Tensor,  # (M, C)
    H: Tensor,  # (n, M), rows that G and Q lack
    Y: Tensor,  # (n, C)
) -> float:
    """The λ of the least squared error ‖H (G + λI)⁻¹ Q − Y‖²."""
    # one eigendecomposition serves every λ
    values, vectors = torch.linalg.eigh(G)
    values = values.clamp(min=0)
    HV = H @ vectors
    VQ = vectors.T @ Q
    errors = {}
    for ridge in RIDGES:
        scores = HV @ (VQ / (values + ridge).unsqueeze(1))
        errors[ridge] = float((scores - Y).square().mean())
    return min(errors, key=errors.__getitem__)


def shrunken_means(
    means: Tensor,  # (C, d)
    task_of: Tensor,  # (C,), from 0
) -> Tensor:  # (C, d)
    """μ_c · (0.9 + 0.1 (t_c + 1)/(t + 1)): older classes are drawn nearer to the origin."""
    share = (task_of + 1) / (task_of.max() + 1)
    return means * (0.9 + 0.1 * share).unsqueeze(1).to(means)


def sample_gaussians(
    means: Tensor,  # (C, d)
    roots: Tensor,  # (C, d, d)
    samples: int,
    generator: torch.Generator,
) -> Tensor:  # (C, samples, d)
    """Draws from N(means, roots rootsᵀ); the generator is a CPU one."""
    C, d = means.shape
    noise = torch.randn(C, samples, d, generator=generator).to(means)
    return means.unsqueeze(1) + noise @ roots.mT


def normalized_logits(
    logits: Tensor,  # (B, C)
    sizes: Sequence[int],
    temperature: float,
) -> Tensor:  # (B, C)
    """Logits over the mean over tasks of the norm of each task's logits, over the temperature
    (SLCA, equation 6)."""
    parts = logits.split(list(sizes), dim=-1)
    norms = torch.stack([part.norm(dim=-1) + 1e-7 for part in parts], -1)  # (B, tasks)
    return logits / norms.mean(-1, keepdim=True) / temperature


def _roots(
    covariances: Tensor,  # (C, d, d)
    ridge: float,
) -> Tensor:  # (C, d, d) float32
    """Lower triangular L with L Lᵀ = Σ_c + ridge·I."""
    roots = torch.empty(covariances.shape, device=covariances.device)
    # one at a time: in float64 all of them would take gigabytes
    for c, covariance in enumerate(covariances):
        S = covariance.to(torch.float64, copy=True)
        S.diagonal().add_(ridge)
        root, info = torch.linalg.cholesky_ex(S)
        if int(info):
            raise ValueError(f"align: the covariance of class {c} is not positive definite")
        roots[c] = root
    return roots


def align(
    heads: TaskHeads,
    means: Tensor,  # (C, d)
    covariances: Tensor,  # (C, d, d)
    task_of: Tensor,  # (C,)
    config: AlignConfig,
    generator: torch.Generator,
) -> float:
    """Train every head on samples of N(μ_c (0.9 + 0.1 (t_c + 1)/(t + 1)), Σ_c + ridge·I) of every
    class seen.

    Args:
        means, covariances, task_of: in the order of the heads' logits.
        generator: of the samples and their order, on the CPU.

    Returns the mean loss of the last epoch.

    Raises:
        ValueError: a covariance plus ridge is not positive definite.
        RuntimeError: the loss is not finite.
    """
    C = len(means)
    roots = _roots(covariances, config.ridge)
    means = shrunken_means(means, task_of).float()
    labels = torch.arange(C, device=means.device).repeat_interleave(config.samples)
    optimizer = torch.optim.SGD(
        heads.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
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
        if not math.isfinite(loss):
            raise RuntimeError(f"align: the loss is {loss} in epoch {epoch + 1}; lower align_lr")
    return loss
