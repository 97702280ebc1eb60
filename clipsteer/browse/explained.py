"""An SAE with the model whose activations it explains, and what images are told apart by there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.clip.model import CLIP, EMOJICLIP
from clipsteer.clip.pixels import image_embeddings
from clipsteer.clip.zero_shot import SIMPLE_TEMPLATES, mean_directions, zero_shot_head
from clipsteer.data.dataset import told_apart
from clipsteer.sae.model import SAE
from clipsteer.sae.site import LOGIT_SCALE, Site, find_site, find_target


@dataclass(frozen=True)
class Predictions:
    """What images are told apart by: p = softmax(100 · image · headᵀ).

    Attributes:
        names: (C,) the answers.
        head: (C, e) unit rows, on the model's device.
        how: "text", or "class means" where a tower without text has the mean embedding of each
            class instead.
    """

    names: list[str]
    head: Tensor  # (C, e)
    how: str

    def of(
        self,
        embeddings: Tensor,  # (B, e), unit rows
    ) -> Tensor:  # (B, C)
        """Probabilities, in float32."""
        return (LOGIT_SCALE * embeddings.float() @ self.head.T).softmax(-1)


@dataclass(frozen=True)
class Explained:
    """An SAE at its place in a model.

    Attributes:
        site: where it reads: hook point and tokens.
        target: where what it gives belongs; of a transcoder another module.
        predictions: None where neither text nor classes tell images apart.
    """

    sae: SAE
    clip: CLIP
    site: Site
    target: Site
    predictions: Predictions | None

    @classmethod
    def find(
        cls,
        sae: SAE,
        clip: CLIP,
        *,
        hook_point: str | None = None,
        tokens: str | None = None,
        target_hook_point: str | None = None,
        predictions: Predictions | None = None,
    ) -> Explained:
        """As asked for, else as the SAE's metadata say.

        Raises ValueError as ``find_site`` and ``find_target`` do.
        """
        site = find_site(sae, clip, hook_point, tokens)
        target = find_target(sae, clip, site, target_hook_point)
        return cls(sae, clip, site, target, predictions)


class Labelled(NamedTuple):
    """What a data set says of its images."""

    classes: list[str]  # as they are spoken
    labels: Tensor  # (N,) int64, -1 where there is none


def labelled(clip: CLIP, dataset: Any) -> Labelled | None:
    """Classes and labels where there are two classes at least; for a tower without text, which
    knows classes by their images, of the classes that have any."""
    classes = told_apart(dataset)
    targets = getattr(dataset, "targets", None)
    if classes is None or targets is None or len(targets) != len(dataset):
        return None
    spoken = [name.replace("_", " ") for name in classes]
    labels = torch.as_tensor(targets).long()
    labels = torch.where((labels >= 0) & (labels < len(classes)), labels, -1)
    if clip.has_text:
        return Labelled(spoken, labels)
    there = labels[labels >= 0].unique()
    if len(there) < 2:
        return None
    place = torch.full((len(classes) + 1,), -1)
    place[there] = torch.arange(len(there))
    return Labelled([spoken[i] for i in there.tolist()], place[labels])


def templates_of(clip: CLIP) -> tuple[str, ...]:
    """The prompts for words of any kind: the bundled model takes drawings, others photos."""
    return ("{}",) if clip.name == EMOJICLIP else SIMPLE_TEMPLATES


@torch.no_grad()
def find_predictions(
    clip: CLIP,
    dataset: Any,
    words: Sequence[str] | None,
    embeddings: Tensor | None = None,  # (N, e), unit rows
) -> Predictions | None:
    """By the names of a data set's classes where there are two, else by the words; of a tower
    without text by class means; None where there are none.

    embeddings: of all images, where they are known.
    """
    known = labelled(clip, dataset)
    names = list(words or []) if known is None else known.classes
    if clip.has_text and names:
        # all prompts of the bundled model, which is small
        templates = None if clip.name == EMOJICLIP else templates_of(clip)
        return Predictions(names, zero_shot_head(clip, names, templates).float(), "text")
    if known is None:
        return None
    if embeddings is None:
        embeddings = torch.cat(list(image_embeddings(clip, dataset, 64, "class means")))
    there = known.labels >= 0
    rows = embeddings[there].to(clip.device, torch.float32)
    labels = known.labels[there].to(clip.device)
    return Predictions(names, mean_directions(rows, labels, len(names)), "class means")
