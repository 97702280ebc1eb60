"""Zero-shot classifier heads from class names and prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsteer.clip.axes import first_of
from clipsteer.clip.hooks import evaluating
from clipsteer.clip.model import CLIP, EMOJICLIP
from clipsteer.clip.pixels import image_embeddings
from clipsteer.io.names import spoken

SIMPLE_TEMPLATES = ("a photo of a {}.",)

# the seven prompts that OpenAI's CLIP authors chose out of eighty for ImageNet
CLIP_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# those that EmojiCLIP was trained with
EMOJI_TEMPLATES = (
    "{}",
    "a picture of {}",
    "an emoji of {}",
    "a drawing of {}",
    "an icon of {}",
    "a small image of {}",
    "the {}",
)


def zero_shot_head(
    clip: CLIP,
    classnames: Sequence[str],
    templates: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Classifier weights from class names: (C, e), unit rows; logits are
    ``logit_scale.exp() * image_features @ head.T``.

    head_c = normalize(mean over templates of normalize(encode_text(template.format(name_c)))): the
    prompt ensemble of Radford et al. 2021 (arXiv 2103.00020, section 3.1.4).

    Args:
        classnames: C names.
        templates: strings with one "{}"; by default EMOJI_TEMPLATES for "emojiclip", CLIP_TEMPLATES
            otherwise.

    Raises:
        ValueError: no class name, no template, a template without "{}", or a model without text
            tower.
    """
    clip.need_text("zero_shot_head")
    if templates is None:
        templates = EMOJI_TEMPLATES if clip.name == EMOJICLIP else CLIP_TEMPLATES
    if isinstance(classnames, str) or not classnames:
        raise ValueError(
            f"zero_shot_head: classnames must be a non-empty list of strings, got {classnames!r}"
        )
    if isinstance(templates, str) or not templates or any("{}" not in t for t in templates):
        raise ValueError(
            f"zero_shot_head: templates must be a list of strings with '{{}}', got {templates!r}"
        )
    texts = [template.format(name) for name in classnames for template in templates]
    parts = []
    with evaluating(clip):
        for at in range(0, len(texts), batch_size):
            tokens = clip.tokenizer([*map(spoken, texts[at : at + batch_size])])
            parts.append(first_of(clip.model.encode_text(tokens.to(clip.device))))
    rows = F.normalize(torch.cat(parts), dim=-1)  # (C·n, e)
    features = rows.unflatten(0, (len(classnames), len(templates)))  # (C, n, e)
    return F.normalize(features.mean(1), dim=-1)


def prototype_head(clip: CLIP, dataset: Any, batch_size: int = 128) -> Tensor:
    """Classifier weights from images, for towers without text: (C, e), unit rows.

    head_c = normalize(mean of the unit embeddings of the images of class c). dataset: with
    ``classes`` and integer ``targets``. Raises ValueError for a class without images.
    """
    rows = torch.cat(list(image_embeddings(clip, dataset, batch_size, "class means")))
    targets = torch.tensor(dataset.targets, device=rows.device)
    counts = torch.bincount(targets, minlength=len(dataset.classes))
    if not bool(counts.all()):
        name = dataset.classes[int(counts.argmin())]
        raise ValueError(f"prototype_head: no image shows class {name!r}")
    return mean_directions(rows, targets, len(counts))


def mean_directions(
    rows: Tensor,  # (N, e)
    labels: Tensor,  # (N,) int64
    classes: int,
) -> Tensor:  # (classes, e), unit rows, 0 of a class without rows
    """The direction of each class's mean."""
    sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)
    return F.normalize(sums, dim=-1)
