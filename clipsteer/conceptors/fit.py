"""From activations to correlation matrices, and the choice of an aperture.

    R = Σ (x - μ)(x - μ)ᵀ / N,   C = R (R + α⁻² I)⁻¹,   eigenvalues λ/(λ + α⁻²)

Sources: Jaeger 2014 (arXiv 1403.3369), conceptors and the choice of an aperture by the gradient of
‖φ(C, γ)‖²; Postmus & Abreu 2024 (arXiv 2410.16314), mean-centring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.ops._check import what_came
from clipsteer.training.world import World

EPS = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny
# rows widened to float64 at a time
_ROWS = 16384


def _batches(x: Any, labels: Tensor | None, wanted: bool) -> Iterable[tuple[Any, Any]]:
    """Batches of rows, with their labels where these are ``wanted``."""
    if isinstance(x, Tensor):
        yield x, labels
        return
    if labels is not None:
        raise ValueError(
            "correlation: labels go with a tensor; an iterable yields (x, labels) pairs"
        )
    expected = "tensors, as classes is not given"
    if wanted:
        expected = "(x, labels) pairs, as classes is given"
    for batch in x:
        pair = tuple(batch) if isinstance(batch, tuple | list) else (batch, None)
        if len(pair) != 2 or (pair[1] is None) == wanted:
            raise ValueError(
                f"correlation: the iterable must yield {expected}, got {type(batch).__name__}"
            )
        yield pair


def _rows(x: Any, d: int | None) -> Tensor:
    """(N, d) of x (…, d)."""
    is_rows = isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2
    if not is_rows or (d is not None and x.shape[-1] != d):
        raise ValueError(
            f"correlation: x must be a floating tensor of shape (…, {d or 'd'}), got {what_came(x)}"
        )
    return x.detach().flatten(0, -2)


def _row_labels(labels: Any, shape: torch.Size, classes: int) -> Tensor:
    """(N,) of labels (…), the leading shape of x."""
    is_int = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not is_int or labels.shape != shape:
        raise ValueError(
            f"correlation: labels must be int64 of shape {tuple(shape)}, got {what_came(labels)}"
        )
    labels = labels.flatten()
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"correlation: labels must be in [-1, {classes}), got {labels.unique().tolist()[:8]}"
        )
    return labels


class _Sums:
    """Σ (x - mean)(x - mean)ᵀ and the number of rows, of each of K classes."""

    def __init__(self, classes: int, d: int, mean: Tensor | None, device: torch.device) -> None:
        self.total = torch.zeros(classes, d, d, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self.shift = torch.zeros(d, dtype=torch.float64, device=device)
        if mean is not None:
            if not isinstance(mean, Tensor) or mean.shape != (d,):
                raise ValueError(
                    f"correlation: mean must be a tensor of shape ({d},), got {what_came(mean)}"
                )
            self.shift = mean.detach().to(self.shift)

    def add(
        self,
        x: Tensor,  # (N, d)
        labels: Tensor | None,  # (N,)
    ) -> None:
        """Count rows in."""
        for at in range(0, len(x), _ROWS):
            part = x[at : at + _ROWS].double() - self.shift
            marks = None
            if labels is not None:
                marks = labels[at : at + _ROWS].to(part.device)
            for k in range(len(self.counts)):
                chosen = part if marks is None else part[marks == k]
                self.total[k].addmm_(chosen.mT, chosen)
                self.counts[k] += len(chosen)


def _class_count(
    x: Tensor,  # (…, d)
    labels: Tensor,  # (…)
) -> int:
    """max(labels) + 1, over all processes: one may lack the last classes, and sums of different
    shapes do not add up."""
    last = int(labels.max()) if labels.numel() else -1
    return 1 - int(World(x.device).min_(torch.tensor(-last, device=x.device)))


def correlation(
    x: Tensor | Iterable[Any],  # (…, d)
    *,
    mean: Tensor | None = None,  # (d,)
    labels: Tensor | None = None,  # (…)
    classes: int | None = None,
) -> Tensor:
    """R = Σ (x - mean)(x - mean)ᵀ / N in float64, in one pass over the rows.

    Args:
        x: (…, d) activations, or an iterable of such batches; with ``classes``, of (x, labels)
            pairs.
        mean: (d,) background mean; None means 0 (no centring).
        labels: int64, x's leading shape; rows with -1 are passed over. Only with a tensor x.
        classes: K, for one matrix a class; by default max(labels) + 1, over all processes, for a
            tensor with labels.

    Returns:
        (d, d), or (K, d, d) with labels. Under ``torchrun``, or in a process group that is there
        already, sums go over all processes, each with its own rows: then every process must call
        this, with at least one batch.

    Raises:
        ValueError: no row (of some class), shapes that do not fit, labels out of range, values that
            are not finite.
    """
    if classes is None and isinstance(labels, Tensor) and isinstance(x, Tensor):
        classes = _class_count(x, labels)
    if classes is not None and classes < 1:
        raise ValueError(f"correlation: classes must be at least 1, got {classes}")
    sums: _Sums | None = None
    for batch, marks in _batches(x, labels, classes is not None):
        rows = _rows(batch, None if sums is None else len(sums.shift))
        if classes is None:
            marks = None
        else:
            marks = _row_labels(marks, batch.shape[:-1], classes)
        if sums is None:
            sums = _Sums(classes or 1, rows.shape[1], mean, rows.device)
        sums.add(rows, marks)
    if sums is None:
        raise ValueError("correlation: there is no batch of rows")
    world = World(sums.total.device)
    total = world.sum_(sums.total)
    counts = world.sum_(sums.counts)
    if bool((counts == 0).any()):
        which = ""
        if classes is not None:
            which = f" of classes {(counts == 0).nonzero().flatten().tolist()}"
        raise ValueError(f"correlation: there is no row{which}")
    R = total / counts[:, None, None]
    if not bool(R.isfinite().all()):
        raise ValueError("correlation: x or mean holds values that are not finite")
    R = (R + R.mT) / 2
    return R[0] if classes is None else R


def spectrum(
    R: Tensor,  # ([K,] d, d)
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, d), descending, and eigenvectors (…, d, d) of a correlation matrix.

    Eigenvalues below d · eps of the largest are rounding noise (always so where N < d) and become
    0. Raises ValueError for a matrix that is not square or not positive semi-definite.
    """
    if not isinstance(R, Tensor) or R.dim() not in (2, 3) or R.shape[-1] != R.shape[-2]:
        raise ValueError(f"conceptor: R must be of shape (d, d) or (K, d, d), got {what_came(R)}")
    R = R.double()
    values, vectors = torch.linalg.eigh((R + R.mT) / 2)
    values = values.flip(-1)
    vectors = vectors.flip(-1)
    floor = R.shape[-1] * EPS * values[..., :1].clamp(min=0)
    if bool((values[..., -1:] < -20 * floor).any()):
        raise ValueError(
            f"conceptor: R must be positive semi-definite, its least eigenvalue is "
            f"{values.min():.3g}"
        )
    return torch.where(values <= floor, 0.0, values), vectors


def check_aperture(aperture: Any, name: str = "aperture") -> float:
    """The aperture as a float. Raises ValueError where it is no finite number above 0."""
    is_number = isinstance(aperture, int | float) and not isinstance(aperture, bool)
    if not is_number or not 0 < aperture < math.inf:
        raise ValueError(
            f"Conceptor: {name} must be a finite number above 0 or 'gradient', got {aperture!r}"
        )
    return float(aperture)


def shares(values: Tensor, aperture: float) -> Tensor:
    """λ/(λ + α⁻²) for eigenvalues λ ≥ 0, without an overflow at any α: 0 stays 0."""
    x = values * aperture * aperture
    return torch.where(x.isinf(), 1.0, x / (1 + x))


class ApertureRow(NamedTuple):
    """What a conceptor of this aperture keeps. Means over classes where there are several.

    quota: trace(C)/d. error: E‖x - Cx‖²/E‖x‖² on the data it was fitted to. gradient: d‖C‖²/d log
        α.
    """

    aperture: float
    quota: float
    error: float
    gradient: float


def _row(values: Tensor, aperture: float) -> ApertureRow:
    mu = shares(values, aperture)
    lost = (values * (1 - mu).square()).sum(-1)
    error = lost / values.sum(-1).clamp(min=_TINY)
    gradient = (4 * mu.square() * (1 - mu)).sum(-1)
    quota = mu.mean(-1)
    return ApertureRow(
        aperture,
        quota=float(quota.mean()),
        error=float(error.mean()),
        gradient=float(gradient.mean()),
    )


def aperture_sweep(R: Tensor, apertures: Sequence[float] | None = None) -> list[ApertureRow]:
    """The table aperture -> quota, reconstruction error, gradient criterion.

    Args:
        R: (d, d) or (K, d, d), as ``correlation`` gives it.
        apertures: by default one a factor of √10 from where the quota begins to where nearly
            everything is kept.
    """
    values = spectrum(R)[0]
    if apertures is None:
        low, high = _range(values)
        step = math.sqrt(10)
        first = math.floor(math.log(low, step))
        last = math.ceil(math.log(high, step))
        apertures = [step**i for i in range(first, last + 1)]
    return [_row(values, check_aperture(a)) for a in apertures]


def _range(values: Tensor) -> tuple[float, float]:
    """Apertures between which every direction goes from dropped to kept; noise below 1e-9 of the
    top is left out."""
    top = float(values.max())
    if top <= 0:
        raise ValueError("conceptor: every row is zero, so no aperture is better than another")
    least = float(values[values > 1e-9 * top].min())
    return 0.1 / math.sqrt(top), 10 / math.sqrt(least)


def choose_aperture(R: Tensor, quota: float | None = None) -> float:
    """An aperture from the data: where Jaeger's gradient criterion peaks, or where the mean quota
    is a given one.

    The criterion takes the α at which ‖C‖² grows fastest with log α: the most directions are then
    on the verge of being kept, so the conceptor tells signal from background most sharply. It is a
    heuristic: for steering, sweep.

    Raises:
        ValueError: R is zero; ``quota`` is not between 0 and what R's rank allows.
    """
    values = spectrum(R)[0]
    lowest, highest = _range(values)
    low = math.log(lowest)
    high = math.log(highest)
    if quota is None:
        grid = torch.linspace(low, high, 400, dtype=torch.float64).exp().tolist()
        return max((_row(values, a) for a in grid), key=lambda row: row.gradient).aperture
    reachable = float((values > 0).double().mean())
    if not 0 < quota < reachable:
        raise ValueError(
            f"choose_aperture: quota must be above 0 and below {reachable:.4g} (rank/d), got "
            f"{quota}"
        )
    low -= 40
    high += 40
    for _ in range(100):
        middle = (low + high) / 2
        if _row(values, math.exp(middle)).quota < quota:
            low = middle
        else:
            high = middle
    return math.exp(high)
