"""A CLIP image tower with a linear head: built from a zero-shot head, saved, loaded, run over
images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.model import CLIP, load
from clipsteer.io.files import (
    FileFormatError,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)


class ImageClassifier(nn.Module):
    """An image tower and a linear head on its unit embeddings: logits = W · normalize(visual(x)) +
    b.

    Args:
        visual: the tower, shared with the model that it belongs to.
        weight: (C, e), with the logit scale in it.
    """

    def __init__(self, visual: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
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

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> unit embeddings (B, e)."""
        out = self.visual(images)
        return F.normalize(
            (out[0] if isinstance(out, tuple | list) else out).to(self.head.weight.dtype), dim=-1
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def zero_shot_classifier(clip: CLIP, head: Tensor) -> ImageClassifier:
    """The classifier that fine-tuning starts from. head: (C, e) unit rows, as `clip.zero_shot_head`
    gives them."""
    if head.ndim != 2:
        raise ValueError(
            f"zero_shot_classifier: head must have shape (C, e), got {tuple(head.shape)}"
        )
    with torch.no_grad():
        return ImageClassifier(
            clip.model.visual, head.to(clip.device) * clip.model.logit_scale.exp()
        )


def save_classifier(
    folder: str | Path,
    clip: CLIP,
    classifier: ImageClassifier,
    classes: Sequence[str],
    **notes: Any,
) -> Path:
    """Write model.safetensors (the whole CLIP, which `clip.load(name, file)` reads),
    head.safetensors, config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", clip.model.state_dict(), {"format": "pt"})
    write_safetensors(folder / "head.safetensors", classifier.head.state_dict(), {"format": "pt"})
    write_json(folder / "config.json", {"model": clip.name, "classes": list(classes), **notes})
    return folder


def load_classifier(
    folder: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[CLIP, ImageClassifier, list[str]]:
    """The CLIP, the classifier on its image tower, and the class names, from a folder of
    `save_classifier`.

    Raises:
        FileFormatError: a file that is damaged or does not fit the others. FileNotFoundError: one
            is not there.
        RuntimeError: a model of an "hf-hub:" name whose description could not be downloaded.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    name, classes = (
        (config.get("model"), config.get("classes")) if isinstance(config, dict) else (None, None)
    )
    if (
        not isinstance(name, str)
        or not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
    ):
        raise FileFormatError(
            f"{folder / 'config.json'}: expected a model name and a list of class names"
        )
    head = read_safetensors(folder / "head.safetensors", allow_nan=False)
    c = len(classes)
    shapes = {key: tuple(tensor.shape) for key, tensor in head.items()}
    if (
        shapes.keys() != {"weight", "bias"}
        or len(shapes["weight"]) != 2
        or (shapes["weight"][0], shapes["bias"]) != (c, (c,))
        or not all(tensor.is_floating_point() for tensor in head.values())
    ):
        raise FileFormatError(
            f"{folder / 'head.safetensors'}: expected weight ({c}, e) and bias ({c},), got {shapes}"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: the image tower's weights are not there")
    if ":" in name:
        clip = load(name, device=device)
        try:
            clip.model.load_state_dict(read_safetensors(weights))
        except RuntimeError as error:
            raise FileFormatError(
                f"{weights}: cannot be loaded as weights of {name}: {error}"
            ) from error
    else:
        clip = load(name, weights, device=device)
    width = getattr(
        clip.model.visual, "output_dim", shapes["weight"][1]
    )  # timm's towers do not say
    if shapes["weight"][1] != width:
        raise FileFormatError(
            f"{folder / 'head.safetensors'}: a head on embeddings of width {shapes['weight'][1]}, "
            f"{name} gives {width}"
        )
    classifier = ImageClassifier(
        clip.model.visual, head["weight"].to(device), head["bias"].to(device)
    ).eval()
    return clip, classifier, classes


@torch.no_grad()
def predict(classifier: ImageClassifier, batches: Iterable[Tensor]) -> Tensor:
    """Logits (N, C) in float32 on the CPU, in eval mode; the mode comes back."""
    mode = classifier.training
    classifier.eval()
    try:
        return torch.cat([classifier(pixels).float().cpu() for pixels in batches])
    finally:
        classifier.train(mode)
