"""An SAE with the model whose activations it explains, and what images are told apart by there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipsteer.clip.model import CLIP, EMOJICLIP
from clipsteer.clip.zero_shot import SIMPLE_TEMPLATES, prototype_head, zero_shot_head
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
        dataset: Any,
        *,
        words: Sequence[str] | None = None,
        hook_point: str | None = None,
        tokens: str | None = None,
        target_hook_point: str | None = None,
    ) -> Explained:
        """As asked for, else as the SAE's metadata say; ``words`` are answers where the data set
        has fewer than two classes.

        Raises ValueError as ``find_site`` and ``find_target`` do.
        """
        site = find_site(sae, clip, hook_point, tokens)
        target = find_target(sae, clip, site, target_hook_point)
        return cls(sae, clip, site, target, find_predictions(clip, dataset, words))


def templates_of(clip: CLIP) -> tuple[str, ...]:
    """The prompts for words of any kind: the bundled model takes drawings, others photos."""
    return ("{}",) if clip.name == EMOJICLIP else SIMPLE_TEMPLATES


@torch.no_grad()
def find_predictions(clip: CLIP, dataset: Any, words: Sequence[str] | None) -> Predictions | None:
    """By the names of a data set's classes where there are two, else by the words; of a tower
    without text by class means; None where there are none."""
    classes = told_apart(dataset)
    names = [name.replace("_", " ") for name in classes] if classes else list(words or [])
    if clip.has_text and names:
        head = zero_shot_head(clip, names, None if clip.name == EMOJICLIP else templates_of(clip))
        return Predictions(names, head.float(), "text")
    if classes:
        return Predictions(names, prototype_head(clip, dataset).float(), "class means")
    return None
