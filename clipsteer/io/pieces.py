"""Tensors that no process holds as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class InPieces(Protocol):
    """A tensor that is written piece by piece, as it need not be in memory as a whole."""

    @property
    def dtype(self) -> torch.dtype:
        """As a tensor's."""

    @property
    def shape(self) -> Sequence[int]:
        """As a tensor's."""

    @property
    def layout(self) -> torch.layout:
        """As a tensor's."""

    def pieces(self) -> Iterable[Tensor]:
        """Its rows in order, some at a time."""
