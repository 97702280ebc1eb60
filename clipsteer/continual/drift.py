"""What follows the drift of features: prototypes, from batches and from several processes (the sums
of ``ops.semantic_drift``, kept apart), and covariances.

Source: Yu et al. 2020 (SDC, arXiv 2004.00440); Wu et al. 2025 (arXiv 2502.07560).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipsteer.ops._dispatch import choose
from clipsteer.ops.semantic_drift import check_arguments, drift_sums, median_sigma, moved_by
from clipsteer.training.world import World

__all__ = ["DriftAccumulator", "median_sigma", "transport"]


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
    old = old.double()
    new = new.double()
    centred = old - old.mean(0)
    moved = (new - old) - (new - old).mean(0)
    G = centred.T @ centred  # (d, d)
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    ridge = 1e-3 * G.diagonal().mean()
    A = eye + torch.linalg.solve(G + ridge * eye, centred.T @ moved).T
    return (A @ covariances.double() @ A.T).to(covariances)
