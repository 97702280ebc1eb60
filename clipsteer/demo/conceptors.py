"""The demo's conceptors: one for each category of images at one block, what each keeps, and what
steering with it does.

All have one aperture, relative to the activations: α = 1/√(trace(R)/d) with R of all training
tokens, so that a direction of average energy is kept by half. Steering is x -> C x on every token,
uncentred.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.model import as_texts, provenance
from clipsteer.conceptors.conceptor import Conceptor
from clipsteer.conceptors.fit import correlation
from clipsteer.data.dataset import spread
from clipsteer.data.emoji import EmojiStyles
from clipsteer.demo.explore import Predictor
from clipsteer.demo.pictures import Pictures, pixels
from clipsteer.steering import ConceptorSteering

MOST_CLASSES = 8
_LEAST_IMAGES = 3  # to fit one conceptor on
_SHOWN = 6
_EXAMPLES = 5
_BATCH = 64


@dataclass(frozen=True)
class Kinds:
    """What the images are told apart by.

    Attributes:
        what: "category" or "class".
        names: K of them.
        of_image, of_text: index of each image's and each text's, -1 for none.
        pairs: training rows of one concept, drawn in two styles; where there are any, style gets a
            conceptor too.
    """

    what: str
    names: list[str]
    of_image: Tensor  # (N,)
    of_text: Tensor  # (V,)
    pairs: list[tuple[int, int]]


def kinds_of(pictures: Pictures, emoji: bool) -> Kinds | str:
    """The five categories of the bundled drawings, or a user's classes; a sentence where there is
    nothing to compare.

    A class needs three training images and one other.
    """
    if pictures.truth is None or pictures.classes is None:
        return "Conceptors need groups of images to compare, and these images have no classes."
    if emoji:
        return _usable(_categories(pictures, pictures.truth), pictures)
    of_text = torch.full((len(pictures.vocabulary),), -1)
    of_text[: len(pictures.classes)] = torch.arange(len(pictures.classes))
    return _usable(Kinds("class", pictures.classes, pictures.truth, of_text, []), pictures)


def _categories(
    pictures: Pictures,
    truth: Tensor,  # (N,)
) -> Kinds:
    concepts = EmojiStyles().concepts
    names = sorted({concept.category for concept in concepts})
    of_text = torch.tensor([names.index(concept.category) for concept in concepts])
    drawn: dict[int, list[int]] = {}
    for row in pictures.train:
        drawn.setdefault(int(truth[row]), []).append(row)
    pairs = [(rows[0], rows[1]) for rows in drawn.values() if len(rows) == 2]
    shown = [name.replace("-", " & ") for name in names]
    return Kinds("category", shown, of_text[truth], of_text, pairs)


def _usable(kinds: Kinds, pictures: Pictures) -> Kinds | str:
    """The kinds with enough images; a sentence where those are too few or too many."""
    fitted = Counter(kinds.of_image[pictures.train].tolist())
    held_out = set(kinds.of_image[pictures.held_out].tolist())
    enough = [k for k in range(len(kinds.names)) if fitted[k] >= _LEAST_IMAGES]
    kept = [k for k in enough if k in held_out]
    if not 2 <= len(kept) <= MOST_CLASSES:
        return (
            f"Conceptors are compared for 2 to {MOST_CLASSES} classes with at least "
            f"{_LEAST_IMAGES} training images and one held-out image each; here there are "
            f"{len(kept)}."
        )
    new = torch.full((len(kinds.names) + 1,), -1)  # the last entry serves -1
    new[kept] = torch.arange(len(kept))
    return Kinds(
        kinds.what,
        [kinds.names[k] for k in kept],
        new[kinds.of_image],
        new[kinds.of_text],
        kinds.pairs,
    )


@dataclass(frozen=True)
class Fitted:
    """Conceptors of one aperture."""

    own: Conceptor
    """a batch of K"""
    everything: Conceptor
    """of all images"""
    minus: list[Conceptor]
    """for each kind the one that AND NOT takes away"""


def fit(
    tokens: Tensor,  # (N, T, d)
    kinds: Kinds,
    train: Sequence[int],
) -> Fitted:
    """Conceptors of the training rows.

    What is taken away is style, from the half differences of the drawings of one concept, or else
    all other kinds.
    """
    x = tokens[train]
    of_image = kinds.of_image[list(train)]
    labels = of_image[:, None].expand(x.shape[:2]).contiguous()
    R = correlation(x, labels=labels, classes=len(kinds.names))  # (K, d, d)
    whole = correlation(x)
    aperture = float(torch.diagonal(whole).mean()) ** -0.5
    if kinds.pairs:
        first = [row for row, _ in kinds.pairs]
        second = [row for _, row in kinds.pairs]
        style = correlation((tokens[first] - tokens[second]) / 2)
        minus = [Conceptor.from_correlation(style, aperture)] * len(kinds.names)
    else:
        minus = [Conceptor.from_correlation(rest, aperture) for rest in _rests(R, of_image)]
    own = Conceptor.from_correlation(R, aperture)
    everything = Conceptor.from_correlation(whole, aperture)
    return Fitted(own, everything, minus)


def _rests(
    R: Tensor,  # (K, d, d)
    of_image: Tensor,  # (images,)
) -> list[Tensor]:  # (d, d) each
    """For each kind the correlation of all others.

    Every image has as many tokens, so that it is a mean weighted by images.
    """
    count = torch.bincount(of_image[of_image >= 0], minlength=len(R)).to(R)
    others = 1 - torch.eye(len(R)).to(R)
    weights = others * count / (others @ count)[:, None]  # (K, K)
    return [(weight[:, None, None] * R).sum(0) for weight in weights]


def kept_share(
    conceptor: Conceptor,
    tokens: Tensor,  # (N, T, d)
) -> Tensor:  # (N,)
    """‖C h‖²/‖h‖² over the tokens of each image."""
    kept = conceptor.project(tokens).square().sum((1, 2))
    return kept / tokens.square().sum((1, 2))


def steered(
    predictor: Predictor,
    images: Tensor,  # (B, 3, H, W)
    conceptor: Conceptor,
) -> Tensor:  # (B, V)
    """Probabilities with every token projected."""
    steering = ConceptorSteering(conceptor)
    return torch.cat([predictor.steered_by(steering, part) for part in images.split(_BATCH)])


def measure(
    predictor: Predictor,
    pictures: Pictures,
    tokens: Tensor,  # (N, T, d)
    embeddings: Tensor,  # (N, e)
    emoji: bool,
    path: Path,
) -> dict[str, Any]:
    """All of it, JSON-able, or {"skipped": why}; the K conceptors go to the file ``path``."""
    kinds = kinds_of(pictures, emoji)
    if isinstance(kinds, str):
        return {"skipped": kinds}
    assert pictures.truth is not None
    fitted = fit(tokens, kinds, pictures.train)
    fitted.own.metadata.update(
        as_texts(provenance(predictor.clip, predictor.hook_point, "all")),
        names=json.dumps(kinds.names),
    )
    fitted.own.save(path)
    K = len(kinds.names)
    held = [row for row in pictures.held_out if kinds.of_image[row] >= 0]
    of_held = kinds.of_image[held]
    ratio = _ratios(fitted, tokens[held])

    # a pass over the images for every conceptor: fewer where a pass is dear
    rows = spread(held, 192 if tokens.shape[-1] <= 256 else 32)
    images = pixels(predictor.clip, pictures, rows)
    truth = pictures.truth[rows]
    kind = kinds.of_image[rows]

    def effect(p: Tensor) -> dict[str, Any]:
        mass = [float(p[:, kinds.of_text == k].sum(1).mean()) for k in range(K)]
        return {"mass": mass, "right_name": float((p.argmax(1) == truth).double().mean())}

    clean = predictor.of(embeddings[rows])
    everything = effect(steered(predictor, images, fitted.everything))
    found: list[dict[str, Any]] = []
    moved = []
    for k, name in enumerate(kinds.names):
        order = ratio[:, k].argsort(descending=True, stable=True).tolist()
        ranked = [(held[i], float(ratio[i, k])) for i in order]
        own = fitted.own[k]
        ways = {"itself": own, "and_not": own & ~fitted.minus[k], "not": ~own}
        steered_by = {way: steered(predictor, images, C) for way, C in ways.items()}
        moved.append(steered_by)
        found.append(
            {
                "name": name,
                "images": int((kinds.of_image[pictures.train] == k).sum()),
                "quota": float(own.quota),
                "most": ranked[:_SHOWN],
                "least": ranked[::-1][:_SHOWN],
                "most_of_its_own": int((of_held[order[:_SHOWN]] == k).sum()),
                "quota_and_not": float(ways["and_not"].quota),
                "effect": {way: effect(p) for way, p in steered_by.items()},
            }
        )

    def gain(k: int) -> float:
        itself = found[k]["effect"]["itself"]["mass"][k]
        return itself / max(everything["mass"][k], 1e-9)

    best = max(range(K), key=gain)

    def named(p: Tensor) -> tuple[str, float]:
        return pictures.vocabulary[int(p.argmax())], float(p.max())

    def examples(way: str, wanted: Tensor) -> list[dict[str, Any]]:
        after = moved[best][way]
        places = spread(wanted.nonzero()[:, 0].tolist(), _EXAMPLES)
        return [
            {"row": rows[i], "before": named(clean[i]), "after": named(after[i])} for i in places
        ]

    return {
        "what": kinds.what,
        "minus": "style" if kinds.pairs else "others",
        "aperture": fitted.own.aperture,
        "quota_everything": float(fitted.everything.quota),
        "held_out": len(held),
        "steered_images": len(rows),
        "told_apart": {
            "accuracy": float((ratio.argmax(1) == of_held).double().mean()),
            "largest_share": float(torch.bincount(of_held, minlength=K).max() / len(of_held)),
        },
        "probability": {"unsteered": effect(clean), "everything": everything},
        "conceptors": found,
        "shown": best,
        "examples": {
            "itself": examples("itself", kind != best),
            "not": examples("not", kind == best),
        },
    }


def _ratios(
    fitted: Fitted,
    tokens: Tensor,  # (N, T, d)
) -> Tensor:  # (N, K)
    """What each kind's conceptor keeps of each image, against the conceptor of everything.

    Plain shares differ more by how simple an image is than by what it shows.
    """
    base = kept_share(fitted.everything, tokens)
    K = len(fitted.minus)
    return torch.stack([kept_share(fitted.own[k], tokens) / base for k in range(K)], 1)
