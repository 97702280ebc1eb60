"""One pass over the images: sparse codes, embeddings, thumbnails, and what removing features does.

Images are seen ``IMAGE_SHARD`` at a time, and each such group is kept in a file of the work folder:
a build that was stopped goes on behind the last one, and gives the same bits, as a group is always
the same batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.browse.cost import Budget
from clipsteer.browse.explained import Explained
from clipsteer.browse.files import Folder
from clipsteer.browse.thumbs import thumbnail
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.pixels import as_pixels, image_of
from clipsteer.data.dataset import spread
from clipsteer.io.files import read_safetensors, write_safetensors
from clipsteer.sae.metrics.recorder import flat_codes
from clipsteer.sae.model import SAE
from clipsteer.sae.site import (
    Looks,
    chunks,
    clean_passes,
    from_site,
    grid_side,
)

IMAGE_SHARD = 64
# of each image's features, the strongest, that are removed one by one
REMOVED = 8
_NAME_BYTES = 6


class SparseRows(NamedTuple):
    """Active features of rows, one row after the other."""

    counts: Tensor  # (rows,) int64
    features: Tensor  # (m,) int64
    acts: Tensor  # (m,) float32, above 0


class Seen(NamedTuple):
    """What is kept of some images, n of T tokens each."""

    codes: SparseRows  # of n · T rows
    embeddings: Tensor  # (n, e), unit rows
    rows: Tensor  # (r,) which of the n images have features removed
    removed: Tensor  # (r, REMOVED) int64, those features, -1 where there are fewer
    without: Tensor  # (r, REMOVED, e) embeddings without each of them


class Facts(NamedTuple):
    """What is the same for every image."""

    tokens: int  # that are encoded
    prefix: int  # of them, before the patches
    grid: tuple[int, int] | None  # (h, w) of patches


@torch.no_grad()
def sparse_rows(sae: SAE, x: Tensor) -> SparseRows:
    """Codes of rows (N, d_in) that are active; nothing of N × d_sae is built."""
    parts = []
    for part in chunks(sae, x):
        codes = sae.codes(sae._centred(part)[0])
        acts, features, rows, count = flat_codes(codes, sae.d_sae)
        parts.append((torch.bincount(rows, minlength=count), features, acts.float()))
    counts, features, acts = (torch.cat(found).cpu() for found in zip(*parts))
    return SparseRows(counts, features, acts)


def facts_of(explained: Explained, dataset: Any) -> Facts:
    """By the first image. Raises ValueError where the SAE does not fit what is there."""
    clip, site, target = explained.clip, explained.site, explained.target
    pixels = as_pixels(image_of(dataset[0]), clip.preprocess)[None]
    with evaluating(clip):
        x, y = Looks(clip, site, target)(pixels.to(clip.device, clip.dtype))
    tokens = site.select(x).shape[1]
    given = target.select(y).shape[1]
    if given != tokens:
        raise ValueError(
            f"target_hook_point: images give {tokens} tokens at the hook point and {given} at the "
            "target"
        )
    patches = site.patches(torch.empty(tokens)).shape[0]
    return Facts(tokens, tokens - patches, _grid(patches, pixels.shape[2:]))


class Survey:
    """All images of a data set as an SAE sees them.

    Args:
        name: of the survey's files in the work folder.
        thumbs: also make thumbnails.
        budget: for removing features; None removes none.
    """

    def __init__(
        self,
        explained: Explained,
        dataset: Any,
        folder: Folder,
        name: str,
        *,
        thumbs: bool,
        budget: Budget | None,
    ) -> None:
        self.explained = explained
        self.dataset = dataset
        self.folder = folder
        self.name = name
        self.thumbs = thumbs
        self.images = len(dataset)
        self.shards = -(-self.images // IMAGE_SHARD)
        self.facts = facts_of(explained, dataset)
        self.removing: frozenset[int] = frozenset()
        if budget is not None:
            affordable = budget.passes(explained, self.facts.tokens) // REMOVED
            self.removing = frozenset(spread(range(self.images), affordable))

    @property
    def sae(self) -> SAE:
        """The autoencoder, or transcoder."""
        return self.explained.sae

    def _path(self, shard: int) -> Path:
        return self.folder.work / f"{self.name}-{shard:06d}.safetensors"

    def run(self) -> None:
        """Look at every image that was not looked at."""
        todo = [shard for shard in range(self.shards) if not self._path(shard).exists()]
        with tqdm(
            total=self.images, desc=f"look at images ({self.name})", unit="image", disable=None
        ) as bar:
            bar.update(self.images - sum(len(self.span(shard)) for shard in todo))
            for shard in todo:
                self._look(shard)
                bar.update(len(self.span(shard)))

    def span(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * IMAGE_SHARD, min((shard + 1) * IMAGE_SHARD, self.images))

    def _look(self, shard: int) -> None:
        clip = self.explained.clip
        pixels = []
        names = []
        for row in self.span(shard):
            image = image_of(self.dataset[row])
            pixels.append(as_pixels(image, clip.preprocess))
            if self.thumbs:
                content = thumbnail(image, clip.preprocess, pixels[-1])
                digest = hashlib.sha256(content).digest()[:_NAME_BYTES]
                names.append(list(digest))
                path = self.folder.thumbs / f"{digest.hex()}.webp"
                if not path.exists():
                    self.folder.write(path, content)
        if len(shapes := {tuple(part.shape) for part in pixels}) > 1:
            raise ValueError(f"dataset: images must have one size, got {sorted(shapes)}")
        found = self._encode(torch.stack(pixels).to(clip.device, clip.dtype), self.span(shard))
        tensors = {
            "counts": found.codes.counts.int(),
            "features": found.codes.features.int(),
            "acts": found.codes.acts,
            "embeddings": found.embeddings,
            "rows": found.rows.int(),
            "removed": found.removed.int(),
            "without": found.without,
            "names": torch.tensor(names, dtype=torch.uint8).reshape(-1, _NAME_BYTES),
        }
        write_safetensors(self._path(shard), tensors)

    def _encode(
        self,
        pixels: Tensor,  # (n, 3, H, W)
        span: range,
    ) -> Seen:
        explained = self.explained
        clip, site, target = explained.clip, explained.site, explained.target
        with evaluating(self.sae, clip):
            x, y, embedded = clean_passes(clip, pixels, site, target)
            rows = site.select(x)
            if rows.shape[1] != self.facts.tokens:
                raise ValueError(
                    f"dataset: images give {self.facts.tokens} and {rows.shape[1]} tokens; all "
                    "must have one size"
                )
            flat = rows.flatten(0, 1)
            codes = sparse_rows(self.sae, flat)
            if not bool(codes.acts.isfinite().all()):
                raise ValueError(
                    f"the SAE's activations at {site.hook_point!r} are not finite on images "
                    f"{span.start} to {span.stop - 1}"
                )
            chosen = torch.tensor([i for i, row in enumerate(span) if row in self.removing])
            chosen = chosen.long()
            strongest = self._strongest(codes, len(span))[chosen]
            without = embedded.new_zeros(len(chosen), REMOVED, embedded.shape[1])
            if len(chosen):
                go_on = from_site(clip, pixels[chosen], target, y[chosen], embedded[chosen])
                given = self._given(codes, rows, chosen, strongest)
                for place, part in enumerate(given):
                    new = (target.select(y[chosen]) - part).to(y.dtype)
                    without[:, place] = go_on(target.put(y[chosen], new))
        return Seen(codes, embedded.float().cpu(), chosen, strongest, without.float().cpu())

    def _strongest(self, codes: SparseRows, images: int) -> Tensor:  # (images, REMOVED)
        """The features that give most to each image's reconstruction: Σ over tokens of activation
        times length of the direction; -1 where there are fewer."""
        sae = self.sae
        lengths = sae.W_dec.detach().float().norm(dim=1).cpu()
        row = torch.arange(images).repeat_interleave(self.facts.tokens)
        row = row.repeat_interleave(codes.counts)
        found = torch.full((images, REMOVED), -1)
        ends = torch.bincount(row, minlength=images).cumsum(0).tolist()
        for image, (begin, end) in enumerate(zip([0, *ends], ends)):
            features, place = codes.features[begin:end].unique(return_inverse=True)
            given = codes.acts[begin:end] * lengths[codes.features[begin:end]]
            total = torch.zeros(len(features)).index_add_(0, place, given)
            order = total.argsort(descending=True, stable=True)[:REMOVED]
            found[image, : len(order)] = features[order]
        return found

    def _given(
        self,
        codes: SparseRows,  # of n · T rows
        rows: Tensor,  # (n, T, d_in)
        chosen: Tensor,  # (r,) images
        features: Tensor,  # (r, REMOVED), -1 for none
    ) -> Iterator[Tensor]:
        """What one feature of each image adds to the tokens, (r, T, d): REMOVED times."""
        sae = self.sae
        n, tokens, _ = rows.shape
        scale = sae.normalize_input(rows)[1].scale
        of_token = torch.arange(n * tokens).repeat_interleave(codes.counts)
        for column in features.T:  # (r,)
            wanted = torch.full((n,), -1).index_copy_(0, chosen, column)
            there = wanted[of_token // tokens] == codes.features
            acts = torch.zeros(n * tokens).index_copy_(0, of_token[there], codes.acts[there])
            acts = acts.reshape(n, tokens, 1)[chosen].to(sae.W_dec)
            added = acts * sae.W_dec[column.clamp_min(0).to(rows.device)][:, None]
            yield added if scale is None else added * scale[chosen]

    def seen(self, shard: int) -> dict[str, Tensor]:
        """What is kept of a shard's images, as it was written."""
        return read_safetensors(self._path(shard))

    def each(self) -> Iterator[dict[str, Tensor]]:
        """``seen`` of every shard."""
        return map(self.seen, range(self.shards))

    def column(self, name: str) -> Tensor:
        """One of the tensors that have a row an image, of all images."""
        return torch.cat([found[name] for found in self.each()])


def _grid(
    patches: int,
    size: tuple[int, int] | torch.Size,  # (H, W) of the pixels
) -> tuple[int, int] | None:
    """The grid of patches, square or of the shape of the pixels; None where they form none."""
    side = grid_side(patches)
    if side:
        return side, side
    height = round((patches * size[0] / size[1]) ** 0.5)
    if height > 1 and patches % height == 0 and patches // height > 1:
        return height, patches // height
    return None
