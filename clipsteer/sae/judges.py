"""What a model still tells apart when activations are replaced: by its text tower's head, or by
probes of its embeddings where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.sae.site import LOGIT_SCALE

# the model as it is, with the SAE's output, and with zeros in its place
VARIANTS = ("clean", "sae", "zero")

_FOLDS = 5
_NEIGHBOURS = 10
_TEMPERATURE = 0.07
# similarities that are held at once
_BLOCK = 1 << 24


def ratio(above: float, below: float) -> float | None:
    """None where the denominator is 0."""
    return above / below if below else None


class _Judge:
    def __init__(self, classes: int) -> None:
        self.classes = classes

    def check(self, labels: Tensor) -> None:
        """Raise ValueError for a label that is no class."""
        if int(labels.max()) >= self.classes:
            raise ValueError(
                f"dataset: label {int(labels.max())} is not below the {self.classes} classes"
            )


class ZeroShot(_Judge):
    """Cross-entropy and accuracy of zero-shot predictions, logits 100 · cosine."""

    def __init__(
        self,
        head: Tensor,  # (C, e)
    ) -> None:
        super().__init__(len(head))
        self.head = head
        self.images = 0
        self.loss = dict.fromkeys(VARIANTS, 0.0)
        self.hits = dict.fromkeys(VARIANTS, 0)

    def add(
        self,
        embedded: Mapping[str, Tensor],  # of each variant (b, e)
        labels: Tensor,  # (b,)
    ) -> None:
        """Take in one batch."""
        self.images += len(labels)
        for name, features in embedded.items():
            logits = LOGIT_SCALE * features @ self.head.to(features.dtype).T  # (b, C)
            self.loss[name] += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            self.hits[name] += int((logits.argmax(-1) == labels).sum())

    def result(self) -> dict[str, Any]:
        """ce and top1 of each variant, and what of them is recovered."""
        if not self.images:
            return {}
        ce = {name: total / self.images for name, total in self.loss.items()}
        top1 = {name: hits / self.images for name, hits in self.hits.items()}
        result: dict[str, Any] = {}
        for name in VARIANTS:
            result[f"ce_{name}"] = ce[name]
            result[f"top1_{name}"] = top1[name]
        result["ce_recovered"] = ratio(ce["zero"] - ce["sae"], ce["zero"] - ce["clean"])
        result["top1_recovered"] = ratio(top1["zero"] - top1["sae"], top1["zero"] - top1["clean"])
        return result


class Probes(_Judge):
    """Accuracy of probes that were fitted to other images as the model sees them, five-fold.

    Folds are drawn within each class from a fixed seed; every image is judged once, by probes that
    saw neither it nor any embedding but clean ones. ``knn``: the 10 nearest by cosine vote with
    weights exp(cosine / 0.07) (Caron et al. 2021, arXiv 2104.14294). ``linear``: ridge regression
    on the classes' indicators, λ a thousandth of the mean variance. Holds three embeddings an
    image.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.labels: list[Tensor] = []
        self.embedded: dict[str, list[Tensor]] = {name: [] for name in VARIANTS}

    def add(
        self,
        embedded: Mapping[str, Tensor],  # of each variant (b, e)
        labels: Tensor,  # (b,)
    ) -> None:
        """Take in one batch."""
        self.labels.append(labels)
        for name, features in embedded.items():
            self.embedded[name].append(features)

    def result(self) -> dict[str, Any]:
        """knn and linear of each variant, what of them is recovered, and how many images were
        judged; nothing where no two classes have two images."""
        if not self.labels:
            return {}
        labels = torch.cat(self.labels)
        counts = labels.bincount(minlength=self.classes)
        often = counts[labels] > 1
        if int((counts > 1).sum()) < 2:
            return {}
        labels = labels[often]
        seen = {name: torch.cat(parts)[often].double() for name, parts in self.embedded.items()}
        folds = _folds(labels)
        hits = {(probe, name): 0 for probe in ("knn", "linear") for name in VARIANTS}
        for fold in range(_FOLDS):
            out = folds == fold
            wanted = labels[out]
            known = seen["clean"][~out]
            one_hot = F.one_hot(labels[~out], self.classes).double()
            weight, bias = _ridge(known, one_hot)
            for name in VARIANTS:
                asked = seen[name][out]
                votes = {"knn": _vote(known, one_hot, asked), "linear": asked @ weight + bias}
                for probe, scores in votes.items():
                    hits[probe, name] += int((scores.argmax(-1) == wanted).sum())
        result: dict[str, Any] = {"probed_images": len(labels)}
        for probe in ("knn", "linear"):
            share = {name: hits[probe, name] / len(labels) for name in VARIANTS}
            result |= {f"{probe}_{name}": share[name] for name in VARIANTS}
            kept = ratio(share["zero"] - share["sae"], share["zero"] - share["clean"])
            result[f"{probe}_recovered"] = kept
        return result


def _folds(
    labels: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """Each class dealt out in a drawn order, one image a fold in turn."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = drawn[labels[drawn].argsort(stable=True)]
    starts = F.pad(labels.bincount().cumsum(0), (1, 0))[labels[order]]
    rank = torch.arange(len(labels), device=labels.device) - starts
    folds = torch.empty_like(labels)
    folds[order] = rank % _FOLDS
    return folds


def _ridge(
    x: Tensor,  # (N, e) float64
    y: Tensor,  # (N, C)
) -> tuple[Tensor, Tensor]:  # (e, C), (C,)
    mean, centre = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + ridge * eye, centred.T @ (y - centre))
    return weight, centre - mean @ weight


def _vote(
    known: Tensor,  # (N, e)
    one_hot: Tensor,  # (N, C)
    asked: Tensor,  # (n, e)
) -> Tensor:  # (n, C)
    parts = []
    for rows in asked.split(max(1, _BLOCK // len(known))):
        near, which = (rows @ known.T).topk(min(_NEIGHBOURS, len(known)), dim=-1)
        weights = (near / _TEMPERATURE).exp()
        parts.append((weights[..., None] * one_hot[which]).sum(1))
    return torch.cat(parts)
