"""How far two layers agree: as a whole, and concept by concept, with intervals over images.

    E_P(i, j) = 1 - ½ ‖p_i - p_j‖₁
    GRI(P, Q) = 1 - mean over pairs of rows |E_P - E_Q|
    D(a, b)   = ½ mean over pairs | |P_ia - P_ja| - |Q_ib - Q_jb| |
    relative  = D(a, b) / (D(a, 0) + D(b, 0)), in [0, 1]

D grows with how common concepts are: two rare ones are near whatever they are. Relative to what
each is from nothing it compares them whatever their size: 0 for concepts that are the same, near 1
for rare ones with no row in common.

Intervals: delete-one-block jackknife over images, whose rows move together. The pairs of rows are
summed once for each pair of blocks, so that all of it costs about twice what the value does.

Source: Vielhaben et al. 2025 (arXiv 2412.06639), equations 2 to 4; the chance level, relative
distances and intervals are clipsteer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.alignment.scores import Proximity
from clipsteer.ops.pairwise_agreement import (
    concept_distances_reference as concept_distances,
)
from clipsteer.ops.pairwise_agreement import (
    generalised_rand_index_reference as generalised_rand_index,
)
from clipsteer.sae.metrics.estimate import Estimate, blocks_of, interval

_BLOCK = 1 << 22  # differences that are held at once
_PAIRS = 20_000  # of the chance level, from each layer


def _pairs(rows: int) -> float:
    return rows * (rows - 1) / 2


class Jackknife(NamedTuple):
    """A mean over pairs of rows, and the same without each block of images."""

    value: Tensor  # (...) float64
    without: Tensor  # (B, ...) float64


class Blocks:
    """Blocks of images, and the rows of each.

    Args:
        images: (N,) int64, the image of each row.
        seed: of the blocks.

    Raises ValueError for fewer than two rows.
    """

    def __init__(self, images: Tensor, seed: int = 0) -> None:
        if len(images) < 2:
            raise ValueError(f"alignment: pairs of rows need two rows, got {len(images)}")
        block = blocks_of(images, seed)
        self.rows = [(block == b).nonzero().flatten() for b in block.unique().tolist()]
        self.sizes = [len(images[rows].unique()) for rows in self.rows]

    def jackknife(self, mean: Callable[[Tensor], Tensor]) -> Jackknife:
        """Of ``mean``, which gives a mean over the pairs among some rows."""

        def total(rows: Tensor) -> Tensor:
            if len(rows) < 2:
                return torch.zeros((), dtype=torch.float64)
            return mean(rows).double() * _pairs(len(rows))

        own = [total(rows) for rows in self.rows]
        # of pairs with a row in the block
        touching = list(own)
        whole = sum(own[1:], own[0])
        for a, b in combinations(range(len(own)), 2):
            between = total(torch.cat([self.rows[a], self.rows[b]])) - own[a] - own[b]
            touching[a] = touching[a] + between
            touching[b] = touching[b] + between
            whole = whole + between
        count = sum(map(len, self.rows))
        value = whole / _pairs(count)
        without = []
        for rows, part in zip(self.rows, touching):
            left = count - len(rows)
            # without pairs there is no mean
            rest = (whole - part) / _pairs(left) if left > 1 else torch.full_like(value, torch.nan)
            without.append(rest)
        return Jackknife(value, torch.stack(without))

    def estimate(self, value: float, without: Sequence[float], **details: float) -> Estimate:
        """A value with its interval."""
        low, high = interval(value, without, self.sizes)
        return Estimate(value, low, high, sum(self.sizes), "images", details)


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

    Raises ValueError for shapes that do not fit.
    """
    _check(P, Q, images)
    blocks = Blocks(images, seed)
    found = blocks.jackknife(lambda rows: generalised_rand_index(P[rows], Q[rows]))
    value = float(found.value)
    by_chance = chance(P, Q, seed)
    above = (value - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0
    details = {"chance": by_chance, "above_chance": above}
    return blocks.estimate(value, found.without.tolist(), **details)


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
    rows: int = 4000,
    seed: int = 0,
) -> Matching:
    """Match the concepts of two layers so that the sum of the paper's distances is smallest.

    Args:
        P, Q: scores of the same rows.
        images: the image of each row.
        count: concepts of each layer that are looked at, the commonest.
        rows: at most as many rows as pairs are taken of, evenly spaced; time is
            rows² · count².

    Raises:
        ValueError: shapes that do not fit. RuntimeError: no scipy.
    """
    _check(P.scores, Q.scores, images)
    if not P.names or not Q.names:
        return Matching([], [], [])
    n = len(images)
    kept = torch.arange(min(n, rows)) * n // min(n, rows)
    columns_a = commonest(P.scores, count)
    columns_b = commonest(Q.scores, count)
    p = P.scores[kept][:, columns_a]
    q = Q.scores[kept][:, columns_b]
    blocks = Blocks(images[kept], seed)
    distances = blocks.jackknife(lambda rows: concept_distances(p[rows], q[rows]))
    alone_a = blocks.jackknife(lambda rows: _from_nothing(p[rows]))
    alone_b = blocks.jackknife(lambda rows: _from_nothing(q[rows]))
    above = [distances.value, *distances.without]  # (K, L) each
    below = [
        a[:, None] + b[None, :]
        for a, b in zip([alone_a.value, *alone_a.without], [alone_b.value, *alone_b.without])
    ]
    relative = [torch.where(v > 0, u / v, torch.nan) for u, v in zip(above, below)]

    def match(a: int, b: int) -> Match:
        distance, *others = [float(u[a, b]) for u in above]
        share, *shares = [float(r[a, b]) for r in relative]
        return Match(
            int(columns_a[a]),
            int(columns_b[b]),
            blocks.estimate(distance, others),
            blocks.estimate(share, shares),
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
    """(K,) float64: D(a, a) of every concept with its namesake, in N² K."""
    n, count = P.shape
    step = max(1, _BLOCK // max(1, n * count))
    total = torch.zeros(count, dtype=torch.float64)
    for at in range(0, n, step):
        # of these rows with all from their first on: every pair once, those among them twice
        p, q = ((x[at : at + step, None] - x[at:]).abs() for x in (P, Q))  # (n', n'', K)
        apart = (p - q).abs()
        total += apart.sum((0, 1), dtype=torch.float64)
        total -= apart[:, :step].sum((0, 1), dtype=torch.float64) / 2
    return 0.5 * total / _pairs(n)


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
    blocks = Blocks(images, seed)
    apart = blocks.jackknife(lambda rows: same_distances(p[rows], q[rows]))
    alone = blocks.jackknife(lambda rows: _from_nothing(p[rows]) + _from_nothing(q[rows]))
    relative = [
        torch.where(v > 0, u / v, torch.nan)
        for u, v in zip([apart.value, *apart.without], [alone.value, *alone.without])
    ]
    found = []
    for i, (a, b) in enumerate(zip(columns.tolist(), partners)):
        distance = blocks.estimate(float(apart.value[i]), apart.without[:, i].tolist())
        share = blocks.estimate(float(relative[0][i]), [float(r[i]) for r in relative[1:]])
        found.append(Match(a, b, distance, share))
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
