"""Tokens of images as they come: from a tensor, a store of activations, or a tower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import image_batches
from clipsteer.sae.activations import ActivationStore
from clipsteer.sae.model import SAE
from clipsteer.sae.site import Looks, find_site, find_target, grid_side

# tokens of a batch, about
_TOKENS = 4096


class Grid(NamedTuple):
    """Where an image's patches are among its tokens."""

    height: int
    width: int
    prefix: int = 0  # class and register tokens before the patches

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.prefix + self.height * self.width


class ImageTokens(NamedTuple):
    """All tokens of some images."""

    x: Tensor  # (B, T, d_in)
    images: Tensor  # (B,) int64, the images' numbers
    labels: Tensor | None = None  # (B,) int64, -1 where there is none
    y: Tensor | None = None  # (B, T, d_out), what a transcoder is to give
    # where the patches are; None where the tokens form no grid, or nobody says
    grid: Grid | None = None


def grid_of(tokens: int, prefix: int = 0) -> Grid | None:
    """The square grid behind ``prefix`` of an image's tokens; None where there is none."""
    side = grid_side(tokens - prefix) if tokens > prefix else 0
    return Grid(side, side, prefix) if side else None


def from_tower(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    *,
    hook_point: str | None = None,
    tokens: str | None = None,
    target_hook_point: str | None = None,
    batch_size: int = 16,
) -> Iterator[ImageTokens]:
    """The tokens that an SAE is for, of a map-style data set of images or (image, label) pairs;
    arguments as ``evaluate_sae`` has them. With a progress bar."""
    site = find_site(sae, clip, hook_point, tokens)
    target = find_target(sae, clip, site, target_hook_point)
    look = Looks(clip, site, target)
    seen = 0
    for pixels, labels in image_batches(clip, dataset, batch_size, "metrics"):
        with evaluating(clip):
            x, y = look(pixels)
        rows = site.select(x)
        images = torch.arange(seen, seen + len(rows))
        seen += len(rows)
        count = rows.shape[1]
        patches = site.patches(torch.empty(count)).shape[0]
        grid = grid_of(count, count - patches)
        wanted = None if sae.d_out is None else target.select(y)
        yield ImageTokens(rows, images, labels.cpu(), wanted, grid)


def streamed(source: Any, prefix: int = 0) -> Iterator[ImageTokens]:
    """``source`` batch by batch.

    source: tokens (N, T, d) of N images; an ``ActivationStore`` in whose order images are numbered;
        or an iterable of ``ImageTokens``.
    prefix: class and register tokens of a tensor or a store.

    Raises TypeError, ValueError: anything else.
    """
    if isinstance(source, ActivationStore):
        yield from _of_store(source, prefix)
    elif isinstance(source, Tensor):
        if source.ndim != 3 or not source.is_floating_point():
            raise ValueError(
                f"source: expected tokens (images, tokens, d) of floating numbers, got "
                f"{source.dtype} {tuple(source.shape)}"
            )
        yield from _of_tensor(source, 0, prefix)
    elif isinstance(source, Iterable) and not isinstance(source, (str, bytes, dict)):
        for part in source:
            if not isinstance(part, ImageTokens):
                raise TypeError(f"source: expected ImageTokens, got one of {type(part).__name__}")
            yield part
    else:
        raise TypeError(
            f"source: expected tokens (images, tokens, d), an ActivationStore, or an iterable of "
            f"ImageTokens, got {type(source).__name__}"
        )


def _of_tensor(tokens: Tensor, first: int, prefix: int) -> Iterator[ImageTokens]:
    n, count, _ = tokens.shape
    grid = grid_of(count, prefix)
    step = max(1, _TOKENS // count)
    for at in range(0, n, step):
        part = tokens[at : at + step]
        numbers = torch.arange(first + at, first + at + len(part))
        yield ImageTokens(part.float(), numbers, grid=grid)


def _of_store(store: ActivationStore, prefix: int) -> Iterator[ImageTokens]:
    count = store.metadata["tokens_per_image"]
    first = 0
    for shard in range(len(store.shards)):
        rows = store.read_shard(shard)
        yield from _of_tensor(rows.unflatten(0, (-1, count)), first, prefix)
        first += len(rows) // count
