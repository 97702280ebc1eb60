"""Localisation: Moran's I of features' maps over the patches.

    I = (P / Σ w) · Σ_pq w_pq (v_p - v̄)(v_q - v̄) / Σ_p (v_p - v̄)²

v are a feature's activations over the P patches of an image, w_pq = 1 for neighbours. 1: neighbours
alike, -1 / (P - 1): what a random order of the patches gives on average, -1: a checkerboard (of
patches that share a side). A feature's I is the mean over the images in which it can be told, the
value the mean over features. I does not depend on the activations' scale, and neither does which
maps are scored. Source: Moran 1950 (Biometrika 37).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.sae.metrics.estimate import BLOCKS, Estimate, blocks_of, interval, sums_by
from clipsteer.sae.metrics.stream import Grid

# of squares' sum: below it, what is left after subtracting the mean is rounding
_ROUNDING = 1e-12


class Maps(NamedTuple):
    """Activations of a batch of images, sorted by image, feature and token."""

    key: Tensor  # (m,) int64, ascending: (image · d_sae + feature) · tokens + token
    values: Tensor  # (m,), above 0
    images: Tensor  # (B,) int64, the images' numbers
    d_sae: int
    grid: Grid


class Scored(NamedTuple):
    """Moran's I of maps (image, feature)."""

    rows: Tensor  # (s,) int64, place of the image in the batch
    features: Tensor  # (s,) int64
    value: Tensor  # (s,) float64
    spread: Tensor  # (s,) float64, Σ (v - v̄)²


def half_neighbourhood(neighbours: int) -> list[tuple[int, int]]:
    """Steps (down, right) to half of a patch's neighbours; the other half are these patches'."""
    steps = {4: [(0, 1), (1, 0)], 8: [(0, 1), (1, 0), (1, 1), (1, -1)]}
    if neighbours not in steps:
        raise ValueError(f"neighbours: expected 4 (sides) or 8 (corners too), got {neighbours}")
    return steps[neighbours]


def degrees(grid: Grid, neighbours: int) -> Tensor:
    """(P,) float64: how many neighbours each patch has."""
    found = torch.zeros(grid.height, grid.width, dtype=torch.float64)
    for down, right in half_neighbourhood(neighbours):
        here = torch.zeros_like(found)
        cols = slice(max(0, -right), grid.width - max(0, right))
        here[: grid.height - down, cols] = 1
        found += here
        found += here.roll((down, right), (0, 1))
    return found.flatten()


def morans_i(maps: Maps, neighbours: int, least: int, most: int) -> Scored:
    """Moran's I of the maps with at least ``least`` and at most ``most`` active patches."""
    key, values, _, d_sae, grid = maps
    token = key % grid.tokens
    if grid.prefix:
        patches = token >= grid.prefix
        key, values, token = key[patches], values[patches], token[patches]
    run, counts = torch.unique_consecutive(key // grid.tokens, return_counts=True)
    fits = (counts >= least) & (counts <= most)
    chosen = fits.repeat_interleave(counts)
    key, token, run, counts = key[chosen], token[chosen], run[fits], counts[fits]
    v = values[chosen].double()
    each = torch.arange(len(run), device=key.device).repeat_interleave(counts)

    def summed(parts: Tensor) -> Tensor:
        return sums_by(each, parts, len(run))

    place = token - grid.prefix
    row = place // grid.width
    column = place % grid.width
    degree = degrees(grid, neighbours).to(key.device)
    products = torch.zeros_like(v)
    for down, right in half_neighbourhood(neighbours):
        inside = (row + down < grid.height) & (column + right >= 0) & (column + right < grid.width)
        wanted = key + down * grid.width + right
        at = torch.searchsorted(key, wanted).clamp_max_(max(0, len(key) - 1))
        there = inside & (key[at] == wanted) if len(key) else inside
        products += torch.where(there, 2 * v * v[at], 0) if len(key) else 0
    P = grid.height * grid.width
    mean = summed(v) / P
    squares = summed(v * v)
    spread = squares - P * mean * mean
    joined = summed(products) - 2 * mean * summed(v * degree[place]) + mean**2 * degree.sum()
    varies = spread > _ROUNDING * squares
    value = P / degree.sum() * joined / spread
    return Scored(
        (run // d_sae)[varies].cpu(),
        (run % d_sae)[varies].cpu(),
        value[varies].cpu(),
        spread[varies].cpu(),
    )


class Localisation:
    """Sums of Moran's I by feature and block of images.

    Args:
        neighbours: of a patch: 4, those that share a side, or 8, corners too.
        least: active patches that a map must have, so that I says something.
        share: of the patches that may be active at the most: a background is no place.
        images: in which a feature must be scored to count.
    """

    def __init__(
        self,
        d_sae: int,
        seed: int = 0,
        *,
        neighbours: int = 4,
        least: int = 5,
        share: float = 0.9,
        images: int = 1,
    ) -> None:
        half_neighbourhood(neighbours)
        self.neighbours = neighbours
        self.least = least
        self.share = share
        self.images = images
        self.seed = seed
        self.sums = torch.zeros(BLOCKS, d_sae, dtype=torch.float64)
        self.counts = torch.zeros(BLOCKS, d_sae, dtype=torch.float64)
        self.seen = torch.zeros(BLOCKS, dtype=torch.int64)
        self.grid: Grid | None = None

    def add(self, maps: Maps) -> None:
        """Take in a batch."""
        self.grid = maps.grid
        scored = self._scored(maps)
        block = blocks_of(maps.images, self.seed)
        self.seen += torch.bincount(block, minlength=BLOCKS)
        at = (block[scored.rows], scored.features)
        self.sums.index_put_(at, scored.value, accumulate=True)
        self.counts.index_put_(at, torch.ones_like(scored.value), accumulate=True)

    def _scored(self, maps: Maps) -> Scored:
        most = int(self.share * maps.grid.height * maps.grid.width)
        return morans_i(maps, self.neighbours, self.least, most)

    def merge(self, other: Localisation) -> None:
        """Take in another's sums."""
        self.grid = self.grid or other.grid
        self.sums += other.sums
        self.counts += other.counts
        self.seen += other.seen

    def per_feature(self, without: int | None = None) -> Tensor:
        """(d_sae,) mean I over images, NaN where too few; ``without`` a block of images."""
        sums = self.sums.sum(0)
        counts = self.counts.sum(0)
        if without is not None:
            sums = sums - self.sums[without]
            counts = counts - self.counts[without]
        return torch.where(counts >= max(1, self.images), sums / counts, torch.nan)

    def estimate(self) -> Estimate:
        """The mean over features; details: the mean of a random order, and quartiles."""
        means = self.per_feature()
        scored = means[~means.isnan()]
        value = float(scored.mean()) if len(scored) else float("nan")
        without = [float(self.per_feature(block).nanmean()) for block in range(BLOCKS)]
        details: dict[str, object] = {
            "maps": int(self.counts.sum()),
            "neighbours": self.neighbours,
        }
        if self.grid is not None:
            details["random"] = -1 / (self.grid.height * self.grid.width - 1)
        if len(scored):
            quartiles = scored.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=scored.dtype))
            details["quartiles"] = quartiles.tolist()
        low, high = interval(value, without, self.seen.tolist())
        return Estimate(value, low, high, len(scored), "features", details)
