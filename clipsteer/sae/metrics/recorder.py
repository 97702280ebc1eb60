"""One pass over the images: what the metrics need of a stream of sparse codes.

Of a batch of images the codes are sorted by image, feature and place. Runs of one image and feature
are that feature's map; its largest value is kept (a row of ``PooledCodes`` an image), its sums go
to the metrics that look at maps. Nothing of images × features is ever built.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.ops._ragged import code_rows
from clipsteer.sae.encoding import Codes
from clipsteer.sae.metrics.localisation import Localisation, Maps
from clipsteer.sae.metrics.reconstruction import Reconstruction
from clipsteer.sae.metrics.stream import Grid


class PooledCodes(NamedTuple):
    """Of every image the features active in it, with their largest activation over its tokens."""

    images: Tensor  # (N,) int64, ascending
    rows: Tensor  # (m,) int64, the place in ``images`` of each code, ascending
    features: Tensor  # (m,) int64, ascending in a row
    values: Tensor  # (m,) float32, above 0
    d_sae: int

    def of_images(self, chosen: Tensor) -> PooledCodes:
        """Of the images that are chosen, (N,) bool."""
        offsets = torch.searchsorted(self.rows, torch.arange(len(chosen) + 1))
        counts = offsets.diff()[chosen]
        # codes of images in a row lie together: runs are copied, and nothing is looked up by code
        outside = chosen.new_zeros(1)
        edges = torch.cat([outside, chosen, outside]).int().diff().nonzero().flatten()
        runs = offsets[edges].view(-1, 2).tolist()

        def of_runs(x: Tensor) -> Tensor:
            return torch.cat([x[start:end] for start, end in runs]) if runs else x[:0]

        return PooledCodes(
            self.images[chosen],
            torch.arange(len(counts)).repeat_interleave(counts),
            of_runs(self.features),
            of_runs(self.values),
            self.d_sae,
        )

    def peaks(self) -> Tensor:
        """(d_sae,) each feature's largest activation, 0 where it is never active."""
        return torch.zeros(self.d_sae).scatter_reduce(0, self.features, self.values, "amax")

    def columns(self, features: Tensor) -> Tensor:
        """Dense (N, m) float32 of some features (m,), each once."""
        place = torch.full((self.d_sae,), -1)
        place[features] = torch.arange(len(features))
        column = place.index_select(0, self.features)
        kept = (column >= 0).nonzero().flatten()
        found = torch.zeros(len(self.images), len(features))
        found[self.rows[kept], column[kept]] = self.values[kept]
        return found


class Recorder:
    """What a stream of sparse codes leaves behind.

    Args:
        d_sae: number of features.
        maps: what looks at features' maps, by name; by default localisation as
            ``clipsteer.sae.metrics.localisation`` defines it.
        seed: of the images' blocks.
    """

    def __init__(
        self, d_sae: int, *, maps: dict[str, Localisation] | None = None, seed: int = 0
    ) -> None:
        self.d_sae = d_sae
        self.seed = seed
        self.maps = {"localisation": Localisation(d_sae, seed)} if maps is None else maps
        self.reconstruction = Reconstruction(seed)
        self.labels: dict[int, int] = {}
        self.tokens = 0
        self._pooled: PooledCodes | None = None
        self._images: list[Tensor] = []
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(
        self,
        codes: Codes,  # of B · T rows
        images: Tensor,  # (B,) int64
        *,
        grid: Grid | None = None,
        labels: Tensor | None = None,  # (B,) int64, -1 where there is none
        y: Tensor | None = None,  # (B, T, d), what was to be reconstructed
        y_hat: Tensor | None = None,  # (B, T, d), what was
    ) -> None:
        """Take in all tokens of some images, an image's rows one after the other.

        codes: (acts, indices) of (B · T, k) each, ``ops.SparseCodes``, or dense (B · T, d_sae).
        grid: where the patches are among an image's T tokens.

        Raises ValueError: an image that was there already, activations that are not finite, shapes
            that do not fit.
        """
        values, features, rows, count = flat_codes(codes, self.d_sae)
        B = len(images)
        if B == 0 or count % B or (grid is not None and grid.tokens * B != count):
            raise ValueError(
                f"Recorder.add: {count} rows of codes do not fit {B} images"
                + ("" if grid is None else f" of {grid.tokens} tokens ({grid})")
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError("Recorder.add: activations are not finite")
        numbers = images.cpu().long()
        known = set(numbers.tolist())
        if len(known) != B or known & self.labels.keys() or min(known) < 0:
            raise ValueError(
                "Recorder.add: images must have numbers from 0 up, each once; all tokens of an "
                "image come together"
            )
        of_each = torch.full((B,), -1) if labels is None else labels
        self.labels |= dict(zip(numbers.tolist(), of_each.tolist()))
        self.tokens += count
        T = count // B
        key = features + (rows // T) * self.d_sae
        key, order = torch.sort(key * T + rows % T)
        values = values[order]
        self._pool(key // T, values, numbers)
        if grid is not None and self.maps:
            for found in self.maps.values():
                found.add(Maps(key, values, numbers, self.d_sae, grid))
        if y is not None and y_hat is not None:
            self.reconstruction.add(y, y_hat, numbers)

    def _pool(self, key: Tensor, values: Tensor, images: Tensor) -> None:
        run, counts = torch.unique_consecutive(key, return_counts=True)
        starts = counts.cumsum(0) - counts
        each = torch.arange(len(run), device=key.device).repeat_interleave(counts)
        peaks = values[starts].scatter_reduce(0, each, values, "amax")
        rows = (run // self.d_sae).cpu()
        place = rows + sum(map(len, self._images))
        self._pooled = None
        self._images.append(images)
        self._parts.append((place, (run % self.d_sae).cpu(), peaks.float().cpu()))

    def merge(self, other: Recorder) -> None:
        """Take in what another process has seen, of other images.

        Raises ValueError where both saw the same image, or were made differently.
        """
        kinds = [(r.d_sae, r.seed, r.maps.keys()) for r in (self, other)]
        if kinds[0] != kinds[1]:
            raise ValueError("Recorder.merge: the two are not of one kind")
        if both := self.labels.keys() & other.labels.keys():
            raise ValueError(f"Recorder.merge: both have seen image {min(both)}")
        offset = sum(map(len, self._images))
        self._pooled = None
        self._images += other._images
        self._parts += [(rows + offset, f, v) for rows, f, v in other._parts]
        self.labels |= other.labels
        self.tokens += other.tokens
        for name, found in self.maps.items():
            found.merge(other.maps[name])
        self.reconstruction.merge(other.reconstruction)

    def pooled(self) -> PooledCodes:
        """The codes of all images, by number."""
        if self._pooled is not None:
            return self._pooled
        if not self._images:
            raise ValueError("Recorder: no image was seen")
        images, order = torch.cat(self._images).sort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        rows, features, values = (torch.cat(parts) for parts in zip(*self._parts))
        rows, order = torch.sort(place[rows], stable=True)
        self._pooled = PooledCodes(images, rows, features[order], values[order], self.d_sae)
        return self._pooled


def flat_codes(codes: Codes, d_sae: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Active codes as values, features and rows (m,), and how many rows there are."""
    if isinstance(codes, ops.SparseCodes):
        values, features = codes.values, codes.indices
        count = codes.offsets.shape[0] - 1
        rows = code_rows(codes)
        if bool(codes.overflowed):
            raise ValueError("Recorder.add: codes are missing (SparseCodes.overflowed)")
        there = rows < count  # padding is not
        values, features, rows = values[there], features[there], rows[there]
    elif isinstance(codes, Tensor):
        if codes.ndim != 2 or codes.shape[1] != d_sae:
            raise ValueError(
                f"Recorder.add: expected dense codes (rows, {d_sae}), got {tuple(codes.shape)}"
            )
        count = len(codes)
        rows, features = codes.nonzero(as_tuple=True)
        values = codes[rows, features]
    else:
        acts, indices = codes
        if acts.ndim != 2 or acts.shape != indices.shape:
            shapes = f"{tuple(acts.shape)} and {tuple(indices.shape)}"
            raise ValueError(f"Recorder.add: expected (rows, k) acts and indices, got {shapes}")
        count = len(acts)
        rows = torch.arange(count, device=acts.device).repeat_interleave(acts.shape[1])
        values, features = acts.flatten(), indices.flatten()
    active = (values > 0) | ~torch.isfinite(values)
    return values[active], features[active], rows[active], count
