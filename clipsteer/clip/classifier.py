"""A CLIP image tower with a linear head: built from a zero-shot head, saved, loaded, run over
images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.axes import first_of
from clipsteer.clip.model import CLIP, load
from clipsteer.clip.runs import ARCHITECTURE, CONFIG, WEIGHTS, read_run
from clipsteer.clip.setup import header_of
from clipsteer.io.doors import door
from clipsteer.io.files import (
    FileFormatError,
    read_json,
    read_safetensors,
    refuse_nan,
    write_json,
    write_safetensors,
)

HEAD = "head.safetensors"


class ImageClassifier(nn.Module):
    """An image tower and a linear head on its unit embeddings: logits = W · normalize(visual(x)) +
    b.

    Args:
        visual: the tower, shared with the model that it belongs to.
        weight: one row a class, with the logit scale in it.
        bias: by default 0.
    """

    def __init__(
        self,
        visual: nn.Module,
        weight: Tensor,  # (C, e)
        bias: Tensor | None = None,  # (C,)
    ) -> None:
        super().__init__()
        self.visual = visual
        classes, width = weight.shape
        # no random start: the caller's generator is left alone
        self.head = nn.utils.skip_init(
            nn.Linear, width, classes, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_() if bias is None else self.head.bias.copy_(bias)

    def features(
        self,
        images: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        """Unit embeddings (B, e)."""
        features = first_of(self.visual(images))
        return F.normalize(features.to(self.head.weight.dtype), dim=-1)

    def forward(
        self,
        images: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        """Logits (B, C)."""
        return self.head(self.features(images))


def zero_shot_classifier(
    clip: CLIP,
    head: Tensor,  # (C, e), unit rows
    scale: float | None = None,
) -> ImageClassifier:
    """The classifier that fine-tuning starts from, of a head as `zero_shot_head` gives it.

    scale: of the logits; None is the model's logit scale.

    Raises ValueError for a head of another shape, and without a scale for a model without text
    tower, which has none.
    """
    if scale is None:
        clip.need_text("zero_shot_classifier")
    if head.ndim != 2:
        raise ValueError(
            f"zero_shot_classifier: head must have shape (C, e), got {tuple(head.shape)}"
        )
    with torch.no_grad():
        factor = clip.model.logit_scale.exp() if scale is None else scale
        weight = head.to(clip.device) * factor
        return ImageClassifier(clip.model.visual, weight)


def save_classifier(
    folder: str | Path,
    clip: CLIP,
    classifier: ImageClassifier,
    classes: Sequence[str],
    **notes: Any,
) -> Path:
    """Write model.safetensors (the whole CLIP), head.safetensors and config.json, a folder that
    ``clipsteer.load`` reads; of a model of an architecture file also that file.

    notes: JSON-able facts, kept in config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, clip.model.state_dict(), header_of(clip.setup))
    write_safetensors(folder / HEAD, classifier.head.state_dict(), {"format": "pt"})
    name = clip.name
    if name.endswith(".json"):
        name = ARCHITECTURE
        write_json(folder / name, read_json(clip.name))
    write_json(folder / CONFIG, {"model": name, "classes": list(classes), **notes})
    return folder


@door
def load_classifier(
    folder: str | Path, *, device: str | torch.device = "cpu", **setup: Any
) -> tuple[CLIP, ImageClassifier, list[str]]:
    """The CLIP, the classifier on its image tower, and the class names, from a folder of
    `save_classifier`.

    setup: preprocess, force_quick_gelu and force_image_size of ``clipsteer.load``.

    Raises:
        FileFormatError: a file that is damaged or does not fit the others. FileNotFoundError: one
            is not there.
        RuntimeError: a model of an "hf-hub:" name whose description could not be downloaded.
    """
    folder = Path(folder)
    run = read_run(folder)
    classes = run.config.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise FileFormatError(f"{folder / CONFIG}: expected a model name and a list of class names")
    weight, bias = _read_head(folder / HEAD, len(classes))
    clip = load(run.model, run.weights, device=device, **setup)
    width = weight.shape[1]
    given = getattr(clip.model.visual, "output_dim", width)  # open_clip's timm towers do not say
    if width != given:
        raise FileFormatError(
            f"{folder / HEAD}: a head on embeddings of width {width}, {run.model} gives {given}"
        )
    classifier = ImageClassifier(clip.model.visual, weight.to(device), bias.to(device))
    return clip, classifier.eval(), classes


def _read_head(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Weight (C, e) and bias (C,)."""
    head = read_safetensors(path)
    refuse_nan(path, head, infinity=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
    if (
        shapes.keys() != {"weight", "bias"}
        or len(shapes["weight"]) != 2
        or shapes["weight"][0] != classes
        or shapes["bias"] != (classes,)
        or not all(tensor.is_floating_point() for tensor in head.values())
    ):
        raise FileFormatError(
            f"{path}: expected weight ({classes}, e) and bias ({classes},), got {shapes}"
        )
    return head["weight"], head["bias"]


@torch.no_grad()
def predict(
    classifier: ImageClassifier,
    batches: Iterable[Tensor],  # (B, 3, H, W) each
) -> Tensor:
    """Logits (N, C) in float32 on the CPU, in eval mode; the mode comes back."""
    mode = classifier.training
    classifier.eval()
    try:
        return torch.cat([classifier(pixels).float().cpu() for pixels in batches])
    finally:
        classifier.train(mode)
