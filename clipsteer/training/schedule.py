"""Learning rate, order of the samples and seeds of a training run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# which sample a step sees, and what is drawn in it; a run goes on only in the order it began in
DATA_ORDER = 2


def seed_of(*parts: int | str) -> int:
    """One seed for torch from several parts, unlike for any two lists of them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def cosine_lr(step: int, total: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of step 0 … total-1: linear warm-up, at most a tenth of the run, then half a
    cosine."""
    warmup = min(warmup_steps, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Order:
    """Rows of a data set, step by step: each epoch is a permutation that the seed and its number
    determine."""

    def __init__(self, n: int, batch_size: int, seed: int, *, drop_last: bool = False) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = n // batch_size if drop_last else math.ceil(n / batch_size)
        self._epoch = lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return torch.randperm(self.n, generator=generator)

    def rows(self, step: int) -> list[int]:
        """The rows of a step."""
        epoch, at = divmod(step, self.per_epoch)
        return self._epoch(epoch)[at * self.batch_size : (at + 1) * self.batch_size].tolist()

    def keys(self, step: int) -> list[tuple[int, int]]:
        """(row, seed) pairs; the seed is the sample's own in this step."""
        return [(row, seed_of(self.seed, "sample", step, row)) for row in self.rows(step)]


class Keys:
    """A batch sampler that is an iterator of known length, not a list of all batches of a run."""

    def __init__(self, batches: Iterator[list[tuple[int, int]]], length: int) -> None:
        self.batches = batches
        self.length = length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches

    def __len__(self) -> int:
        return self.length
