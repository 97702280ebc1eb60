"""A few pictures on which features are set to strengths, and what that does to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipsteer.browse.explained import Explained
from clipsteer.browse.survey import sparse_rows
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.pixels import as_pixels, image_of
from clipsteer.sae.site import clean_passes, from_site, set_features

# pictures that pass at once
_BATCH = 256


class Probes:
    """Some pictures, seen once up to the hook point.

    Args:
        pixels: (P, 3, H, W), preprocessed, on the model's device.
    """

    def __init__(self, explained: Explained, pixels: Tensor) -> None:
        self.explained = explained
        self.pixels = pixels
        clip, site, target = explained.clip, explained.site, explained.target
        sae = explained.sae
        with evaluating(sae, clip):
            x, self._y, self._embedded = clean_passes(clip, pixels, site, target)
            rows = site.select(x)
            self._written = target.select(self._y)
            scale = sae.normalize_input(rows)[1].scale
            self._scale = torch.ones_like(self._written[..., :1]) if scale is None else scale
            codes = sparse_rows(sae, rows.flatten(0, 1))
        self._row = torch.arange(len(codes.counts)).repeat_interleave(codes.counts)
        self._codes = codes
        self._tails: dict[int, Callable[[Tensor], Tensor]] = {}

    @classmethod
    def of(cls, explained: Explained, dataset: Any, rows: Sequence[int]) -> Probes:
        """Images of a data set."""
        clip = explained.clip
        images = (image_of(dataset[row]) for row in rows)
        pixels = torch.stack([as_pixels(image, clip.preprocess) for image in images])
        return cls(explained, pixels.to(clip.device, clip.dtype))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def embeddings(self) -> Tensor:  # (P, e)
        """Of the pictures as they are."""
        return self._embedded

    def _acts(self, features: Sequence[int]) -> Tensor:  # (P, T, m)
        images, tokens, _ = self._written.shape
        acts = torch.zeros(images * tokens, len(features))
        for place, feature in enumerate(features):
            there = self._codes.features == feature
            acts[self._row[there], place] = self._codes.acts[there]
        return acts.reshape(images, tokens, len(features)).to(self._written)

    @torch.no_grad()
    def set(
        self,
        features: Sequence[int],
        strengths: Tensor,  # (m, s)
    ) -> Tensor:  # (m, s, P, e)
        """Embeddings with each of m features, one at a time, set to each of s strengths on every
        token that the SAE is for."""
        explained = self.explained
        sae, target = explained.sae, explained.target
        acts = self._acts(features)
        m, s = strengths.shape
        images = len(self)
        jobs = [(i, j) for i in range(m) for j in range(s)]
        step = max(1, _BATCH // images)
        found = []
        with evaluating(sae, explained.clip):
            for at in range(0, len(jobs), step):
                part = jobs[at : at + step]
                new = []
                for i, j in part:
                    wanted = strengths[i, j : j + 1].to(acts)
                    one = sae.W_dec[features[i]][None].to(acts)
                    moved = set_features(
                        self._written, acts[..., i : i + 1], wanted, one, self._scale
                    )
                    new.append(target.put(self._y, moved.to(self._y.dtype)))
                found.append(self._tail(len(part))(torch.cat(new)).float())
        return torch.cat(found).reshape(m, s, images, -1)

    def _tail(self, copies: int) -> Callable[[Tensor], Tensor]:
        """What follows the hook point, for so many copies of the pictures."""
        if copies not in self._tails:
            self._tails[copies] = from_site(
                self.explained.clip,
                self.pixels.repeat(copies, 1, 1, 1),
                self.explained.target,
                self._y.repeat(copies, 1, 1),
                self._embedded.repeat(copies, 1),
            )
        return self._tails[copies]

    def jacobian(self) -> Tensor:  # (e, d)
        """How the mean unit embedding moves with a vector that is added to every token: the mean
        over the pictures of Σ over tokens of ∂embedding / ∂token. Nothing of the model is left
        out."""
        explained = self.explained
        target = explained.target
        with evaluating(explained.clip):
            go_on = self._tail(1)
        with torch.enable_grad():
            added = torch.zeros(self._written.shape[-1], device=self._y.device).requires_grad_()
            new = self._written + (added * self._scale).to(self._y.dtype)
            mean = go_on(target.put(self._y, new)).float().mean(0)
            rows = []
            for part in mean:
                (row,) = torch.autograd.grad(part, added, retain_graph=True)
                rows.append(row)
        return torch.stack(rows)
