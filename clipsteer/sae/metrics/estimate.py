"""A metric's value, its interval over images, and which images go where.

Intervals: delete-one-block jackknife with blocks of unequal sizes (Busing, Meijer & van der Leeden
1999), Student's t with a degree of freedom less than there are blocks. An image's block, and
whether it is held out, follow from its number alone, so that neither the order nor the batches in
which images come make a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipsteer.report.intervals import student_quantile

BLOCKS = 20
# salts of the hash, so that blocks and held-out images are independent
_OF_BLOCKS = 1
_OF_PARTS = 2


@dataclass(frozen=True)
class Estimate:
    """What a metric says."""

    value: float
    """NaN where nothing was scored"""
    low: float
    """of the 95 % interval over images; NaN where there is none"""
    high: float
    """likewise"""
    scored: int
    """how many of ``unit`` were scored"""
    unit: str
    details: dict[str, Any] = field(default_factory=dict)
    """whatever else belongs to it, plain data"""

    def to_json(self) -> dict[str, Any]:
        """Plain data; None for what is not finite."""
        return _plain(vars(self))


def nothing(unit: str, why: str) -> Estimate:
    """Of a metric that could score nothing."""
    return Estimate(math.nan, math.nan, math.nan, 0, unit, {"why": why})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(
    value: float,
    without: Sequence[float],  # the same with each block of images deleted
    sizes: Sequence[int],  # images of each block
    level: float = 0.95,
) -> tuple[float, float]:
    """Low and high; NaN where fewer than two blocks are there, or one of the values is NaN."""
    kept = [(v, m) for v, m in zip(without, sizes) if m]
    g = len(kept)
    n = sum(m for _, m in kept)
    if g < 2 or not all(map(math.isfinite, (value, *(v for v, _ in kept)))):
        return math.nan, math.nan
    centre = g * value - sum((1 - m / n) * v for v, m in kept)
    variance = 0.0
    for v, m in kept:
        h = n / m
        variance += (h * value - (h - 1) * v - centre) ** 2 / (h - 1) / g
    reach = student_quantile((1 + level) / 2, g - 1) * math.sqrt(variance)
    return value - reach, value + reach


def ratio(above: float, below: float) -> float:
    """NaN where there is nothing to divide by."""
    return above / below if below else math.nan


def of_sums(
    above: Tensor,  # (blocks,)
    below: Tensor,  # (blocks,)
    sizes: Sequence[int],
) -> tuple[float, float, float]:
    """Σ above / Σ below, and its interval."""
    a = above.double()
    b = below.double()
    value = ratio(float(a.sum()), float(b.sum()))
    without = [ratio(float(a.sum() - p), float(b.sum() - q)) for p, q in zip(a, b)]
    return value, *interval(value, without, sizes)


def _hashed(numbers: Tensor, *salt: int) -> np.ndarray:
    """A 64-bit hash of each number (n,) (the finaliser of splitmix64)."""
    key = np.uint64(0)
    found = numbers.cpu().numpy().astype(np.uint64)
    with np.errstate(over="ignore"):
        for part in salt:
            key = key * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(part + 1)
        found = found + key * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
        return found ^ (found >> np.uint64(31))


def blocks_of(images: Tensor, seed: int, blocks: int = BLOCKS) -> Tensor:
    """The block (n,) int64 of each image (n,)."""
    found = _hashed(images, seed, _OF_BLOCKS) % np.uint64(blocks)
    return torch.from_numpy(found.astype(np.int64))


def sums_by(
    where: Tensor,  # (n,) int64, below count
    values: Tensor,  # (n,)
    count: int,
) -> Tensor:
    """(count,) float64: the sum of the values at each place."""
    # of no values bincount gives another dtype
    return torch.bincount(where, values.double(), minlength=count).double()


def sizes_of(
    block: Tensor,  # (n,) of the images that are scored
) -> list[int]:
    """Images of each block."""
    return torch.bincount(block, minlength=BLOCKS).tolist()


def held_out(
    images: Tensor,  # (n,)
    labels: Tensor,  # (n,)
    seed: int,
    share: float = 0.2,
) -> Tensor:
    """(n,) bool: of every class the share of its images, at least one of two, that is scored."""
    order = np.lexsort((_hashed(images, seed, _OF_PARTS), labels.numpy()))
    found = torch.zeros(len(images), dtype=torch.bool)
    sorted_labels = labels.numpy()[order]
    starts = np.flatnonzero(np.r_[True, sorted_labels[1:] != sorted_labels[:-1]])
    for start, stop in zip(starts, [*starts[1:], len(order)]):
        n = stop - start
        count = min(n - 1, max(1, round(share * n)))
        found[torch.from_numpy(order[start : start + count].copy())] = True
    return found
