"""What follows the drift of features: prototypes, from batches and from several processes (the sums
of ``ops.semantic_drift``, kept apart) or through a fitted map, and covariances; and how far off
they are then.

Source: Yu et al. 2020 (SDC, arXiv 2004.00440); Wu et al. 2025 (arXiv 2502.07560); Gomez-Villa et
al. 2024 (LDC, arXiv 2407.08536).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipsteer.ops._dispatch import choose
from clipsteer.ops.semantic_drift import check_arguments, drift_sums, median_sigma, moved_by
from clipsteer.training.world import World

__all__ = ["DriftAccumulator", "follow_errors", "learned_drift", "median_sigma", "transport"]

# strengths of the ridge of `learned_drift`, over the mean old variance
_STRENGTHS = tuple(10.0**e for e in range(-9, 4))
# classes of a task that `follow_errors` measures on, each of which costs a fit
_MEASURED = 16


class DriftAccumulator:
    """``ops.semantic_drift`` over a loader: ``update`` with each batch, then ``result``.

    Args:
        prototypes: (C, d) class means under the old network.
        sigma, floor, backend: as in ``ops.semantic_drift``; sigma is a number here, as no batch
            knows the median of all: ``float(median_sigma(rows, prototypes))`` takes it from the
            first 4,096 rows.

    Sums are kept relative to each prototype's largest log-weight, in float64 beyond a batch:
    batches, accumulators and processes may come in any order, and give the result of one call on
    all rows but for rounding.
    """

    def __init__(
        self,
        prototypes: Tensor,  # (C, d)
        sigma: float = 1.0,
        floor: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        no_rows = prototypes[:0] if isinstance(prototypes, Tensor) else None
        check_arguments("DriftAccumulator", no_rows, no_rows, prototypes, sigma, floor)
        if isinstance(sigma, str):
            raise ValueError(
                'DriftAccumulator: sigma must be a number, got "median"; '
                "float(median_sigma(rows, prototypes)) of the first rows is one"
            )
        self.prototypes = prototypes.detach()
        self.sigma = sigma
        self.floor = floor
        self.backend = backend
        self.moved = torch.zeros_like(self.prototypes, dtype=torch.float64)  # (C, d)
        self.total = self.moved.new_zeros(len(prototypes))  # (C,)
        self.peak = torch.full_like(self.total, -float("inf"))  # (C,)
        self.rows = 0

    @torch.no_grad()
    def update(
        self,
        old: Tensor,  # (N, d)
        new: Tensor,  # (N, d)
    ) -> DriftAccumulator:
        """Add features of the same images, in the same order, under the old and the new network.

        Raises ValueError, TypeError or RuntimeError as ``ops.semantic_drift`` does.
        """
        check_arguments(
            "DriftAccumulator.update", old, new, self.prototypes, self.sigma, self.floor
        )
        if old.shape[0] and self.prototypes.numel():
            backend = choose("semantic_drift", self.backend, old)
            sums = drift_sums(old, new, self.prototypes, self.sigma, self.floor, backend)
            self._add(*sums)
        self.rows += old.shape[0]
        return self

    def merge(self, other: DriftAccumulator) -> DriftAccumulator:
        """Add what ``other`` has seen; ValueError unless prototypes, sigma and floor are equal."""
        same = self.sigma == other.sigma and self.floor == other.floor
        if not same or not torch.equal(self.prototypes, other.prototypes):
            raise ValueError(
                "DriftAccumulator.merge: expected the same prototypes, sigma and floor"
            )
        self._add(other.peak, other.total, other.moved)
        self.rows += other.rows
        return self

    def all_reduce(self, world: World | None = None) -> DriftAccumulator:
        """What all processes have seen together, in every process; this accumulator stays."""
        world = world or World(self.prototypes.device)
        joint = DriftAccumulator(self.prototypes, self.sigma, self.floor, backend=self.backend)
        joint.peak = -world.min_(-self.peak)
        shrink = _shrink(self.peak, self.total, joint.peak)
        joint.total = world.sum_(self.total * shrink)
        joint.moved = world.sum_(self.moved * shrink.unsqueeze(1))
        joint.rows = int(world.sum_(torch.tensor(self.rows, device=self.prototypes.device)))
        return joint

    def result(self) -> Tensor:
        """(C, d) moved prototypes, of the prototypes' dtype; without any row, the prototypes."""
        if not self.rows:
            return self.prototypes.clone()
        return moved_by(self.prototypes, self.peak, self.total, self.moved)

    def _add(
        self,
        peak: Tensor,  # (C,)
        total: Tensor,  # (C,)
        moved: Tensor,  # (C, d)
    ) -> None:
        peak = peak.double()
        total = total.double()
        highest = torch.maximum(self.peak, peak)
        ours = _shrink(self.peak, self.total, highest)
        theirs = _shrink(peak, total, highest)
        self.total = self.total * ours + total * theirs
        self.moved = self.moved * ours.unsqueeze(1) + moved.double() * theirs.unsqueeze(1)
        self.peak = highest


def _shrink(
    peak: Tensor,  # (C,)
    total: Tensor,  # (C,)
    highest: Tensor,  # (C,)
) -> Tensor:  # (C,)
    """e^(peak − highest), and 0 where nothing has been added yet."""
    return torch.where(total == 0, 0.0, (peak - highest).exp())


def transport(
    covariances: Tensor,  # (C, d, d)
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
) -> Tensor:  # (C, d, d)
    """A Σ Aᵀ, with A the linear map that takes centred old features nearest to centred new ones.

    A = I + Δ, Δ by ridge regression of new − old on old, λ a thousandth of the mean old variance:
    where a task has seen nothing, nothing is changed. The map is ours; the papers keep Σ.
    """
    G, cross, _ = _moments(old, new)
    A = _identity_and(G, cross, 1e-3 * float(G.diagonal().mean()))
    return (A @ covariances.double() @ A.T).to(covariances)


def _moments(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
) -> tuple[Tensor, Tensor, Tensor]:
    """Of centred old features and centred movements, in float64: G (d, d), their products (d, d),
    and the centred rows side by side (2, N, d)."""
    old = old.double()
    new = new.double()
    centred = old - old.mean(0)
    moved = (new - old) - (new - old).mean(0)
    return centred.T @ centred, centred.T @ moved, torch.stack([centred, moved])


def _identity_and(
    G: Tensor,  # (d, d)
    cross: Tensor,  # (d, d)
    ridge: float,
) -> Tensor:  # (d, d)
    """I + Δ, Δ the ridge regression of movements on old features."""
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    return eye + torch.linalg.solve(G + ridge * eye, cross).T


@torch.no_grad()
def learned_drift(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    prototypes: Tensor,  # (C, d)
) -> Tensor:  # (C, d)
    """Move class prototypes through the affine map that takes old features nearest to new ones.

    μ ↦ m_new + (I + Δ)(μ − m_old), Δ by ridge regression of the movement on old features, both
    about their means m; its strength is the one of 1e-9 … 1e3 of the mean old variance with the
    least leave-one-out error on these rows. A drift that is affine is recovered wherever the rows
    go; where they do not go, prototypes move with the rows' mean. Means of features, not only
    features, follow an affine map, so μ may be the mean of any class.

    Args:
        old: (N, d) features of some images under the old network.
        new: (N, d) features of the same images, in the same order, under the new one.
        prototypes: (C, d) class means under the old network.

    Returns:
        Moved prototypes, of the prototypes' dtype; without any row, the prototypes.

    Raises ValueError or TypeError as ``ops.semantic_drift`` does.

    Source: Gomez-Villa et al. 2024 (LDC, ECCV, arXiv 2407.08536), whose linear projector is trained
    by gradient descent on the same squared error; solving for it, with the identity as where it
    starts, is ours.
    """
    check_arguments("learned_drift", old, new, prototypes, 1.0, 0.0)
    if 0 in old.shape or 0 in prototypes.shape:
        return prototypes.clone()
    G, cross, (centred, moved) = _moments(old, new)
    A = _identity_and(G, cross, _least_left_out(G, cross, centred, moved))
    old_mean = old.double().mean(0)
    new_mean = new.double().mean(0)
    return (new_mean + (prototypes.double() - old_mean) @ A.T).to(prototypes.dtype)


def _least_left_out(
    G: Tensor,  # (d, d)
    cross: Tensor,  # (d, d)
    centred: Tensor,  # (N, d)
    moved: Tensor,  # (N, d)
) -> float:
    """The ridge with the least squared error of each row by the map that is fitted without it."""
    # one eigendecomposition serves every strength
    values, vectors = torch.linalg.eigh(G)
    values = values.clamp(min=0)
    unit = float(values.mean())
    if not unit:
        return 1.0  # all rows are one: nothing but their mean is known to move
    rows = centred @ vectors  # (N, d)
    sides = vectors.T @ cross  # (d, d)
    errors = {}
    for strength in _STRENGTHS:
        shrunk = (values + strength * unit).reciprocal()
        left = moved - rows @ (shrunk.unsqueeze(1) * sides)  # (N, d)
        # what of each row's own movement is in its prediction, the mean's part included
        own = (rows.square() * shrunk).sum(1) + 1 / len(rows)  # (N,)
        left_out = left / (1 - own).clamp(min=1e-9).unsqueeze(1)
        errors[strength * unit] = float(left_out.square().sum())
    return min(errors, key=errors.__getitem__)


def follow_errors(
    old: Tensor,  # (N, d)
    new: Tensor,  # (N, d)
    labels: Tensor,  # (N,)
    follow: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # (at most _MEASURED of the classes,)
    """How far a class mean is off after a task, measured on the classes of the task itself: each
    one's old mean is moved by what the rows of the others say, and compared with its new mean.

    Args:
        follow: (old rows, new rows, means) -> moved means; of a strategy that does not compensate,
            the means as they are.

    Of a task with one class the two halves of its rows stand for classes.
    """
    if bool((labels == labels[0]).all()):
        labels = torch.arange(len(labels), device=labels.device) % 2
    off = []
    old = old.double()
    new = new.double()
    for c in labels.unique()[:_MEASURED].tolist():
        own = labels == c
        mean = follow(old[~own], new[~own], old[own].mean(0, keepdim=True))
        off.append((mean - new[own].mean(0)).norm())
    return torch.stack(off)
