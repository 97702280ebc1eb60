"""Looking into a CLIP model through a sparse autoencoder: zero-shot accuracy, features, and what
they steer.

Steerability of a feature over a text vocabulary: p = softmax(100 · image · textᵀ), Δ_c the mean
change of p_c over images when the feature is set to a strength, S = Σ_c Δ_c² (Joseph et al. 2025,
arXiv 2504.08729).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clipsteer.clip.hooks import capture
from clipsteer.clip.model import CLIP
from clipsteer.data.dataset import ImageDataset, sample_names, spread
from clipsteer.data.emoji import EmojiStyles
from clipsteer.data.files import open_dataset
from clipsteer.sae.evaluate import steerability
from clipsteer.sae.model import SAE
from clipsteer.sae.site import grid_side
from clipsteer.splice.dictionary import ConceptDictionary
from clipsteer.steering import SAESteering, Steering, steer

_MAX_TOKEN_BYTES = 512 << 20


@dataclass(frozen=True)
class Pictures:
    """Images to explore.

    Attributes:
        dataset: N images; groups: name -> rows of it; train: the rows whose tokens the SAE learns
            from.
        names: (N,) what each image shows, for captions.
        classes, truth: class names and the (N,) class of each image, or None where there are no
            classes.
        vocabulary: the texts among which predictions are made.
    """

    dataset: ImageDataset
    groups: dict[str, list[int]]
    train: list[int]
    names: list[str]
    classes: list[str] | None
    truth: Tensor | None
    vocabulary: list[str]

    @property
    def held_out(self) -> list[int]:
        """The group to show and to try things on: of the four cells known concepts in a new style,
        else the last."""
        groups = list(self.groups.values())
        return groups[2 if len(groups) == 4 else -1]

    def thumb(self, row: int, size: int = 128) -> Any:
        """A small copy of an image."""
        image = self.dataset[row][0].copy()
        image.thumbnail((size, size))
        return image

    def variant(self, rows: Sequence[int], change: Callable[[Any], Any]) -> Pictures:
        """The images of some rows, each changed when it is read; nothing else is kept."""
        rows = list(rows)
        dataset = ImageDataset(lambda i: change(self.dataset[rows[i]][0]), [0] * len(rows))
        return Pictures(dataset, {}, [], [self.names[i] for i in rows], None, None, self.vocabulary)


@dataclass
class Feature:
    """One SAE feature and what was found out about it."""

    index: int
    peak: float  # largest activation over all images
    density: float  # share of images on which it is active
    top: list[int]  # rows of the images that activate it most
    looks_like: list[
        tuple[str, float]
    ]  # the texts that those images are made of, and their mean weights
    steerability: float = 0.0
    effect: list[tuple[str, float]] = field(
        default_factory=list
    )  # (text, Δp) steered up, on the probe images
    removed: list[tuple[str, float]] = field(
        default_factory=list
    )  # (text, Δp) suppressed, on its top images


def emoji_pictures(max_images: int | None = None, emojiclip: bool = True) -> Pictures:
    """The bundled drawings in four cells: trained or held-out style × concepts that EmojiCLIP has
    seen or not.

    For another model (``emojiclip=False``) the cells are the same, and named by what they hold.
    """
    emoji = EmojiStyles()
    rows: list[tuple[str, int]] = []
    groups = {}
    for (style, seen), pairs in emoji.cells().items():
        kept = spread(pairs, max_images and max(1, max_images // 4))
        group = f"{style} style, {'seen' if seen else 'unseen'} concepts"
        if not emojiclip:
            drawn = "Noto and Fluent" if style == "trained" else "Twemoji"
            group = f"{drawn} drawings, {'first' if seen else 'other'} concepts"
        groups[group] = list(range(len(rows), len(rows) + len(kept)))
        rows += kept
    dataset = emoji.dataset(rows)
    labels = [c.label for c in emoji.concepts]
    names = [f"{emoji.concepts[i].label} ({style})" for style, i in rows]
    truth = torch.tensor([i for _, i in rows])
    return Pictures(dataset, groups, next(iter(groups.values())), names, labels, truth, labels)


def folder_pictures(path: str | Path, seed: int, max_images: int) -> Pictures:
    """A user's images, four fifths for the SAE. Vocabulary: class names, if any, and bundled
    ones."""
    dataset = open_dataset(path)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[
        :max_images
    ]
    if len(order) < 10:
        raise ValueError(f"data must hold at least 10 images, got {len(order)} in {path}")
    cut = len(order) * 4 // 5
    rows = sorted(order[:cut]) + sorted(order[cut:])
    chosen = dataset.subset(rows)
    groups = {
        "images the SAE learns from": list(range(cut)),
        "held-out images": list(range(cut, len(rows))),
    }
    # a full-size text tower takes a minute or two for all of them
    concepts = spread([c.label for c in EmojiStyles().concepts], 300)
    if dataset.classes is None:
        names = [name[:60] for name in sample_names(chosen)]
        return Pictures(
            chosen, groups, groups["images the SAE learns from"], names, None, None, concepts
        )
    classes = [c.replace("_", " ") for c in dataset.classes]
    names = [classes[t] for t in chosen.targets]
    vocabulary = [*classes, *(c for c in concepts if c not in set(classes))]
    train = groups["images the SAE learns from"]
    several = len(classes) > 1
    truth = torch.tensor(chosen.targets) if several else None
    return Pictures(chosen, groups, train, names, classes if several else None, truth, vocabulary)


def batches(rows: Sequence[int], size: int, label: str) -> Iterator[Sequence[int]]:
    with tqdm(total=len(rows), desc=label, unit="image", disable=None) as bar:
        for at in range(0, len(rows), size):
            yield rows[at : at + size]
            bar.update(len(rows[at : at + size]))


def pixels(clip: CLIP, pictures: Pictures, rows: Sequence[int]) -> Tensor:
    """Preprocessed images (B, 3, H, W)."""
    return torch.stack([clip.preprocess(pictures.dataset[i][0]) for i in rows]).to(
        clip.device, clip.dtype
    )


@torch.no_grad()
def look(
    clip: CLIP,
    pictures: Pictures,
    hook_point: str,
    *,
    batch: int = 64,
    label: str = "look at images",
) -> tuple[Tensor, Tensor]:
    """Tokens at the hook point (N, T, d) and unit image embeddings (N, e) of every image, on the
    CPU in float32."""
    tokens, embeddings = [], []
    for rows in batches(range(len(pictures.dataset)), batch, label):
        with capture(clip, hook_point, detach=True) as found:
            embeddings.append(clip.embed(pixels(clip, pictures, rows)).float().cpu())
        tokens.append(found[hook_point].float().cpu())
        if len(tokens) * tokens[0].nbytes > 4 * _MAX_TOKEN_BYTES:
            raise ValueError(
                f"tokens of {len(pictures.dataset)} images take too much memory; pass --max-images"
            )
    return torch.cat(tokens), torch.cat(embeddings)


def n_way(scores: Tensor, truth: Tensor, ways: int) -> Tensor:
    """Expected accuracy of each image (N,) over every draw of ``ways`` - 1 wrong candidates: exact,
    nothing is drawn.

    scores (N, M) over the candidates, truth (N,) the right one. With w of the M - 1 others at least
    as high, a draw is won when it avoids those w: C(M-1-w, ways-1) / C(M-1, ways-1).
    """
    own = scores.gather(1, truth[:, None])
    above = ((scores >= own).sum(1) - 1).double()  # (N,)
    others, drawn = scores.shape[1] - 1, ways - 1
    won = torch.ones_like(above)
    for j in range(drawn):
        won *= ((others - above - j) / (others - j)).clamp_min(0)
    return won


def zero_shot(pictures: Pictures, embeddings: Tensor, head: Tensor) -> list[dict[str, Any]]:
    """Accuracy of each group by N: candidates are the classes that occur in the group."""
    rows = []
    for group, members in pictures.groups.items():
        picked = torch.tensor(members)
        present, truth = pictures.truth[picked].unique(return_inverse=True)
        scores = embeddings[picked] @ head[present].T
        sizes = sorted({w for w in (10, 50) if w < len(present)} | {len(present)})
        accuracy = {}
        for ways in sizes:
            won = n_way(scores, truth, ways)
            sem = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else 0.0
            accuracy[ways] = {"accuracy": float(won.mean()), "sem": sem, "chance": 1 / ways}
        rows.append(
            {"group": group, "images": len(members), "candidates": len(present), "ways": accuracy}
        )
    return rows


@torch.no_grad()
def feature_heat(sae: SAE, tokens: Tensor, feature: int, prefix: int) -> Tensor | None:
    """A feature's activation over the patch grid of one image, tokens (T, d) -> (g, g), or None
    without a square."""
    acts = sae.feature_acts(
        tokens[prefix:].to(sae.W_enc.device), torch.tensor([feature], device=sae.W_enc.device)
    )[0]
    side = grid_side(len(acts))
    return acts.reshape(side, side).float().cpu() if side else None


class Predictor:
    """Probabilities over the vocabulary, p = softmax(100 · image · textᵀ), clean and steered."""

    def __init__(self, clip: CLIP, sae: SAE, hook_point: str, head: Tensor) -> None:
        self.clip, self.sae, self.hook_point, self.head = clip, sae, hook_point, head

    def of(self, embeddings: Tensor) -> Tensor:
        return (100 * embeddings @ self.head.T).softmax(-1)

    @torch.no_grad()
    def under(self, images: Tensor, steering: Steering) -> Tensor:
        with steer(self.clip, {self.hook_point: steering}):
            return self.of(self.clip.embed(images).float().cpu())

    def steered(self, images: Tensor, feature: int, strength: float) -> Tensor:
        return self.under(images, SAESteering(self.sae, {feature: strength}))


def largest(delta: Tensor, texts: Sequence[str], count: int) -> list[tuple[str, float]]:
    order = delta.abs().argsort(descending=True, stable=True)[:count].tolist()
    return sorted(((texts[i], float(delta[i])) for i in order), key=lambda pair: -pair[1])


def few(images: int) -> tuple[int, int]:
    """On how many of the images a feature is active that is worth a look: at least, and at most."""
    least = min(6, max(2, images // 20))
    return least, max(least, images * 3 // 20)


def describe(
    peaks: Tensor, embeddings: Tensor, dictionary: ConceptDictionary, limit: int
) -> list[Feature]:
    """Features active on a few images, the strongest first, named by the images that activate them
    most."""
    density = (peaks > 0).float().mean(0)
    count = (peaks > 0).sum(0)
    top, most = few(len(peaks))
    usable = (count >= top) & (count <= most)
    strength = torch.where(usable, peaks.topk(min(top, len(peaks)), dim=0).values.mean(0), 0.0)
    order = strength.argsort(descending=True, stable=True)[: min(limit, int(usable.sum()))].tolist()
    groups = [
        peaks[:, index].argsort(descending=True, stable=True)[:top].tolist() for index in order
    ]
    return [
        Feature(index, float(peaks[:, index].max()), float(density[index]), rows, names)
        for index, rows, names in zip(order, groups, dictionary.name_groups(embeddings, groups))
        if names
    ]


def probe(
    predictor: Predictor,
    pictures: Pictures,
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
        features=[f.index for f in features],
        strength=torch.tensor([multiple * f.peak for f in features]),
        hook_point=predictor.hook_point,
        tokens="all",
    )
    for feature, score, change in zip(features, found.score.tolist(), found.change.float().cpu()):
        feature.steerability, feature.effect = score, largest(change, pictures.vocabulary, 6)


def count_steerable(
    predictor: Predictor,
    pictures: Pictures,
    rows: Sequence[int],
    features: Sequence[Feature],
    multiple: float,
    threshold: float,
) -> int:
    """How many of the features have S above the threshold at another multiple of their peak."""
    copies = [replace(f) for f in features]
    probe(predictor, pictures, rows, copies, multiple)
    return sum(f.steerability > threshold for f in copies)


def choose(features: list[Feature], count: int) -> list[Feature]:
    """The most steerable features, no two of which push the predictions to the same text.

    Those that push towards what they look like (one of their texts) come first.
    """
    chosen: dict[str, Feature] = {}
    for feature in sorted(
        features, key=lambda f: (f.effect[0][0] not in dict(f.looks_like), -f.steerability)
    ):
        chosen.setdefault(feature.effect[0][0], feature)
    return list(chosen.values())[:count]


@torch.no_grad()
def response(
    predictor: Predictor, feature: Feature, images: Tensor, target: int, multiples: Sequence[float]
) -> list[float]:
    """Mean probability of one text on the images, with the feature set to each multiple of its
    peak."""
    return [
        float(predictor.steered(images, feature.index, m * feature.peak)[:, target].mean())
        for m in multiples
    ]


def augmented(image: Any, generator: torch.Generator) -> Any:
    """A slightly moved, scaled, turned and perhaps mirrored PIL image, on white: more tokens from
    few pictures."""
    from PIL import Image, ImageOps

    zoom, turn, dx, dy, mirror = torch.rand(5, generator=generator).tolist()
    w, h = image.size
    image = ImageOps.mirror(image) if mirror < 0.5 else image
    size = (max(1, round(w * (0.75 + 0.35 * zoom))), max(1, round(h * (0.75 + 0.35 * zoom))))
    small = image.resize(size).rotate(20 * turn - 10, Image.Resampling.BICUBIC, fillcolor="white")
    canvas = Image.new("RGB", (w, h), "white")
    canvas.paste(small, (round((w - size[0]) * dx), round((h - size[1]) * dy)))
    return canvas
