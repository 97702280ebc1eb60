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
        what: "category" or "class"; names: K of them.
        of_image: (N,) and of_text: (V,) their index, -1 for none.
        pairs: training rows of one concept, drawn in two styles; where there are any, style gets a
            conceptor too.
    """

    what: str
    names: list[str]
    of_image: Tensor
    of_text: Tensor
    pairs: list[tuple[int, int]]


def kinds_of(pictures: Pictures, emoji: bool) -> Kinds | str:
    """The five categories of the bundled drawings, or a user's classes; a sentence where there is
    nothing to compare.

    A class needs three training images and one other.
    """
    if emoji:
        concepts = EmojiStyles().concepts
        names = sorted({c.category for c in concepts})
        of_text = torch.tensor([names.index(c.category) for c in concepts])
        drawn: dict[int, list[int]] = {}
        for row in pictures.train:
            drawn.setdefault(int(pictures.truth[row]), []).append(row)
        pairs = [tuple(rows) for rows in drawn.values() if len(rows) == 2]
        shown = [name.replace("-", " & ") for name in names]
        kinds = Kinds("category", shown, of_text[pictures.truth], of_text, pairs)
    elif pictures.truth is None:
        return "Conceptors need groups of images to compare, and these images have no classes."
    else:
        first = torch.full((len(pictures.vocabulary),), -1)
        first[: len(pictures.classes)] = torch.arange(len(pictures.classes))
        kinds = Kinds("class", list(pictures.classes), pictures.truth, first, [])
    return _usable(kinds, pictures)


def _usable(kinds: Kinds, pictures: Pictures) -> Kinds | str:
    fitted = Counter(kinds.of_image[pictures.train].tolist())
    held_out = set(kinds.of_image[pictures.held_out].tolist())
    kept = [k for k in range(len(kinds.names)) if fitted[k] >= _LEAST_IMAGES and k in held_out]
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
    """Conceptors of one aperture: ``own`` a batch of K, ``minus`` for each kind the one that AND
    NOT takes away."""

    own: Conceptor
    everything: Conceptor
    minus: list[Conceptor]


def fit(tokens: Tensor, kinds: Kinds, train: Sequence[int]) -> Fitted:
    """On the training rows of tokens (N, T, d).

    What is taken away is style, from the half differences of the drawings of one concept, or else
    all other kinds.
    """
    x, marks = tokens[train], kinds.of_image[list(train)]
    labels = marks[:, None].expand(x.shape[:2]).contiguous()
    R = correlation(x, labels=labels, classes=len(kinds.names))
    whole = correlation(x)
    aperture = float(torch.diagonal(whole).mean()) ** -0.5
    make = lambda matrix: Conceptor.from_correlation(matrix, aperture)
    if kinds.pairs:
        a, b = (tokens[list(rows)] for rows in zip(*kinds.pairs))
        minus = [make(correlation((a - b) / 2))] * len(kinds.names)
    else:
        # every image has as many tokens, so that the others' correlation is a mean weighted by
        # images
        count = torch.bincount(marks[marks >= 0], minlength=len(R)).to(R)
        rest = 1 - torch.eye(len(R)).to(R)
        minus = [
            make((w[:, None, None] * R).sum(0)) for w in rest * count / (rest @ count)[:, None]
        ]
    return Fitted(make(R), make(whole), minus)


def kept_share(conceptor: Conceptor, tokens: Tensor) -> Tensor:
    """‖C h‖²/‖h‖² over the tokens (N, T, d) of each image: (N,)."""
    return conceptor.project(tokens).square().sum((1, 2)) / tokens.square().sum((1, 2))


def steered(predictor: Predictor, images: Tensor, conceptor: Conceptor) -> Tensor:
    """Probabilities (B, V) with every token projected."""
    steering = ConceptorSteering(conceptor)
    return torch.cat([predictor.steered_by(steering, part) for part in images.split(_BATCH)])


def measure(
    predictor: Predictor,
    pictures: Pictures,
    tokens: Tensor,
    embeddings: Tensor,
    emoji: bool,
    path: Path,
) -> dict[str, Any]:
    """All of it, JSON-able, or {"skipped": why}; the K conceptors go to the file ``path``."""
    kinds = kinds_of(pictures, emoji)
    if isinstance(kinds, str):
        return {"skipped": kinds}
    fitted = fit(tokens, kinds, pictures.train)
    fitted.own.metadata.update(
        clip_model=predictor.clip.name,
        hook_point=predictor.hook_point,
        names=json.dumps(kinds.names),
    )
    fitted.own.save(path)
    K = len(kinds.names)
    held = [i for i in pictures.held_out if kinds.of_image[i] >= 0]
    of = kinds.of_image[held]
    base = kept_share(fitted.everything, tokens[held])
    # against the conceptor of everything: plain shares differ more by how simple an image is than
    # by what it shows
    ratio = torch.stack([kept_share(fitted.own[k], tokens[held]) / base for k in range(K)], 1)

    # a pass over the images for every conceptor: fewer where a pass is dear
    rows = spread(held, 192 if tokens.shape[-1] <= 256 else 32)
    images, truth, mine = (
        pixels(predictor.clip, pictures, rows),
        pictures.truth[rows],
        kinds.of_image[rows],
    )

    def effect(p: Tensor) -> dict[str, Any]:
        mass = [float(p[:, kinds.of_text == k].sum(1).mean()) for k in range(K)]
        return {"mass": mass, "right_name": float((p.argmax(1) == truth).double().mean())}

    clean = predictor.of(embeddings[rows])
    probability = {
        "unsteered": effect(clean),
        "everything": effect(steered(predictor, images, fitted.everything)),
    }
    found, moved = [], []
    for k, name in enumerate(kinds.names):
        order = ratio[:, k].argsort(descending=True, stable=True).tolist()
        ways = {
            "itself": fitted.own[k],
            "and_not": fitted.own[k] & ~fitted.minus[k],
            "not": ~fitted.own[k],
        }
        p = {way: steered(predictor, images, C) for way, C in ways.items()}
        moved.append(p)
        pick = lambda places, k=k: [(held[i], float(ratio[i, k])) for i in places]
        found.append(
            {
                "name": name,
                "images": int((kinds.of_image[pictures.train] == k).sum()),
                "quota": float(fitted.own[k].quota),
                "most": pick(order[:_SHOWN]),
                "least": pick(order[::-1][:_SHOWN]),
                "most_of_its_own": int((of[order[:_SHOWN]] == k).sum()),
                "quota_and_not": float(ways["and_not"].quota),
                "effect": {way: effect(value) for way, value in p.items()},
            }
        )

    def gain(k: int) -> float:
        return found[k]["effect"]["itself"]["mass"][k] / max(
            probability["everything"]["mass"][k], 1e-9
        )

    best = max(range(K), key=gain)

    def examples(way: str, wanted: Tensor) -> list[dict[str, Any]]:
        words = lambda p: (pictures.vocabulary[int(p.argmax())], float(p.max()))
        places = spread(wanted.nonzero()[:, 0].tolist(), _EXAMPLES)
        return [
            {"row": rows[i], "before": words(clean[i]), "after": words(moved[best][way][i])}
            for i in places
        ]

    return {
        "what": kinds.what,
        "minus": "style" if kinds.pairs else "others",
        "aperture": fitted.own.aperture,
        "quota_everything": float(fitted.everything.quota),
        "held_out": len(held),
        "steered_images": len(rows),
        "told_apart": {
            "accuracy": float((ratio.argmax(1) == of).double().mean()),
            "largest_share": float(torch.bincount(of, minlength=K).max() / len(of)),
        },
        "probability": probability,
        "conceptors": found,
        "shown": best,
        "examples": {
            "itself": examples("itself", mine != best),
            "not": examples("not", mine == best),
        },
    }
