"""What the features of an SAE do in a CLIP model: how often they fire, on which images and where,
what they steer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP
from clipsteer.clip.pixels import image_batches, image_embeddings
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.sae.model import SAE
from clipsteer.sae.site import (
    BLOCK,
    LOGIT_SCALE,
    Looks,
    chunks,
    clean_passes,
    find_site,
    find_target,
    from_site,
    grid_side,
    set_features,
)

if TYPE_CHECKING:
    from clipsteer.splice.dictionary import ConceptDictionary

# features whose activations are held at once while steering
_FEATURES = 256


class FeatureStatistics(NamedTuple):
    """Per feature, over all tokens evaluated: share of tokens on which it is active, mean and
    largest activation."""

    frequency: Tensor  # (d_sae,) float64
    mean: Tensor  # (d_sae,) float64, over all tokens
    maximum: Tensor  # (d_sae,)


class TopImages(NamedTuple):
    """The images on which features are most active, strongest first; unused places have image -1
    and activation 0."""

    features: Tensor  # (m,) int64
    images: Tensor  # (m, count) int64, index into the data set
    activations: Tensor  # (m, count), largest activation over the image's tokens
    # (m, count, h, w) over the patch grid; (m, count, 1, tokens) where there is no square grid
    maps: Tensor


class Steerability(NamedTuple):
    """Per feature S = Σ_c Δ_c², power = max_c Δ_c and its concept; Δ is the mean change in
    probability."""

    features: Tensor  # (m,) int64
    score: Tensor  # (m,)
    power: Tensor  # (m,)
    concept: Tensor  # (m,) int64, row of the vocabulary with the largest Δ
    change: Tensor  # (m, C) Δ
    share: float  # of the features, with S above the threshold


def _checked(sae: SAE, features: Sequence[int] | Tensor | None) -> Tensor:
    if features is None:
        return torch.arange(sae.d_sae, device=sae.W_enc.device)
    chosen = torch.as_tensor(features, dtype=torch.int64, device=sae.W_enc.device)
    if chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(
            f"features: expected a non-empty list of feature indices, got shape "
            f"{tuple(chosen.shape)}"
        )
    if int(chosen.min()) < 0 or int(chosen.max()) >= sae.d_sae:
        raise ValueError(f"features: expected indices in [0, d_sae = {sae.d_sae}), got {features}")
    if len(chosen.unique()) != len(chosen):
        raise ValueError("features: an index occurs twice")
    return chosen


def _selected_acts(sae: SAE, x: Tensor, features: Tensor) -> Tensor:
    """Activations (..., m) of some features; topk is encoded once, whatever m."""
    if sae.architecture != "topk":
        return sae.feature_acts(x, features)[0]
    acts, indices = sae.encode_topk(x)  # (..., k)
    m = len(features)
    slot = torch.full((sae.d_sae,), m, device=x.device)
    slot[features] = torch.arange(m, device=x.device)
    # what is not selected lands in a spare last column
    return acts.new_zeros(*acts.shape[:-1], m + 1).scatter_add(-1, slot[indices], acts)[..., :m]


@torch.no_grad()
def feature_peaks(sae: SAE, tokens: Tensor) -> Tensor:
    """Largest activation of every feature on every image: tokens (N, T, d) -> (N, d_sae), on the
    CPU in float32."""
    every = torch.arange(sae.d_sae, device=sae.W_enc.device)
    parts = tokens.split(max(1, BLOCK // (tokens.shape[1] * sae.d_sae)))
    bar = tqdm(parts, desc="encode tokens", disable=None)
    return torch.cat(
        [_selected_acts(sae, part.to(every.device), every).amax(1).float().cpu() for part in bar]
    )


def feature_statistics(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    *,
    hook_point: str | None = None,
    tokens: str | None = None,
    batch_size: int = 64,
) -> FeatureStatistics:
    """How often and how strongly every feature is active over the tokens of a data set's images."""
    site = find_site(sae, clip, hook_point, tokens)
    device = sae.W_enc.device
    count = 0
    hits = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    total = torch.zeros(sae.d_sae, dtype=torch.float64, device=device)
    largest = torch.zeros(sae.d_sae, dtype=sae.W_enc.dtype, device=device)
    look = Looks(clip, site)
    with evaluating(sae, clip):
        for pixels, _ in image_batches(clip, dataset, batch_size, "feature statistics"):
            x = site.select(look(pixels)[0])
            for part in chunks(sae, x.reshape(-1, x.shape[-1])):
                acts = sae.encode(part)  # (N, d_sae)
                count += len(part)
                hits += (acts > 0).sum(0)
                total += acts.sum(0, dtype=torch.float64)
                largest = torch.maximum(largest, acts.amax(0))
    return FeatureStatistics(hits.double() / count, total / count, largest)


def top_images(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    features: Sequence[int] | Tensor,
    *,
    count: int = 9,
    hook_point: str | None = None,
    tokens: str | None = None,
    batch_size: int = 64,
) -> TopImages:
    """The `count` images that activate each of m features most, with the feature's activation over
    the patches.

    Of equal activations the earlier image comes first. Holds m · (count + batch_size) · tokens
    activations.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    site = find_site(sae, clip, hook_point, tokens)
    chosen = _checked(sae, features)
    best = images = maps = torch.empty(0)
    seen = 0
    look = Looks(clip, site)
    with evaluating(sae, clip):
        for pixels, _ in image_batches(clip, dataset, batch_size, "top images"):
            x = site.select(look(pixels)[0])
            acts = _selected_acts(sae, x, chosen).permute(2, 0, 1)  # (m, B, T)
            if seen == 0:
                best = acts.new_zeros(len(chosen), count)
                images = torch.full((len(chosen), count), -1, device=acts.device)
                maps = acts.new_zeros(len(chosen), count, acts.shape[-1])
            here = torch.arange(seen, seen + len(pixels), device=acts.device)
            both = torch.cat([best, acts.amax(-1)], 1)  # (m, count + B)
            order = both.argsort(dim=1, descending=True, stable=True)[:, :count]
            best = both.gather(1, order)
            images = torch.cat([images, here.expand(len(chosen), -1)], 1).gather(1, order)
            every = order[..., None].expand(-1, -1, acts.shape[-1])
            maps = torch.cat([maps, acts], 1).gather(1, every)
            seen += len(pixels)
    assert seen > 0
    patches = site.patches(maps)
    side = grid_side(patches.shape[-1])
    if side:
        maps = patches.unflatten(-1, (side, side))
    else:
        maps = (patches if patches.shape[-1] else maps).unflatten(-1, (1, -1))
    return TopImages(chosen, images, best, maps)


def name_features(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    dictionary: ConceptDictionary,
    features: Sequence[int] | Tensor,
    *,
    images: int = 6,
    count: int = 5,
    hook_point: str | None = None,
    tokens: str | None = None,
    batch_size: int = 64,
) -> list[list[tuple[str, float]]]:
    """What each of m features stands for, in text concepts: at most `count` (concept, weight)
    pairs, heaviest first.

    The `images` images that activate a feature most are decomposed one by one, and their weights
    averaged (`ConceptDictionary.name_groups`). A feature that is never active has no names.
    """
    top = top_images(
        sae,
        clip,
        dataset,
        features,
        count=images,
        hook_point=hook_point,
        tokens=tokens,
        batch_size=batch_size,
    )
    used = sorted({image for row in top.images.tolist() for image in row if image >= 0})
    if not used:
        return [[] for _ in top.images]
    shown = image_embeddings(clip, Subset(dataset, used), batch_size, "embed top images")
    groups = [[used.index(image) for image in row if image >= 0] for row in top.images.tolist()]
    return dictionary.name_groups(torch.cat(list(shown)), groups, count)


def steerability(
    sae: SAE,
    clip: CLIP,
    dataset: Any,
    vocabulary: Sequence[str] | Tensor,
    *,
    strength: float | Tensor,
    features: Sequence[int] | Tensor | None = None,
    hook_point: str | None = None,
    tokens: str | None = None,
    target_hook_point: str | None = None,
    templates: Sequence[str] | None = None,
    threshold: float = 0.10,
    batch_size: int = 64,
) -> Steerability:
    """How far each feature, set to `strength`, moves CLIP's distribution over a vocabulary of
    concepts.

    p = softmax(100 · image · textᵀ), Δ_c = mean over images of p_steered - p_clean; S = Σ_c Δ_c²,
    power = max_c Δ_c; a feature is steerable when S > threshold (Joseph et al. 2025, arXiv
    2504.08729).

    Args:
        vocabulary: C concepts as texts, or their unit embeddings (C, e).
        strength: one activation for all features, or one a feature, (m,).
        target_hook_point: of a transcoder, whose features are set in what is there; by default what
            its metadata say.
        features: m indices; None means all of them. A feature costs a pass over the data set
            through what follows the hook point.
    """
    site = find_site(sae, clip, hook_point, tokens)
    target = find_target(sae, clip, site, target_hook_point)
    chosen = _checked(sae, features)
    strengths = torch.as_tensor(strength, dtype=sae.W_dec.dtype, device=sae.W_dec.device).expand(
        len(chosen)
    )
    text = (
        vocabulary
        if isinstance(vocabulary, Tensor)
        else zero_shot_head(clip, vocabulary, templates)
    )
    text = text.to(clip.device)
    change = torch.zeros(len(chosen), len(text), dtype=torch.float64, device=clip.device)
    images = 0
    with evaluating(sae, clip):
        for pixels, _ in image_batches(clip, dataset, batch_size, "steerability"):
            x, y, embedded = clean_passes(clip, pixels, site, target)
            clean = _probabilities(embedded, text)
            rows = site.select(x)
            written = target.select(y)
            scale = sae.normalize_input(rows)[1].scale
            scale = torch.ones_like(written[..., :1]) if scale is None else scale
            go_on = from_site(clip, pixels, target, y, embedded)
            images += len(pixels)
            for first in tqdm(
                range(0, len(chosen), _FEATURES), desc="features", leave=False, disable=None
            ):
                group = chosen[first : first + _FEATURES]
                acts = _selected_acts(sae, rows, group)  # (B, T, m)
                for i in range(len(group)):
                    one = slice(first + i, first + i + 1)
                    new = set_features(
                        written, acts[..., i : i + 1], strengths[one], sae.W_dec[chosen[one]], scale
                    )
                    change[first + i] += (
                        _probabilities(go_on(target.put(y, new)), text) - clean
                    ).sum(0)
    change /= images
    score = change.square().sum(1)
    power, concept = change.max(1)
    return Steerability(
        chosen, score, power, concept, change, float((score > threshold).double().mean())
    )


def _probabilities(embedded: Tensor, text: Tensor) -> Tensor:
    return (LOGIT_SCALE * embedded @ text.to(embedded.dtype).T).double().softmax(-1)
