"""How far rows are spread about their mean, joined part by part."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scatter(NamedTuple):
    """Of some rows."""

    rows: int
    mean: Tensor  # (d,) float64
    squares: float  # Σ ‖row - mean‖²

    def joined(self, other: Scatter) -> Scatter:
        """That of both. Chan, Golub and LeVeque's update: nothing cancels, whatever the mean."""
        total = self.rows + other.rows
        delta = other.mean - self.mean
        apart = float(delta.square().sum()) * self.rows * other.rows / total
        mean = self.mean + delta * (other.rows / total)
        return Scatter(total, mean, self.squares + (other.squares + apart))
