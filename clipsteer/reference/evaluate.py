"""What a contrastively trained CLIP can do, and what each pair still costs beside a reference."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer import ops
from clipsteer.clip.model import CLIP
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.dataset import ImageDataset, captions_of
from clipsteer.io.files import write_atomically
from clipsteer.reference.features import ReferenceFeatures, encode_dataset, encode_texts
from clipsteer.training.world import World


def evaluate(
    clip: CLIP,
    dataset: ImageDataset,
    *,
    templates: tuple[str, ...] | None = None,
    workers: int = 0,
    world: World | None = None,
) -> dict[str, float]:
    """Zero-shot accuracy where the images have classes, retrieval where they have captions.

    Of retrieval: recall at 1 in both directions and the mean reciprocal rank of an image's caption.
    It is among the data set's distinct images and captions; every caption of an image, and every
    image of a caption, counts as right, of several the best-placed one. Equal scores share their
    places. With `world` the processes share the work, and each gets the figures.

    Raises ValueError where features are not finite.
    """
    images = encode_dataset(clip, dataset, workers=workers, world=world)
    if not bool(images.isfinite().all()):
        raise ValueError("evaluate: the model's image features are not finite")
    if dataset.classes is not None:
        names = [name.replace("_", " ").replace("-", " ") for name in dataset.classes]
        head = zero_shot_head(clip, names, templates)
        scores = images @ head.T.to(images.dtype)
        targets = torch.tensor(dataset.targets)
        right = scores.argmax(1).cpu() == targets
        return {"zero_shot": float(right.float().mean())}
    texts = list(dict.fromkeys(captions_of(dataset)))
    place = {text: i for i, text in enumerate(texts)}
    # an image with several captions stands in as many rows
    first: dict[Any, int] = {}
    for row, source in enumerate(dataset.sources):
        first.setdefault(source, row)
    rank = {source: i for i, source in enumerate(first)}
    right = torch.zeros(len(first), len(texts), dtype=torch.bool)
    for source, text in zip(dataset.sources, captions_of(dataset)):
        right[rank[source], place[text]] = True
    distinct = images[list(first.values())]
    scores = (distinct @ encode_texts(clip, texts, world=world).T).cpu()  # (images, texts)
    return _retrieval(scores, right)


def _retrieval(
    scores: Tensor,  # (images, texts)
    right: Tensor,  # the same, boolean
) -> dict[str, float]:
    best = scores.masked_fill(~right, -torch.inf)
    best = best.amax(1, keepdim=True)
    level = (scores == best) & ~right
    ahead = (scores > best).sum(1) + level.sum(1) / 2
    images, texts = scores.shape
    found_texts = right[range(images), scores.argmax(1)]
    found_images = right[scores.argmax(0), range(texts)]
    return {
        "image_to_text_mrr": float((1 / (1 + ahead)).mean()),
        "image_to_text_r1": float(found_texts.float().mean()),
        "text_to_image_r1": float(found_images.float().mean()),
    }


@torch.no_grad()
def excess_losses(
    clip: CLIP,
    dataset: ImageDataset,
    reference: ReferenceFeatures,
    *,
    temperature: float = 0.05,
    chunk: int = 2048,
    seed: int = 0,
    workers: int = 0,
    world: World | None = None,
) -> dict[str, Tensor]:
    """What every pair still costs: (N,) "learner", "reference" and "excess", images whole.

    learner_i = τ/2·(u_i^image + u_i^text), DRRho's term without a reference: how close other pairs
    come to this one, against `chunk` pairs drawn with it (all when there are no more). reference_i
    is the same of the reference; excess_i has the reference in it, Σ_j exp([(s_ij - s_ii) - (r_ij -
    r_ii)]/τ): large where the pair is hard for the learner and easy for the reference, so worth
    learning; small where it is learnt, or noise. `world` as in `evaluate`.
    """
    image = encode_dataset(clip, dataset, workers=workers, world=world)
    text = encode_texts(clip, captions_of(dataset), world=world)
    ref_image = reference.image.to(image)
    ref_text = reference.text.to(image)
    out = {name: torch.zeros(len(dataset)) for name in ("learner", "reference", "excess")}
    n = len(dataset)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    for rows in order.tensor_split(math.ceil(n / chunk)):
        learner = (image[rows], text[rows])
        theirs = (ref_image[rows], ref_text[rows])
        given = {"learner": learner, "reference": theirs, "excess": learner + theirs}
        for name, features in given.items():
            u = ops.drrho_loss(*features, temperature=temperature)[1]  # (2, chunk)
            out[name][rows] = temperature * u.mean(0).float().cpu()
    return out


def write_excess(
    path: str | Path,
    losses: dict[str, Tensor],  # (N,) each
    captions: list[str],
) -> None:
    """A CSV file with a row a pair, the largest excess first.

    Its columns are sample, learner, reference, excess, caption.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["sample", *losses, "caption"])
    order = losses["excess"].argsort(descending=True, stable=True)
    for row in order.tolist():
        numbers = [f"{values[row]:.6g}" for values in losses.values()]
        writer.writerow([row, *numbers, captions[row]])
    data = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(data))
