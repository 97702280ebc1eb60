"""Looking into a CLIP model through a sparse autoencoder: zero-shot accuracy, features, and what
they steer.

Steerability of a feature over a text vocabulary: p = softmax(100 · image · textᵀ), Δ_c the mean
change of p_c over images when the feature is set to a strength, S = Σ_c Δ_c² (Joseph et al. 2025,
arXiv 2504.08729).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.model import CLIP
from clipsteer.clip.zero_shot import mean_directions
from clipsteer.data.dataset import ImageDataset
from clipsteer.demo.pictures import Pictures
from clipsteer.sae.evaluate import steerability
from clipsteer.sae.model import SAE
from clipsteer.sae.site import grid_side
from clipsteer.splice.dictionary import ConceptDictionary
from clipsteer.steering import SAESteering, Steering, Tokens, steer

Weighted = list[tuple[str, float]]  # texts, each with a number


@dataclass
class Feature:
    """One SAE feature and what was found out about it."""

    index: int
    peak: float
    """largest activation over all images"""
    density: float
    """share of images on which it is active"""
    top: list[int]
    """rows of the images that activate it most"""
    looks_like: Weighted
    """the texts that those images are made of, and their mean weights"""
    steerability: float = 0.0
    effect: Weighted = field(default_factory=list)
    """(text, Δp) steered up, on the probe images"""
    removed: Weighted = field(default_factory=list)
    """(text, Δp) suppressed, on its top images"""


def n_way(
    scores: Tensor,  # (N, M) over the candidates
    truth: Tensor,  # (N,) the right one
    ways: int,
) -> Tensor:  # (N,) float64
    """Expected accuracy of each image over every draw of ``ways`` - 1 wrong candidates: exact,
    nothing is drawn.

    With w of the M - 1 others at least as high, a draw is won when it avoids those w:
    C(M-1-w, ways-1) / C(M-1, ways-1).
    """
    own = scores.gather(1, truth[:, None])
    above = ((scores >= own).sum(1) - 1).double()  # (N,)
    others = scores.shape[1] - 1
    won = torch.ones_like(above)
    for j in range(ways - 1):
        won *= ((others - above - j) / (others - j)).clamp_min(0)
    return won


def zero_shot(
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
    head: Tensor,  # (C, e)
) -> list[dict[str, Any]]:
    """Accuracy of each group by N: candidates are the classes that occur in the group."""
    assert pictures.truth is not None
    rows = []
    for group, members in pictures.groups.items():
        picked = torch.tensor(members)
        present, truth = pictures.truth[picked].unique(return_inverse=True)
        scores = embeddings[picked] @ head[present].T
        several = [ways for ways in (10, 50) if ways < len(present)]
        accuracy = {}
        for ways in [*several, len(present)]:
            won = n_way(scores, truth, ways)
            sem = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else 0.0
            accuracy[ways] = {"accuracy": float(won.mean()), "sem": sem, "chance": 1 / ways}
        rows.append(
            {"group": group, "images": len(members), "candidates": len(present), "ways": accuracy}
        )
    return rows


def class_means(
    pictures: Pictures,
    embeddings: Tensor,  # (N, e), unit rows
) -> Tensor:  # (C, e), unit rows
    """What stands for each class where there is no text: the mean of its images that the SAE
    learns from. Raises ValueError for a class without one."""
    assert pictures.classes is not None
    assert pictures.truth is not None
    truth = pictures.truth[pictures.train]
    counts = truth.bincount(minlength=len(pictures.classes))
    if not bool(counts.all()):
        name = pictures.classes[int(counts.argmin())]
        raise ValueError(
            f"demo: among the {len(truth)} images that are learnt from none shows {name!r}; give "
            "each class more of them"
        )
    return mean_directions(embeddings[pictures.train].float(), truth, len(counts))


@torch.no_grad()
def feature_heat(
    sae: SAE,
    tokens: Tensor,  # (T, d) of one image
    feature: int,
    prefix: int,
) -> Tensor | None:  # (g, g)
    """A feature's activation over the patch grid, which begins after ``prefix`` tokens; None
    without a square."""
    device = sae.W_enc.device
    patches = tokens[prefix:].to(device)
    acts = sae.feature_acts(patches, torch.tensor([feature], device=device))[0]
    side = grid_side(len(acts))
    return acts.reshape(side, side).float().cpu() if side else None


class Predictor:
    """Probabilities over the vocabulary, p = softmax(100 · image · textᵀ), clean and steered.

    Args:
        hook_point: where ``sae`` was trained, and where is steered.
        head: (V, e) unit text embeddings of the vocabulary.
        tokens: which of them the SAE knows.
    """

    def __init__(
        self, clip: CLIP, sae: SAE, hook_point: str, head: Tensor, tokens: Tokens = "all"
    ) -> None:
        self.clip = clip
        self.sae = sae
        self.hook_point = hook_point
        self.head = head
        self.tokens = tokens

    def of(
        self,
        embeddings: Tensor,  # (B, e)
    ) -> Tensor:  # (B, V)
        """Probabilities of images of these embeddings."""
        return (100 * embeddings @ self.head.T).softmax(-1)

    @torch.no_grad()
    def steered_by(
        self,
        steering: Steering,
        images: Tensor,  # (B, 3, H, W)
    ) -> Tensor:  # (B, V)
        """Probabilities with a steering at the hook point."""
        with steer(self.clip, {self.hook_point: steering}):
            embeddings = self.clip.embed(images)
        return self.of(embeddings.float().cpu())

    def steered(
        self,
        images: Tensor,  # (B, 3, H, W)
        feature: int,
        strength: float,
    ) -> Tensor:  # (B, V)
        """Probabilities with one feature set to a strength on every token."""
        steering = SAESteering(self.sae, {feature: strength}, tokens=self.tokens)
        return self.steered_by(steering, images)


def largest(
    delta: Tensor,  # (V,)
    texts: Sequence[str],
    count: int,
) -> Weighted:
    """The texts of the largest changes in size, from the most positive to the most negative."""
    order = delta.abs().argsort(descending=True, stable=True)[:count].tolist()
    found = [(texts[i], float(delta[i])) for i in order if delta[i] != 0]
    return sorted(found, key=lambda pair: -pair[1])


def few(images: int) -> tuple[int, int]:
    """On how many of the images a feature is active that is worth a look: at least, and at most."""
    least = min(6, max(2, images // 20))
    return least, max(least, images * 3 // 20)


def describe(
    peaks: Tensor,  # (N, d_sae), each feature's largest activation on each image
    embeddings: Tensor,  # (N, e)
    dictionary: ConceptDictionary,
    limit: int,
) -> list[Feature]:
    """Features active on a few images, the strongest first, named by the images that activate them
    most."""
    density = (peaks > 0).float().mean(0)
    count = (peaks > 0).sum(0)
    least, most = few(len(peaks))
    usable = (count >= least) & (count <= most)
    strongest = peaks.topk(min(least, len(peaks)), dim=0).values.mean(0)
    strength = torch.where(usable, strongest, 0.0)
    shown = min(limit, int(usable.sum()))
    order = strength.argsort(descending=True, stable=True)[:shown].tolist()
    groups = []
    for index in order:
        strongest_first = peaks[:, index].argsort(descending=True, stable=True)
        groups.append(strongest_first[:least].tolist())
    named = dictionary.name_groups(embeddings, groups)
    features = []
    for index, rows, names in zip(order, groups, named):
        if names:
            peak = float(peaks[:, index].max())
            features.append(Feature(index, peak, float(density[index]), rows, names))
    return features


def probe(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
    rows: Sequence[int],
    features: list[Feature],
    multiple: float,
) -> None:
    """Fill in steerability and effect: every feature set to ``multiple`` times its peak on the
    images of ``rows``."""
    dataset = ImageDataset(lambda i: pictures.dataset[rows[i]][0], [""] * len(rows))
    found = steerability(
        predictor.sae,
        predictor.clip,
        dataset,
        predictor.head,
        features=[feature.index for feature in features],
        strength=torch.tensor([multiple * feature.peak for feature in features]),
        hook_point=predictor.hook_point,
        tokens=predictor.tokens,
    )
    changes = found.change.float().cpu()  # (features, V)
    # one picture that loses its own name is no effect of the feature
    clean = predictor.of(embeddings[rows])  # (B, V)
    own = clean.amax(0) >= 0.5 * clean.sum(0)
    listed = changes.masked_fill(own & (changes < 0), 0.0)
    for feature, score, change in zip(features, found.score.tolist(), listed):
        feature.steerability = score
        feature.effect = largest(change, pictures.vocabulary, 6)


def count_steerable(
    predictor: Predictor,
    pictures: Pictures,
    embeddings: Tensor,  # (N, e)
    rows: Sequence[int],
    features: Sequence[Feature],
    multiple: float,
    threshold: float,
) -> int:
    """How many of the features have S above the threshold at another multiple of their peak."""
    copies = [replace(feature) for feature in features]
    probe(predictor, pictures, embeddings, rows, copies, multiple)
    return sum(feature.steerability > threshold for feature in copies)


def choose(features: list[Feature], count: int) -> list[Feature]:
    """The most steerable features, no two of which push the predictions to the same text.

    Those that push towards what they look like (one of their texts) come first.
    """

    def rank(feature: Feature) -> tuple[bool, float]:
        pushed_to = feature.effect[0][0]
        return pushed_to not in dict(feature.looks_like), -feature.steerability

    chosen: dict[str, Feature] = {}
    moving = [feature for feature in features if feature.effect and feature.effect[0][1] > 0]
    for feature in sorted(moving, key=rank):
        chosen.setdefault(feature.effect[0][0], feature)
    return list(chosen.values())[:count]


@torch.no_grad()
def response(
    predictor: Predictor,
    feature: Feature,
    images: Tensor,  # (B, 3, H, W)
    target: int,
    multiples: Sequence[float],
) -> list[float]:
    """Mean probability of one text on the images, with the feature set to each multiple of its
    peak."""
    means = []
    for multiple in multiples:
        p = predictor.steered(images, feature.index, multiple * feature.peak)  # (B, V)
        means.append(float(p[:, target].mean()))
    return means
