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

from clipsteer.io.doors import door
from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind
from clipsteer.training.world import World

__all__ = ["ClassStatistics", "Compressed", "Factor", "compress", "precision_factor", "shrink"]

_KIND = Kind("clipsteer-class-statistics", 1, "class statistics")
# A smallest eigenvalue below so many d·eps of the largest is rounding, as LAPACK's testers count.
_ROUNDING = 20


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
    def update(
        self,
        features: Tensor,  # (B, d)
        labels: Tensor,  # (B,)
    ) -> ClassStatistics:
        """Add features, floating point, of int64 labels in [0, C); rows labelled −1 are left out.

        Raises ValueError or TypeError for other shapes, dtypes or labels.
        """
        for c in self._labels_of(features, labels):
            rows = features[labels == c].to(self.mean)
            mean = rows.mean(0)
            centred = rows - mean
            self._add(c, len(rows), mean, centred.T @ centred)
        return self

    def _labels_of(self, features: Tensor, labels: Tensor) -> list[int]:
        """The classes that occur, once the arguments of ``update`` are in order."""
        C, d = self.mean.shape
        if features.dim() != 2 or features.shape[1] != d or not features.is_floating_point():
            got = f"{tuple(features.shape)} of {features.dtype}"
            raise ValueError(
                f"ClassStatistics: features must be of shape (B, d = {d}) and floating point, "
                f"got {got}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"ClassStatistics: labels must be int64, got {labels.dtype}")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"ClassStatistics: labels must be of shape {tuple(features.shape[:1])}, "
                f"got {tuple(labels.shape)}"
            )
        seen = labels.unique().tolist()
        if seen and (seen[0] < -1 or seen[-1] >= C):
            raise ValueError(
                f"ClassStatistics: labels must be in [0, {C}), or -1, got {seen[0]} to {seen[-1]}"
            )
        return [c for c in seen if c >= 0]

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Add what ``other``, of the same sizes, has seen."""
        if other.mean.shape != self.mean.shape:
            sizes = f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}"
            raise ValueError(f"ClassStatistics: expected equal (C, d) to merge, got {sizes}")
        for c in other.count.nonzero().flatten().tolist():
            mean = other.mean[c].to(self.mean)
            scatter = other.scatter[c].to(self.mean)
            self._add(c, int(other.count[c]), mean, scatter)
        return self

    def _add(
        self,
        c: int,
        count: int,
        mean: Tensor,  # (d,)
        scatter: Tensor,  # (d, d)
    ) -> None:
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
        weight = self.count.double().unsqueeze(1)  # (C, 1)
        joint.mean = world.sum_(self.mean * weight) / joint.count.clamp(min=1).unsqueeze(1)
        # about the joint mean: each scatter grows by count · step stepᵀ
        step = self.mean - joint.mean
        outer = weight.unsqueeze(2) * step.unsqueeze(2) * step.unsqueeze(1)
        joint.scatter = world.sum_(self.scatter + outer)
        return joint

    def covariance(self, classes: Tensor | slice = slice(None)) -> Tensor:
        """(C, d, d) unbiased covariances in float64, of ``classes`` if given; 0 for a class of
        fewer than 2 rows."""
        degrees = (self.count[classes] - 1).clamp(min=1)
        return self.scatter[classes] / degrees[..., None, None]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        tensors = {name: getattr(self, name) for name in ("count", "mean", "scatter")}
        return write_kind(path, _KIND, tensors)

    @classmethod
    @door
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> ClassStatistics:
        """Read what ``save`` wrote.

        Raises FileNotFoundError, or FileFormatError for anything else that is there.
        """
        tensors = read_kind(path, _KIND, allow_nan=False).tensors
        mean = tensors.get("mean", torch.empty(0))
        C, d = mean.shape if mean.dim() == 2 else (0, 0)
        expected = {
            "count": (torch.int64, (C,)),
            "mean": (torch.float64, (C, d)),
            "scatter": (torch.float64, (C, d, d)),
        }
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if d == 0 or found != expected:
            raise FileFormatError(
                f"{path}: expected count (C,) int64, mean (C, d) and scatter (C, d, d) float64"
            )
        if bool((tensors["count"] < 0).any()):
            raise FileFormatError(f"{path}: holds a negative count")
        loaded = cls(0, 1)
        loaded.count = tensors["count"].to(device)
        loaded.mean = tensors["mean"].to(device)
        loaded.scatter = tensors["scatter"].to(device)
        return loaded


def shrink(
    covariance: Tensor,  # (…, d, d)
    gamma1: float = 10.0,
    gamma2: float = 10.0,
    ridge: float = 1e-3,
) -> Tensor:  # (…, d, d)
    """S + γ₁·mean(diag S)·I + γ₂·mean(offdiag S)·(1 − I) + ridge·I.

    With γ₁ ≥ γ₂ ≥ 0 a covariance stays positive definite. Raises ValueError or TypeError unless
    square and floating point. Source: Wu et al. 2025 (arXiv 2502.07560).
    """
    d = _square("shrink", "covariance", covariance)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)  # (…,)
    total = covariance.sum((-2, -1))
    off = (total - d * diagonal) / max(d * (d - 1), 1)
    eye = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    added = (gamma1 * diagonal)[..., None, None] + ridge
    off = (gamma2 * off)[..., None, None]
    return covariance + added * eye + off * (1 - eye)


class Factor(NamedTuple):
    """A factor of precisions P = L Lᵀ."""

    L: Tensor
    """(…, d, d), contiguous"""
    jitter: Tensor
    """(…,): 0, as a singular S raises"""


def precision_factor(
    covariance: Tensor,  # (…, d, d)
    *,
    ridge: float = 1e-6,
) -> Factor:
    """A lower triangular L with L Lᵀ = P = S⁻¹ + ridge·I, in float64.

    Args:
        covariance: S (…, d, d), symmetric; usually shrunk, as the covariance of N ≤ d rows is
            singular.
        ridge: added to the precision.

    Raises:
        ValueError: not square, not finite, or not positive definite beyond rounding, with the
            numbers of the classes. That is where the Cholesky factorisation fails, or a feature's
            variance inflation S_ii (S⁻¹)_ii, which is 1/(1 − R²) of its regression on the others,
            is 1/(20·d·eps) or more: no digit of S⁻¹ would be right.
    """
    d = _square("precision_factor", "covariance", covariance)
    S = covariance.double()
    S = (S + S.mT) / 2
    if not bool(S.isfinite().all()):
        raise ValueError("precision_factor: covariance must be finite, got NaN or infinity")
    flat = S.reshape(-1, d, d)
    lower, info = torch.linalg.cholesky_ex(flat)
    eye = torch.eye(d, dtype=S.dtype, device=S.device)
    lower[info != 0] = eye  # which has an inverse
    inverse = torch.cholesky_inverse(lower)
    inflation = flat.diagonal(dim1=1, dim2=2) * inverse.diagonal(dim1=1, dim2=2)  # (n, d)
    most = 1 / (_ROUNDING * d * torch.finfo(S.dtype).eps)
    singular = (info != 0) | ~(inflation < most).all(1)
    if bool(singular.any()):
        classes = singular.nonzero().flatten().tolist()
        spectrum = torch.linalg.eigvalsh(flat[classes[0]])
        raise ValueError(
            f"precision_factor: covariance must be positive definite, matrices {classes} are not, "
            f"beyond rounding (the first one's eigenvalues go from {float(spectrum[0]):.3g} to "
            f"{float(spectrum[-1]):.3g}); shrink them first"
        )
    # P = A⁻ᵀA⁻¹ + ridge·I with S = A Aᵀ is at least ridge·I. LAPACK's factors lie by columns, which
    # every call of an op on them would put right anew
    L = torch.linalg.cholesky(inverse + ridge * eye).contiguous()
    return Factor(L.reshape(S.shape), torch.zeros(S.shape[:-2], dtype=S.dtype, device=S.device))


class Compressed(NamedTuple):
    """P ≈ P̂ = diag + U diag(s) Uᵀ, in the order of ``ops.LowRankDiag``."""

    U: Tensor
    """(C, d, r)"""
    s: Tensor
    """(C, r), of either sign"""
    diag: Tensor
    """(C, d)"""
    error: Tensor
    """(C,): ‖P − P̂‖₂/‖P‖₂"""


def compress(
    precision: Tensor,  # (C, d, d)
    rank: int,
    *,
    sweeps: int = 3,
) -> Compressed:
    """The low-rank + diagonal form of precisions, symmetric and positive semidefinite, in float64.

    The r largest eigenvalues, in size, of what the diagonal leaves, and the diagonal of what they
    leave, in turn: in each of ``sweeps`` the Frobenius error falls. Then the diagonal is raised, if
    need be, until P̂ is positive semidefinite, as distances under it must be. For every x, |xᵀ(P −
    P̂)x| ≤ error·‖P‖₂·‖x‖².

    Raises ValueError for another shape, rank or number of sweeps.
    """
    d = _square("compress", "precision", precision)
    if precision.dim() != 3 or not 0 <= rank <= d or sweeps < 1:
        got = f"{tuple(precision.shape)}, rank {rank}, sweeps {sweeps}"
        raise ValueError(
            f"compress: expected precision (C, d, d), 0 <= rank <= d and sweeps >= 1, got {got}"
        )
    P = precision.double()
    spectrum = torch.linalg.eigvalsh(P)  # (C, d), ascending
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
    error = torch.where(size > 0, left / size, left)
    return Compressed(U, s, diag, error)


def _square(op: str, name: str, matrix: Tensor) -> int:
    """d of a floating-point (…, d, d) tensor."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must be of shape (..., d, d), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {matrix.dtype}")
    return matrix.shape[-1]


def class_means(
    features: Tensor,  # (N, d)
    labels: Sequence[int],
    classes: Sequence[int],
) -> Tensor:  # (C, d)
    """Means in float64, in the order of ``classes``."""
    rows = places(labels, classes, features.device)
    C = len(classes)
    sums = torch.zeros(C, features.shape[1], dtype=torch.float64, device=features.device)
    sums.index_add_(0, rows, features.double())
    return sums / torch.bincount(rows, minlength=C).unsqueeze(1)


def by_class(
    features: Tensor,  # (N, d)
    labels: Sequence[int],
    classes: Sequence[int],
) -> ClassStatistics:
    """Statistics in the order of ``classes``."""
    rows = places(labels, classes, features.device)
    statistics = ClassStatistics(len(classes), features.shape[1], device=features.device)
    return statistics.update(features, rows)


def places(labels: Sequence[int], classes: Sequence[int], device: torch.device) -> Tensor:
    """(N,) int64: where each label stands among the classes."""
    place = {c: i for i, c in enumerate(classes)}
    return torch.tensor([place[label] for label in labels], device=device)
