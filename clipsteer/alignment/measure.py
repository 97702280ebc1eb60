"""How far two layers agree: as a whole, and concept by concept, with intervals over images.

    E_P(i, j) = 1 - ½ ‖p_i - p_j‖₁
    GRI(P, Q) = 1 - mean over pairs of rows |E_P - E_Q|
    D(a, b)   = ½ mean over pairs | |P_ia - P_ja| - |Q_ib - Q_jb| |
    relative  = D(a, b) / (D(a, 0) + D(b, 0)), in [0, 1]

D grows with how common concepts are: two rare ones are near whatever they are. Relative to what
each is from nothing it compares them whatever their size: 0 for concepts that are the same, near 1
for rare ones with no row in common.

Intervals: delete-one jackknife over images, whose rows move together; of relative distances, over
20 blocks of images.

Source: Vielhaben et al. 2025 (arXiv 2412.06639), equations 2 to 4; the chance level, relative
distances and intervals are clipsteer's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.alignment.scores import Proximity
from clipsteer.ops.pairwise_agreement import (
    concept_distances,
    concept_distances_jackknife,
    generalised_rand_index_jackknife,
)
from clipsteer.report.intervals import student_quantile
from clipsteer.sae.metrics.estimate import Estimate, blocks_of, interval

_PAIRS = 20_000  # of the chance level, from each layer


def _pairs(rows: int) -> float:
    return rows * (rows - 1) / 2


class _Blocks:
    """Blocks of images, and the rows that are left without each."""

    def __init__(self, images: Tensor, seed: int) -> None:
        block = blocks_of(images, seed)
        there = block.unique().tolist()
        self.all = torch.arange(len(images))
        self.rest = [(block != b).nonzero().flatten() for b in there]
        self.sizes = [len(images[block == b].unique()) for b in there]

    def ratios(
        self, above: Callable[[Tensor], Tensor], below: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(1 + blocks, ...) of a ratio of means over pairs: of all rows, and without each block;
        NaN where there is nothing to divide by, or no pair."""
        found: list[Tensor] = []
        for rows in (self.all, *self.rest):
            if len(rows) < 2:
                found.append(torch.full_like(found[0], torch.nan))
                continue
            u, v = above(rows), below(rows)
            found.append(torch.where(v > 0, u / v, torch.nan))
        return torch.stack(found)

    def estimate(self, values: Sequence[float]) -> Estimate:
        """The first value with its interval from the others."""
        low, high = interval(values[0], values[1:], self.sizes)
        return Estimate(values[0], low, high, sum(self.sizes), "images")


def _check(P: Tensor, Q: Tensor, images: Tensor) -> None:
    if P.ndim != 2 or Q.ndim != 2 or not len(P) == len(Q) == len(images):
        raise ValueError(
            "alignment: expected scores (N, K) and (N, L) of the same rows and their images (N,), "
            f"got {tuple(P.shape)}, {tuple(Q.shape)} and {tuple(images.shape)}"
        )


def agreement(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
    images: Tensor,  # (N,) int64
    seed: int = 0,
) -> Estimate:
    """GRI of two layers with its interval over images; details: ``chance``, and how far above it,
    ``above_chance`` = (GRI - chance) / (1 - chance).

    Raises ValueError for shapes that do not fit, or fewer than two images.
    """
    _check(P, Q, images)
    found = generalised_rand_index_jackknife(P, Q, images)
    value = float(found.value)
    count = len(images.unique())
    reach = student_quantile(0.975, count - 1) * float(found.error)
    by_chance = chance(P, Q, seed)
    above = (value - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0
    details = {"chance": by_chance, "above_chance": above}
    return Estimate(value, value - reach, value + reach, count, "images", details)


def _spread(values: Tensor) -> Tensor:
    """Σ |x_i - x_j| over pairs i < j, for each column of values (n, ...), float64."""
    n = len(values)
    ordered = values.double().sort(0).values
    weight = 2 * torch.arange(n, dtype=torch.float64) - (n - 1)
    return (weight.reshape(-1, *[1] * (values.ndim - 1)) * ordered).sum(0)


def chance(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, L)
    seed: int = 0,
) -> float:
    """GRI where the rows of one layer had nothing to do with those of the other: 1 - E|e - e'| of
    pairs drawn independently in both, from 20,000 pairs of each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for scores in (P, Q):
        i = torch.randint(len(scores), (_PAIRS,), generator=generator)
        step = torch.randint(1, len(scores), (_PAIRS,), generator=generator)
        j = (i + step) % len(scores)
        drawn.append(0.5 * (scores[i] - scores[j]).abs().sum(1))
    # of pooled values those of both and those between them
    between = _spread(torch.cat(drawn)) - _spread(drawn[0]) - _spread(drawn[1])
    return 1 - float(between) / _PAIRS**2


class Match(NamedTuple):
    """A concept of one layer and the one of the other that it is matched with."""

    a: int  # column of P
    b: int  # column of Q
    distance: Estimate  # the paper's D
    relative: Estimate


class Matching(NamedTuple):
    """Concepts of two layers, one by one."""

    matches: list[Match]  # the nearest first
    nearest_a: list[Match]  # of each concept of the first layer that was looked at
    nearest_b: list[Match]  # of each of the second; a and b as above

    def universal(self, threshold: float = 0.5) -> list[Match]:
        """Matches whose interval of relative distances lies below the threshold."""
        return [m for m in self.matches if m.relative.high < threshold]

    def unique_a(self, threshold: float = 0.5) -> list[Match]:
        """Concepts of the first layer from which all of the other are farther than the
        threshold, that is: the nearest one's interval lies above it. The most common first."""
        return [m for m in self.nearest_a if m.relative.low > threshold]

    def unique_b(self, threshold: float = 0.5) -> list[Match]:
        """The same of the second layer."""
        return [m for m in self.nearest_b if m.relative.low > threshold]


def commonest(
    scores: Tensor,  # (N, K)
    count: int,
) -> Tensor:
    """(at most count,) int64: the columns of the largest mean, largest first."""
    return scores.double().mean(0).argsort(descending=True, stable=True)[:count]


def _assigned(distances: Tensor) -> list[tuple[int, int]]:
    """The pairs (row, column) of the smallest total."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise RuntimeError(
            "alignment: matching concepts needs scipy: pip install 'clipsteer[align]'"
        ) from error
    rows, columns = linear_sum_assignment(distances.numpy())
    return list(zip(rows.tolist(), columns.tolist()))


def match_concepts(
    P: Proximity,  # of K concepts
    Q: Proximity,  # of L
    images: Tensor,  # (N,) int64
    *,
    count: int = 64,
    seed: int = 0,
) -> Matching:
    """Match the concepts of two layers so that the sum of the paper's distances is smallest.

    Args:
        P, Q: scores of the same rows.
        images: the image of each row.
        count: concepts of each layer that are looked at, the commonest; time is
            count² · N log N.

    Raises:
        ValueError: shapes that do not fit, or fewer than two images. RuntimeError: no scipy.
    """
    _check(P.scores, Q.scores, images)
    if not P.names or not Q.names:
        return Matching([], [], [])
    columns_a = commonest(P.scores, count)
    columns_b = commonest(Q.scores, count)
    p = P.scores[:, columns_a].contiguous()
    q = Q.scores[:, columns_b].contiguous()
    distances = concept_distances_jackknife(p, q, images)
    degrees = len(images.unique()) - 1
    reach = student_quantile(0.975, degrees) * distances.error  # (K, L)
    blocks = _Blocks(images, seed)
    relative = blocks.ratios(
        lambda rows: concept_distances(p[rows], q[rows]).double(),
        lambda rows: _from_nothing(p[rows])[:, None] + _from_nothing(q[rows]),
    )

    def match(a: int, b: int) -> Match:
        value, off = float(distances.value[a, b]), float(reach[a, b])
        return Match(
            int(columns_a[a]),
            int(columns_b[b]),
            Estimate(value, value - off, value + off, degrees + 1, "images"),
            blocks.estimate(relative[:, a, b].tolist()),
        )

    matches = [match(a, b) for a, b in _assigned(distances.value)]
    matches.sort(key=lambda m: m.relative.value)
    near = relative[0].nan_to_num(torch.inf)
    return Matching(
        matches,
        [match(a, b) for a, b in enumerate(near.argmin(1).tolist())],
        [match(a, b) for b, a in enumerate(near.argmin(0).tolist())],
    )


def same_distances(
    P: Tensor,  # (N, K)
    Q: Tensor,  # (N, K)
) -> Tensor:
    """(K,) float64: D(a, a) of every concept with its namesake, in K N log N.

    From ||s| - |t|| = |s - t| + |s + t| - |s| - |t|, of whose sums over pairs each takes a sort.
    """
    p, q = P.double(), Q.double()
    total = _spread(p - q) + _spread(p + q) - _spread(p) - _spread(q)
    return 0.5 * total.clamp_min(0) / _pairs(len(p))


def follow_concepts(
    P: Proximity,
    Q: Proximity,
    images: Tensor,  # (N,) int64
    *,
    count: int | None = None,
    seed: int = 0,
) -> list[Match]:
    """What became of each concept of P: its distance from the one of the same name, such as a
    feature of one SAE before and after training. One that Q has not is as far as from nothing.

    Args:
        P, Q: scores of the same rows.
        images: the image of each row.
        count: of P's concepts, the commonest; by default all.

    Returns matches in the order of P's columns; b is -1 where there is none.
    """
    _check(P.scores, Q.scores, images)
    columns = commonest(P.scores, count or len(P.names)).sort().values
    where = {name: i for i, name in enumerate(Q.names)}
    partners = [where.get(P.names[a], -1) for a in columns.tolist()]
    p = P.scores[:, columns]
    # a column of zeros stands behind the others
    q = torch.cat([Q.scores, Q.scores.new_zeros(len(p), 1)], 1)[:, partners]
    blocks = _Blocks(images, seed)
    relative = blocks.ratios(
        lambda rows: same_distances(p[rows], q[rows]),
        lambda rows: _from_nothing(p[rows]) + _from_nothing(q[rows]),
    )
    values = same_distances(p, q).tolist()
    found = []
    for i, (a, b) in enumerate(zip(columns.tolist(), partners)):
        # of the value itself the relative one's interval says enough
        distance = Estimate(values[i], math.nan, math.nan, sum(blocks.sizes), "images")
        found.append(Match(a, b, distance, blocks.estimate(relative[:, i].tolist())))
    return found


def _from_nothing(scores: Tensor) -> Tensor:
    """D(a, 0): ½ mean over pairs |P_ia - P_ja|, (K,), in N log N."""
    return 0.5 * _spread(scores) / _pairs(len(scores))


def neighbours_agree_most(
    matrix: Sequence[Sequence[float]],  # (layers, layers)
    reach: int = 1,
) -> float:
    """The paper's sanity check: of how many layers the one that agrees most with it, itself apart,
    is at most ``reach`` away; a share.

    Raises ValueError for a matrix that is not square, or of fewer than two layers.
    """
    count = len(matrix)
    if count < 2 or any(len(row) != count for row in matrix):
        got = [len(row) for row in matrix]
        raise ValueError(f"neighbours_agree_most: expected a square matrix, got rows of {got}")
    hits = 0
    for i, row in enumerate(matrix):
        others = [(value, -abs(i - j), j) for j, value in enumerate(row) if j != i]
        hits += abs(max(others)[2] - i) <= reach
    return hits / count
