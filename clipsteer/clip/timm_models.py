"""Image models of timm under open_clip's names: an image tower, and no text tower."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from clipsteer.io.files import FileFormatError, read_safetensors, refuse_nan

TIMM = "timm:"
RANDOM = "random"
_TRUNK = "visual.trunk."


class ImageTower(nn.Module):
    """(B, 3, H, W) -> (B, e), timm's pooled output; `trunk` is timm's model."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.output_dim = getattr(trunk, "head_hidden_size", trunk.num_features)
        self.image_size = data_config(trunk)["input_size"][-2:]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, d)."""
        return self.trunk(pixels)


class ImageModel(nn.Module):
    """A model with an image tower alone; modules of it are named as in open_clip's timm towers."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.visual = ImageTower(trunk)

    def encode_image(
        self,
        pixels: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        """Image features (B, e), not normalised."""
        return self.visual(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """As ``encode_image``."""
        return self.encode_image(pixels)

    def encode_text(self, tokens: Tensor) -> NoReturn:
        """Raises RuntimeError: there is no text tower."""
        raise RuntimeError(no_text("encode_text", "this model"))


def no_text(what: str, name: str) -> str:
    """What to say where a text tower is asked for and there is none."""
    return (
        f"{what} needs a text tower, and {name} has none; load a CLIP, such as 'emojiclip' or "
        "'ViT-B-32'"
    )


class NoTokenizer:
    """Stands where a model without text tower would have its tokenizer, and says so when called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, texts: Any) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(no_text("a tokenizer", self.name))


class Transforms(NamedTuple):
    """PIL image -> (3, H, W), for evaluation and with random crops for training."""

    evaluate: Any
    train: Any


def data_config(trunk: nn.Module) -> dict[str, Any]:
    """What timm says of the pixels that a model takes."""
    from timm.data import resolve_model_data_config

    return resolve_model_data_config(trunk)


def transforms_of(model: ImageModel, crop: float = 0.05, unit_range: bool = False) -> Transforms:
    """Preprocessing of a timm model.

    Args:
        crop: the least share of an image's area that a random crop keeps.
        unit_range: pixels in [0, 1] without mean and deviation, 256 px cut to 224: the published
            recipe of SLCA and MACIL. False is what timm says of the model.
    """
    from timm.data import create_transform
    from torchvision import transforms

    config = data_config(model.visual.trunk)
    if unit_range:
        config |= {
            "mean": (0.0,) * 3,
            "std": (1.0,) * 3,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
        }
    # timm's own crops draw from Python's generator, which seeds of samples do not reach
    train = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["input_size"][-2:], scale=(crop, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    return Transforms(create_transform(**config), train)


def open_timm(name: str, weights: str | None = None) -> ImageModel:
    """A model of timm without its classifier.

    Args:
        name: timm's, such as "vit_base_patch16_224.augreg_in21k".
        weights: a safetensors file of timm's keys; None downloads timm's own, "random" leaves
            random ones.

    Raises:
        ValueError: a name that timm does not know, or a weights file that is not there.
        FileFormatError: weights of another model.
        RuntimeError: timm cannot be imported, or its weights could not be downloaded.
    """
    timm = _timm()
    _check_name(timm, name)
    if weights not in (None, RANDOM) and not Path(weights).is_file():
        raise ValueError(
            f"load: weights of {TIMM}{name} must be a safetensors file, 'random', or None for "
            f"timm's own, got {weights!r}"
        )
    try:
        trunk = timm.create_model(name, pretrained=weights is None, num_classes=0)
    except Exception as error:
        if weights is not None:
            raise
        raise RuntimeError(
            f"load: timm's weights of {name} could not be had ({error}); pass a safetensors file "
            "as pretrained, or 'random'"
        ) from error
    if weights not in (None, RANDOM):
        _load(trunk, name, Path(weights))
    if weights != RANDOM:
        refuse_nan(weights or f"{TIMM}{name}", trunk.state_dict(), infinity=True)
    return ImageModel(trunk)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError(
            f"timm could not be imported ({error}); install it with: pip install timm"
        ) from error
    return timm


def _check_name(timm: Any, name: str) -> None:
    known, _, tag = name.partition(".")
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise ValueError(f"load: timm has no model {name!r}{hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{known}.*")]
    if tag and tags and tag not in tags:
        raise ValueError(f"load: timm's weights of {known} are {', '.join(tags)}; got {tag!r}")


def _load(trunk: nn.Module, name: str, weights: Path) -> None:
    # a run of ours keeps the whole model; timm's own files also hold a classifier
    tensors = {
        key.removeprefix(_TRUNK): tensor
        for key, tensor in read_safetensors(weights).items()
        if not key.startswith("head.")
    }
    try:
        trunk.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileFormatError(
            f"{weights}: cannot be loaded as weights of {name}: {error}"
        ) from error
