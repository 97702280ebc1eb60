"""Logistic regression, and how well single features tell classes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.sae.metrics.estimate import sums_by
from clipsteer.sae.metrics.recorder import PooledCodes

# columns of a dense block (images, columns)
_COLUMNS = 4096


class Probe:
    """Multinomial logistic regression on standardised columns.

        min mean cross-entropy + ‖W‖² / (2 n),    penalty as scikit-learn's C = 1

    Columns are centred and divided by their standard deviation over the rows that it is fitted on,
    so that their scale does not matter. Fitted by L-BFGS in float64, from 0.
    """

    def __init__(
        self,
        x: Tensor,  # (n, m)
        labels: Tensor,  # (n,) int64, from 0 up
    ) -> None:
        wide = x.double()
        self.mean = wide.mean(0)
        spread = (wide - self.mean).square().mean(0).sqrt()
        # a column that does not vary says nothing
        self.scale = torch.where(spread > 1e-9 * self.mean.abs(), 1 / spread, 0)
        z = self._standardised(x)
        n, m = z.shape
        classes = int(labels.max()) + 1
        self.W = torch.zeros(classes, m, dtype=torch.float64, requires_grad=True)
        self.b = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.W, self.b],
            max_iter=200,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = F.linear(z, self.W, self.b)
            found = F.cross_entropy(logits, labels) + self.W.square().sum() / (2 * n)
            found.backward()
            return found

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]

    def _standardised(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) * self.scale

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(n, m) -> classes (n,)."""
        return F.linear(self._standardised(x), self.W, self.b).argmax(1)


def by_label(
    codes: PooledCodes,
    labels: Tensor,  # (N,) int64, from 0 up
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Σ x of every class and feature (classes, d_sae), and Σ x² of every feature (d_sae,)."""
    values = codes.values.double()
    cell = labels[codes.rows] * codes.d_sae + codes.features
    sums = sums_by(cell, values, classes * codes.d_sae)
    squares = sums_by(codes.features, values * values, codes.d_sae)
    return sums.reshape(classes, codes.d_sae), squares


def f_scores(
    codes: PooledCodes,
    labels: Tensor,  # (N,) int64, from 0 up
) -> Tensor:
    """(d_sae,) float64: the F statistic of each feature's analysis of variance over the classes;
    infinity where classes are told apart without error, -infinity where a feature does not vary."""
    sizes = torch.bincount(labels).double()
    classes, n = len(sizes), len(labels)
    sums, squares = by_label(codes, labels, classes)
    explained = (sums.square() / sizes[:, None].clamp_min(1)).sum(0)
    total = squares - sums.sum(0).square() / n
    inside = squares - explained
    between = total - inside
    rounding = 1e-12 * squares
    score = (between / max(classes - 1, 1)) / (inside / max(n - classes, 1))
    score = torch.where(inside > rounding, score, torch.inf)
    return torch.where(total > rounding, score, -torch.inf)


def ranked(scores: Tensor, count: int) -> Tensor:
    """The best features that vary, at most ``count``; of equals the earlier."""
    order = scores.argsort(descending=True, stable=True)[:count]
    return order[scores[order] > -torch.inf]


def consecutive(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels from 0 up, and what they stand for."""
    names, found = labels.unique(return_inverse=True)
    return found, names
