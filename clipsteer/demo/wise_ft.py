"""The demo's WiSE-FT curve: EmojiCLIP tuned to the one style it was not trained on, and averaged
with what it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipsteer.clip.classifier import ImageClassifier, zero_shot_classifier
from clipsteer.clip.model import CLIP, EMOJICLIP, load
from clipsteer.clip.pixels import pixel_batches
from clipsteer.clip.zero_shot import zero_shot_head
from clipsteer.data.dataset import ImageDataset
from clipsteer.data.emoji import HELD_OUT_STYLE, EmojiStyles, Split, classify30, split
from clipsteer.ensembles import robustness
from clipsteer.ensembles.finetuning import FinetuneConfig, finetune
from clipsteer.ensembles.robustness import EvalSet, curve

# what benchmarks/wise_ft.py took on validation concepts for this style:
# benchmarks/results/wise_ft_emoji
HEAD = "labels"
LR = 1e-3
EPOCHS = 5
BATCH = 64
ALPHAS = tuple(i / 10 for i in range(11))
STYLES = EmojiStyles.styles
ELSEWHERE = (
    "The demo does this for EmojiCLIP and the bundled drawings alone. For your own: clipsteer "
    "finetune tunes a model, and clipsteer wise-ft curve draws the curve from what that leaves; "
    "both have examples under --help."
)


def measure(
    seed: int,
    device: str = "cpu",
    *,
    parts: Split | None = None,
    epochs: int = EPOCHS,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """The rows of ``robustness.curve`` for one seed, and the settings; ``parts`` is by default
    Classify-30 whole."""
    parts = parts or split()
    chosen = {"lr": LR, "epochs": epochs, "batch_size": BATCH}
    tests = evaluation_sets(HELD_OUT_STYLE, parts.test, device)
    rows = tuned_curve(
        HELD_OUT_STYLE, parts, HEAD, chosen, tests, seed=seed, alphas=alphas, device=device
    )
    return {
        "style": HELD_OUT_STYLE,
        "seed": seed,
        "head": HEAD,
        **chosen,
        "training_concepts": len(parts.fit + parts.validation),
        "test_concepts": len(parts.test),
        "rows": rows,
    }


def heads(clip: CLIP, concepts: Sequence[int]) -> dict[str, Tensor]:
    """Two zero-shot heads (30, e): from the subcategories' names, and the mean over the labels of
    their concepts."""
    bundled = EmojiStyles().concepts
    drawn = [bundled[i] for i in concepts]
    classes = sorted({concept.subcategory for concept in drawn})
    labels = zero_shot_head(clip, [concept.label for concept in drawn])  # (concepts, e)
    rows = [classes.index(concept.subcategory) for concept in drawn]
    sums = torch.zeros(len(classes), labels.shape[1], device=labels.device)
    sums.index_add_(0, torch.tensor(rows, device=labels.device), labels)
    names = zero_shot_head(clip, [name.replace("-", " ") for name in classes])
    return {"names": names, "labels": F.normalize(sums, dim=-1)}


def tune(
    clip: CLIP,
    dataset: ImageDataset,
    head: Tensor,  # (C, e)
    **settings: Any,
) -> ImageClassifier:
    """Fine-tune the image tower; ``settings`` are fields of FinetuneConfig."""
    # 17 tokens an image: on a CPU the plain attention is quicker than the flash kernel's backward
    with sdpa_kernel(SDPBackend.MATH) if clip.device.type == "cpu" else nullcontext():
        return finetune(clip, dataset, head, FinetuneConfig(**settings))


def evaluation_sets(style: str, concepts: Sequence[int], device: str = "cpu") -> list[EvalSet]:
    """Classify-30's drawings of the concepts: in `style` for reference, in each other style as a
    shift."""
    clip = load(EMOJICLIP, device=device)

    def drawn(style: str, role: Literal["reference", "shifted"]) -> EvalSet:
        images = classify30(style, concepts)
        batches = list(pixel_batches(clip, images))
        return EvalSet(style, role, lambda: batches, torch.tensor(images.targets))

    others = [other for other in STYLES if other != style]
    return [drawn(style, "reference"), *(drawn(other, "shifted") for other in others)]


def tuned_curve(
    style: str,
    parts: Split,
    head_name: str,
    settings: dict[str, Any],
    tests: Sequence[EvalSet],
    *,
    seed: int = 0,
    alphas: Sequence[float] = robustness.ALPHAS,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Tune EmojiCLIP on the training concepts in one style, with one seed: the rows of
    `robustness.curve`."""
    training = sorted(parts.fit + parts.validation)
    clip = load(EMOJICLIP, device=device)
    head = heads(clip, training)[head_name]
    # tuning changes the tower in place
    zeroshot = {}
    for name, value in zero_shot_classifier(clip, head).state_dict().items():
        zeroshot[name] = value.detach().clone()
    tuned = tune(clip, classify30(style, training), head, **settings, seed=seed)
    return curve(zeroshot, tuned, tests, alphas)
