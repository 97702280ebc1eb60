"""Statistics of each class, and the precision factors that the covariance loss takes.

Means and covariances are streamed and merged in float64 (Chan, Golub & LeVeque 1983). Shrinkage as
Wu et al. 2025 (MACIL, arXiv 2502.07560): S + γ₁·mean(diag)·I + γ₂·mean(offdiag)·(1 − I), then +
1e-3·I; P = S⁻¹ + 1e-6·I = L Lᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind
from clipsteer.training.world import World

__all__ = ["ClassStatistics", "Compressed", "Factor", "compress", "precision_factor", "shrink"]

_KIND = Kind("clipsteer-class-statistics", 1, "class statistics")
# Jitter relative to the mean of the diagonal, by tens: from where rounding acts to what must not be
# hidden.
_JITTERS = (0.0, *(10.0**e for e in range(-14, -5)))


class ClassStatistics:
    """Counts, means and covariances of C classes of d-dimensional features, from batches in any
    order.

    Args:
        num_classes, d: sizes; the state takes 8·C·d² bytes.
        device: where it is kept and merged.

    Attributes:
        count: (C,) int64; mean: (C, d) float64, 0 for a class without rows; scatter: (C, d, d)
            float64, the sum of (x − mean)(x − mean)ᵀ.
    """

    def __init__(self, num_classes: int, d: int, *, device: torch.device | str = "cpu") -> None:
        if num_classes < 0 or d < 1:
            raise ValueError(
                f"ClassStatistics: expected num_classes >= 0 and d >= 1, got {num_classes} and {d}"
            )
        self.count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.mean = torch.zeros(num_classes, d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_classes, d, d, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> ClassStatistics:
        """Add features (B, d), floating point, of labels (B,) int64 in [0, C); rows labelled −1 are
        left out."""
        C, d = self.mean.shape
        if features.dim() != 2 or features.shape[1] != d or not features.is_floating_point():
            got = f"{tuple(features.shape)} of {features.dtype}"
            raise ValueError(
                f"ClassStatistics: features must be of shape (B, d = {d}) and floating point, got "
                f"{got}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"ClassStatistics: labels must be int64, got {labels.dtype}")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"ClassStatistics: labels must be of shape {tuple(features.shape[:1])}, got "
                f"{tuple(labels.shape)}"
            )
        seen = labels.unique().tolist()
        if seen and (seen[0] < -1 or seen[-1] >= C):
            raise ValueError(
                f"ClassStatistics: labels must be in [0, {C}), or -1, got {seen[0]} to {seen[-1]}"
            )
        for c in seen:
            if c >= 0:
                rows = features[labels == c].to(self.mean)
                mean = rows.mean(0)
                centred = rows - mean
                self._add(c, rows.shape[0], mean, centred.T @ centred)
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Add what ``other``, of the same sizes, has seen."""
        if other.mean.shape != self.mean.shape:
            sizes = f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}"
            raise ValueError(f"ClassStatistics: expected equal (C, d) to merge, got {sizes}")
        for c in other.count.nonzero().flatten().tolist():
            self._add(
                c, int(other.count[c]), other.mean[c].to(self.mean), other.scatter[c].to(self.mean)
            )
        return self

    def _add(self, c: int, count: int, mean: Tensor, scatter: Tensor) -> None:
        before = int(self.count[c])
        after = before + count
        step = mean - self.mean[c]
        self.mean[c] += step * (count / after)
        self.scatter[c] += scatter + torch.outer(step, step) * (before * (count / after))
        self.count[c] = after

    def all_reduce(self, world: World | None = None) -> ClassStatistics:
        """What all processes have seen together, in every process; these statistics stay as they
        are."""
        world = world or World(self.mean.device)
        joint = ClassStatistics(*self.mean.shape, device=self.mean.device)
        joint.count = world.sum_(self.count.clone())
        weight = self.count.double().unsqueeze(1)
        joint.mean = world.sum_(self.mean * weight) / joint.count.clamp(min=1).unsqueeze(1)
        step = self.mean - joint.mean
        joint.scatter = world.sum_(
            self.scatter + weight.unsqueeze(2) * step.unsqueeze(2) * step.unsqueeze(1)
        )
        return joint

    def covariance(self, classes: Tensor | slice = slice(None)) -> Tensor:
        """(C, d, d) unbiased covariances in float64, of ``classes`` if given; 0 for a class of
        fewer than 2 rows."""
        return self.scatter[classes] / (self.count[classes] - 1).clamp(min=1)[..., None, None]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name) for name in ("count", "mean", "scatter")}
        return write_kind(path, _KIND, tensors)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> ClassStatistics:
        """Read what ``save`` wrote. Raises FileNotFoundError, or FileFormatError for anything else
        that is there."""
        tensors = read_kind(path, _KIND, allow_nan=False).tensors
        mean = tensors.get("mean", torch.empty(0))
        C, d = mean.shape if mean.dim() == 2 else (0, 0)
        expected = {
            "count": (torch.int64, (C,)),
            "mean": (torch.float64, (C, d)),
            "scatter": (torch.float64, (C, d, d)),
        }
        if d == 0 or {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} != expected:
            raise FileFormatError(
                f"{path}: expected count (C,) int64, mean (C, d) and scatter (C, d, d) float64"
            )
        if bool((tensors["count"] < 0).any()):
            raise FileFormatError(f"{path}: holds a negative count")
        loaded = cls(0, 1)
        loaded.count, loaded.mean, loaded.scatter = (tensors[n].to(device) for n in expected)
        return loaded


def shrink(
    covariance: Tensor, gamma1: float = 10.0, gamma2: float = 10.0, ridge: float = 1e-3
) -> Tensor:
    """S + γ₁·mean(diag S)·I + γ₂·mean(offdiag S)·(1 − I) + ridge·I, of (…, d, d) covariances.

    With γ₁ ≥ γ₂ ≥ 0 a covariance stays positive definite. Source: Wu et al. 2025 (arXiv
    2502.07560).
    """
    d = _square("shrink", "covariance", covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    total = covariance.sum((-2, -1))
    off = (total - d * diagonal) / max(d * (d - 1), 1)
    eye = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    diagonal, off = (
        (gamma * t)[..., None, None] for gamma, t in ((gamma1, diagonal), (gamma2, off))
    )
    return covariance + (diagonal + ridge) * eye + off * (1 - eye)


class Factor(NamedTuple):
    """``L`` (…, d, d) with P = L Lᵀ; ``jitter`` (…,): what had to be added to the diagonal of S, 0
    where nothing."""

    L: Tensor
    jitter: Tensor


def precision_factor(covariance: Tensor, *, ridge: float = 1e-6) -> Factor:
    """A lower triangular L with L Lᵀ = P = S⁻¹ + ridge·I, in float64.

    Args:
        covariance: S (…, d, d), symmetric; usually shrunk.
        ridge: added to the precision.

    A matrix whose Cholesky factorisation fails is tried again with 1e-14, 1e-13, … 1e-6 times its
    mean diagonal added; ``jitter`` says what was. Only rounding is mended so: a matrix that is
    truly indefinite, or singular beyond that, raises.

    Raises:
        ValueError: not square, not finite, or not positive definite even then, with the numbers of
            the classes.
    """
    d = _square("precision_factor", "covariance", covariance)
    S = covariance.double()
    S = (S + S.mT) / 2
    if not bool(S.isfinite().all()):
        raise ValueError("precision_factor: covariance must be finite, got NaN or infinity")
    flat = S.reshape(-1, d, d)
    mean = flat.diagonal(dim1=1, dim2=2).mean(1).abs()
    eye = torch.eye(d, dtype=S.dtype, device=S.device)
    lower, jitter = torch.empty_like(flat), torch.zeros_like(mean)
    left = torch.arange(len(flat), device=S.device)
    for relative in _JITTERS:
        jitter[left] = relative * mean[left]
        found, info = torch.linalg.cholesky_ex(flat[left] + jitter[left][:, None, None] * eye)
        good = info == 0
        lower[left[good]] = found[good]
        left = left[~good]
        if not len(left):
            break
    else:
        smallest = float(torch.linalg.eigvalsh(flat[left[0]])[0])
        raise ValueError(
            f"precision_factor: covariance must be positive definite, matrices {left.tolist()} are "
            f"not, even with "
            f"{_JITTERS[-1]:g} of their mean diagonal added (the first one's smallest eigenvalue "
            f"is {smallest:.3g}); "
            "shrink them first"
        )
    # P = A⁻ᵀA⁻¹ + ridge·I with S = A Aᵀ is at least ridge·I and needs no jitter of its own
    P = torch.cholesky_inverse(lower) + ridge * eye
    return Factor(torch.linalg.cholesky(P).reshape(S.shape), jitter.reshape(S.shape[:-2]))


class Compressed(NamedTuple):
    """P ≈ P̂ = diag + U diag(s) Uᵀ: U (C, d, r), s (C, r), of either sign, diag (C, d), in the
    order of ``ops.LowRankDiag``; ``error`` (C,) = ‖P − P̂‖₂/‖P‖₂."""

    U: Tensor
    s: Tensor
    diag: Tensor
    error: Tensor


def compress(precision: Tensor, rank: int, *, sweeps: int = 3) -> Compressed:
    """The low-rank + diagonal form of precisions (C, d, d), symmetric and positive semidefinite, in
    float64.

    The r largest eigenvalues, in size, of what the diagonal leaves, and the diagonal of what they
    leave, in turn: in each of ``sweeps`` the Frobenius error falls. Then the diagonal is raised, if
    need be, until P̂ is positive semidefinite, as distances under it must be. For every x, |xᵀ(P −
    P̂)x| ≤ error·‖P‖₂·‖x‖².
    """
    d = _square("compress", "precision", precision)
    if precision.dim() != 3 or not 0 <= rank <= d or sweeps < 1:
        got = f"{tuple(precision.shape)}, rank {rank}, sweeps {sweeps}"
        raise ValueError(
            f"compress: expected precision (C, d, d), 0 <= rank <= d and sweeps >= 1, got {got}"
        )
    P = precision.double()
    spectrum = torch.linalg.eigvalsh(P)
    # most eigenvalues of a shrunk class are alike: what is left of the others is of low rank
    diag = spectrum.median(-1).values.unsqueeze(1).expand(P.shape[:2])
    for _ in range(sweeps):
        values, vectors = torch.linalg.eigh(P - torch.diag_embed(diag))
        largest = values.abs().topk(rank, dim=-1).indices
        s = values.gather(-1, largest)
        U = vectors.gather(-1, largest.unsqueeze(1).expand(-1, d, -1))
        low_rank = U * s.unsqueeze(1) @ U.mT
        diag = (P - low_rank).diagonal(dim1=1, dim2=2)
    lowest = torch.linalg.eigvalsh(low_rank + torch.diag_embed(diag))[:, :1]
    # an eigenvalue is known to d·eps of the largest
    margin = d * torch.finfo(P.dtype).eps * spectrum[:, -1:].abs()
    diag = diag + torch.where(lowest < margin, margin - lowest, 0.0)
    left = torch.linalg.eigvalsh(P - low_rank - torch.diag_embed(diag)).abs().amax(-1)
    size = spectrum.abs().amax(-1)
    return Compressed(U, s, diag, torch.where(size > 0, left / size, left))


def _square(op: str, name: str, matrix: Tensor) -> int:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must be of shape (..., d, d), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {matrix.dtype}")
    return matrix.shape[-1]


def _places(labels: Sequence[int], classes: list[int], device: torch.device) -> Tensor:
    """(N,) int64: where each label stands among the classes."""
    place = {c: i for i, c in enumerate(classes)}
    return torch.tensor([place[c] for c in labels], device=device)


def class_means(features: Tensor, labels: Sequence[int], classes: list[int]) -> Tensor:
    """(C, d) means in float64, in the order of ``classes``."""
    local = _places(labels, classes, features.device)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64, device=features.device)
    sums.index_add_(0, local, features.double())
    return sums / torch.bincount(local, minlength=len(classes)).unsqueeze(1)


def by_class(features: Tensor, labels: Sequence[int], classes: list[int]) -> ClassStatistics:
    """Statistics in the order of ``classes``."""
    local = _places(labels, classes, features.device)
    return ClassStatistics(len(classes), features.shape[1], device=features.device).update(
        features, local
    )
