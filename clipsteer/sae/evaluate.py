"""What an SAE preserves of a CLIP model: variance explained, sparsity, and zero-shot predictions
under substitution. Of a transcoder the output of the module that it stands in for.

Everything streams over a data set, one batch of images at a time. Definitions follow Joseph et al.
2025 (arXiv 2504.08729): EV = mean over tokens of 1 - ‖x̂ - x‖² / ‖x - mean_batch x‖²; CE recovered
= (CE_zero - CE_sae) / (CE_zero - CE_clean), with logits 100 · cosine and prompt templates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import image_batches
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.dataset import told_apart
from clipsteer.sae.features import (
    FeatureStatistics,
    Steerability,
    TopImages,
    feature_statistics,
    name_features,
    steerability,
    top_images,
)
from clipsteer.sae.judges import Probes, ZeroShot, ratio
from clipsteer.sae.model import SAE, SAEOutput
from clipsteer.sae.scatter import Scatter
from clipsteer.sae.site import (
    Looks,
    Site,
    chunks,
    clean_passes,
    find_site,
    find_target,
    from_site,
    grid_side,
)

__all__ = [
    "FeatureStatistics",
    "Steerability",
    "TopImages",
    "evaluate_sae",
    "feature_statistics",
    "name_features",
    "steerability",
    "top_images",
]


def evaluate_sae(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    *,
    hook_point: str | None = None,
    tokens: str | None = None,
    target_hook_point: str | None = None,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Metrics of an SAE over a map-style data set of images or (image, label) pairs, as plain
    JSON-able values.

    Args:
        hook_point, tokens: by default what the SAE's metadata say.
        target_hook_point: of a transcoder, the module whose output it gives; likewise.
        classnames, templates: classes that integer labels index; by default those of
            ``dataset.classes``. Without two classes, or with captions as labels, the substitution
            metrics are left out.
        batch_size: images a batch. EV is centred on the batch's mean, so it depends on this; FVU
            does not.

    Returns a dict with
        ev, fvu, l0, dead (share of features never active), images, tokens; fvu_N of each prefix of
        N features before the last, where the SAE has some; of a transcoder ev and fvu are at the
        target, and so is what is replaced;
        l0_per_token: one value a token position; l0_map: the same over the patch grid, row by row,
        if square; ce_clean, ce_sae, ce_zero (nats), ce_recovered, and top1_clean, top1_sae,
        top1_zero, top1_recovered. Of a model without a text tower knn_* and linear_* instead, the
        accuracy of probes of its embeddings, five-fold over probed_images (see
        ``clipsteer.sae.judges.Probes``). A ratio whose denominator is 0 is None, and so is ev where
        a batch has no variance.
    """
    site = find_site(sae, clip, hook_point, tokens)
    target = find_target(sae, clip, site, target_hook_point)
    if classnames is None:
        classnames = told_apart(dataset)
    judge: ZeroShot | Probes | None = None
    if classnames and clip.has_text:
        judge = ZeroShot(zero_shot_head(clip, classnames, templates))
    elif classnames:
        judge = Probes(len(classnames))
    totals = _Totals(sae)
    look = Looks(clip, site, target)
    with evaluating(sae, clip):
        for pixels, labels in image_batches(clip, dataset, batch_size, "evaluate SAE"):
            known = labels >= 0
            if judge is None or not bool(known.any()):
                x, y = look(pixels)
                totals.add(site.select(x), target.select(y))
                continue
            judge.check(labels)
            x, y, embedded = clean_passes(clip, pixels, site, target)
            wanted = target.select(y)
            y_hat = totals.add(site.select(x), wanted)
            replaced = target.put(y, y_hat.to(y.dtype))
            zeroed = target.put(y, torch.zeros_like(wanted))
            go_on = from_site(clip, pixels, target, y, embedded)
            variants = {"clean": embedded, "sae": go_on(replaced), "zero": go_on(zeroed)}
            judge.add({name: e[known] for name, e in variants.items()}, labels[known])
    result = totals.result(site, target)
    return result if judge is None else result | judge.result()


class _Totals:
    """Running sums over batches of tokens (B, T, d), in float64."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.images = 0
        self.explained = self.error = 0.0
        # of the prefixes before the last
        self.errors = dict.fromkeys((sae.matryoshka or ())[:-1], 0.0)
        self.spread: Scatter | None = None
        self.l0: Tensor | None = None
        self.active = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)

    def add(
        self,
        x: Tensor,  # (B, T, d_in)
        y: Tensor,  # what is to be given, (B, T, d)
    ) -> Tensor:  # (B, T, d)
        """Take in one batch; returns what the SAE gives."""
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"target_hook_point: images give {x.shape[1]} tokens at the hook point and "
                f"{y.shape[1]} at the target"
            )
        images, positions, d = y.shape
        rows = y.reshape(-1, d)
        parts = []
        l0 = []
        seen = 0
        for part in chunks(self.sae, x.reshape(-1, x.shape[-1])):
            out = self.sae(part)
            self._add_prefixes(part, out, rows[seen : seen + len(part)])
            seen += len(part)
            on = out.acts > 0
            parts.append(out.x_hat)
            l0.append(on.sum(-1))
            if out.indices is None:
                self.active |= on.any(0)
            else:
                self.active[out.indices[on]] = True
        x_hat = torch.cat(parts)
        wide = rows.double()
        error = (x_hat.double() - wide).square().sum(-1)  # (N,)
        mean = wide.mean(0)
        spread = (wide - mean).square().sum(-1)
        explained = torch.where(error == 0, 1.0, 1 - error / spread)
        self.explained += float(explained.sum())
        self.error += float(error.sum())
        here = Scatter(len(rows), mean, float(spread.sum()))
        self.spread = here if self.spread is None else self.spread.joined(here)
        per_position = torch.cat(l0).reshape(images, positions).double().sum(0)
        if self.l0 is not None and len(self.l0) != positions:
            raise ValueError(
                f"dataset: images give {len(self.l0)} and {positions} tokens; all must have one "
                f"size"
            )
        self.l0 = per_position if self.l0 is None else self.l0 + per_position
        self.images += images
        return x_hat.reshape(y.shape)

    def _add_prefixes(
        self,
        x: Tensor,  # (N, d_in)
        out: SAEOutput,
        wanted: Tensor,  # (N, d)
    ) -> None:
        if not self.errors:
            return
        codes = out.acts if out.indices is None else (out.acts, out.indices)
        x_hats = self.sae.decode_prefixes(codes, out.stats)
        for prefix, x_hat in zip(self.errors, x_hats):
            error = self.sae.with_skip(x_hat, x).double() - wanted.double()
            self.errors[prefix] += float(error.square().sum())

    def result(self, site: Site, target: Site) -> dict[str, Any]:
        assert self.l0 is not None
        assert self.spread is not None
        tokens = self.spread.rows
        squares = self.spread.squares
        per_token = (self.l0 / self.images).tolist()
        result: dict[str, Any] = {
            "hook_point": site.hook_point,
            "token_kind": site.tokens,
            "images": self.images,
            "tokens": tokens,
            "ev": self.explained / tokens if math.isfinite(self.explained) else None,
            "fvu": ratio(self.error, squares),
            "l0": float(self.l0.sum()) / tokens,
            "dead": 1 - int(self.active.sum()) / self.sae.d_sae,
            "l0_per_token": per_token,
        }
        if self.sae.d_out is not None:
            result["target_hook_point"] = target.hook_point
        result |= {f"fvu_{n}": ratio(error, squares) for n, error in self.errors.items()}
        patches = site.patches(self.l0 / self.images).tolist()
        side = grid_side(len(patches))
        if side:
            result["l0_map"] = [patches[row * side : (row + 1) * side] for row in range(side)]
        return result
