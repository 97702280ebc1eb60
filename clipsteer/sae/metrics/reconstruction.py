"""What is kept of the reconstructions: their error over the tokens, and means of images.

    FVU = Σ ‖y - ŷ‖² / Σ ‖y - mean y‖²        over all tokens (Gao et al. 2024, arXiv 2406.04093)

Mean and spread by blocks of images, which are joined (``clipsteer.sae.scatter``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.sae.metrics.estimate import BLOCKS, Estimate, blocks_of, interval, ratio
from clipsteer.sae.scatter import Scatter


class _Part(NamedTuple):
    """Tokens of a block."""

    spread: Scatter
    error: float
    residual: float  # Σ (y - ŷ)


def _joined(a: _Part | None, b: _Part | None) -> _Part | None:
    if a is None or b is None:
        return b if a is None else a
    return _Part(a.spread.joined(b.spread), a.error + b.error, a.residual + b.residual)


class Reconstruction:
    """Of every block of images the tokens' spread and error, of every image the mean token."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.parts: list[_Part | None] = [None] * BLOCKS
        self.images = torch.zeros(BLOCKS, dtype=torch.int64)
        # number of the image -> means (d,) of what was given and of what was made of it
        self.means: dict[int, tuple[Tensor, Tensor]] = {}

    def add(
        self,
        y: Tensor,  # (B, T, d)
        y_hat: Tensor,  # (B, T, d)
        images: Tensor,  # (B,)
    ) -> None:
        """Take in a batch."""
        if y.shape != y_hat.shape or len(y) != len(images):
            raise ValueError(
                f"Recorder.add: y {tuple(y.shape)} and y_hat {tuple(y_hat.shape)} must be of one "
                f"shape, of {len(images)} images"
            )
        block = blocks_of(images, self.seed)
        wide = y.double()
        left = wide - y_hat.double()
        error = left.square().sum((1, 2)).cpu()  # (B,)
        residual = left.sum((1, 2)).cpu()
        mean = wide.mean(1)  # (B, d)
        spread = (wide - mean[:, None]).square().sum((1, 2)).cpu()
        mean = mean.cpu()
        given = y.mean(1).float().cpu()
        made = y_hat.mean(1).float().cpu()
        for i, number in enumerate(images.tolist()):
            b = int(block[i])
            own = Scatter(y.shape[1], mean[i], float(spread[i]))
            one = _Part(own, float(error[i]), float(residual[i]))
            self.parts[b] = _joined(self.parts[b], one)
            self.images[b] += 1
            self.means[number] = (given[i], made[i])

    def merge(self, other: Reconstruction) -> None:
        """Take in another's sums."""
        self.parts = [_joined(a, b) for a, b in zip(self.parts, other.parts)]
        self.images += other.images
        self.means |= other.means

    def _fvu(self, without: int | None = None) -> float:
        whole: _Part | None = None
        for b, part in enumerate(self.parts):
            if b != without:
                whole = _joined(whole, part)
        return float("nan") if whole is None else ratio(whole.error, whole.spread.squares)

    def fvu(self) -> Estimate:
        """Fraction of variance unexplained."""
        value = self._fvu()
        without = [self._fvu(b) for b in range(BLOCKS)]
        tokens = sum(part.spread.rows for part in self.parts if part is not None)
        low, high = interval(value, without, self.images.tolist())
        return Estimate(value, low, high, tokens, "tokens", {"explained": 1 - value})
