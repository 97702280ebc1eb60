"""Image models of timm under open_clip's names: an image tower, and no text tower."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from clipsteer.clip.hooks import evaluating
from clipsteer.clip.patches import check_whole
from clipsteer.clip.positions import ANTIALIAS, origin_of, set_timm_size
from clipsteer.clip.published import is_old_run, told
from clipsteer.clip.setup import NOTHING, TIMM_DATA, Asked, check_preprocess, read_setup
from clipsteer.io.files import FileFormatError, read_safetensors, refuse_nan

logger = logging.getLogger(__name__)

TIMM = "timm:"
RANDOM = "random"
_TRUNK = "visual.trunk."


class ImageTower(nn.Module):
    """(B, 3, H, W) -> (B, e), timm's pooled output; `trunk` is timm's model.

    preprocess: timm's data configuration; by default what timm says of the model.
    """

    def __init__(self, trunk: nn.Module, preprocess: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.position_interpolation = ANTIALIAS
        self.trunk = trunk
        self.output_dim = getattr(trunk, "head_hidden_size", trunk.num_features)
        # under the name that open_clip's towers have for theirs
        self.preprocess_cfg = dict(preprocess or data_config(trunk))
        self.image_size = self.preprocess_cfg["input_size"][-2:]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, d)."""
        return self.trunk(pixels)


class ImageModel(nn.Module):
    """A model with an image tower alone; modules of it are named as in open_clip's timm towers."""

    has_text = False
    lacks_text = ""  # why, where it is not by nature

    def __init__(self, trunk: nn.Module, preprocess: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.visual: Any = ImageTower(trunk, preprocess)

    def encode_image(
        self,
        pixels: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        """Image features (B, e), not normalised."""
        return self.visual(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """As ``encode_image``."""
        return self.encode_image(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raises RuntimeError: there is no text tower."""
        raise RuntimeError(no_text("encode_text", "this model"))


def no_text(what: str, name: str, why: str = "") -> str:
    """What to say where a text tower is asked for and there is none."""
    return (
        f"{what} needs a text tower, and {name} has none{f' ({why})' if why else ''}; load a CLIP, "
        "such as 'emojiclip' or 'ViT-B-32'"
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


# pixels in [0, 1] without mean and deviation, 256 px cut to 224: the recipe of MACIL
UNIT_RANGE = {
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
}


def transforms_of(model: ImageModel, crop: float = 0.05) -> Transforms:
    """Preprocessing of a timm model, as its setup says.

    crop: the least share of an image's area that a random crop keeps.
    """
    from timm.data import create_transform
    from torchvision import transforms

    config = model.visual.preprocess_cfg
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


def open_timm(name: str, weights: str | None = None, asked: Asked = NOTHING) -> ImageModel:
    """A model of timm without its classifier.

    Args:
        name: timm's, such as "vit_base_patch16_224.augreg_in21k".
        weights: a safetensors file of timm's keys; None downloads timm's own, "random" leaves
            random ones.
        asked: how it is set up.

    Raises:
        ValueError: a name that timm does not know, a weights file that is not there, or a setup
            that the model cannot have.
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
    if asked.quick_gelu:
        raise ValueError(
            f"load: force_quick_gelu is for open_clip's models; timm names its own, such as "
            f"{TIMM}vit_base_patch32_clip_quickgelu_224, got {TIMM}{name}"
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
    file = None if weights in (None, RANDOM) else Path(weights)
    asked = asked.knowing(weights)
    cfg = _preprocess(timm, name, trunk, file, asked)
    like = name
    if isinstance(asked.preprocess, str):
        like = f"{name.partition('.')[0]}.{asked.preprocess}"
    # what is written by a version that had one rule alone was made by it
    origin = ANTIALIAS if file is not None and is_old_run(file) else origin_of(like)
    rule = asked.rule(origin)
    own = tuple(data_config(trunk)["input_size"])[-2:]
    size = tuple(cfg["input_size"][-2:])
    kept = own if asked.known is None else asked.known.image_size
    check_whole(TIMM + name, trunk, size, own, kept)
    try:
        if file is not None:
            written = read_setup(file)
            sizes = (own, size) if written is None else (written.image_size, own, size)
            _load(trunk, name, file, own, sizes, rule)
        elif size != own:
            set_timm_size(trunk, size, rule)
    except (ValueError, AssertionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise ValueError(f"load: {TIMM}{name}: {error}") from error
    if weights != RANDOM:
        refuse_nan(weights or f"{TIMM}{name}", trunk.state_dict(), infinity=True)
    model = ImageModel(trunk, cfg)
    model.visual.position_interpolation = rule
    if size != own:
        check_size(f"{TIMM}{name}", model, size)
    return model


def _preprocess(
    timm: Any, name: str, trunk: nn.Module, file: Path | None, asked: Asked
) -> dict[str, Any]:
    """The data configuration: what is asked for, then what was written with the weights, then
    timm's."""
    cfg = data_config(trunk)
    known, _, tag = name.partition(".")
    if asked.known is not None:
        if "input_size" not in asked.known.preprocess:
            raise FileFormatError(f"{file}: weights of a model of open_clip's, not of {TIMM}{name}")
        cfg = check_preprocess(asked.known.preprocess, TIMM_DATA)
    elif file is not None and not tag and asked.preprocess is None:
        _warn_of_others(timm, known, file, cfg)
    if isinstance(asked.preprocess, str):
        tags = _tags(timm, known)
        if asked.preprocess not in tags:
            raise ValueError(
                f"load: preprocess must be one of timm's tags of {known}, {', '.join(tags)}, or a "
                f"dictionary with fields of {', '.join(TIMM_DATA)}; got {asked.preprocess!r}"
            )
        cfg = _published(timm, f"{known}.{asked.preprocess}")
    elif asked.preprocess is not None:
        cfg = {**cfg, **check_preprocess(asked.preprocess, TIMM_DATA)}
    if asked.image_size is not None:
        cfg = {**cfg, "input_size": (3, *asked.image_size)}
    return cfg


def _tags(timm: Any, known: str) -> list[str]:
    return [full.partition(".")[2] for full in timm.list_pretrained(f"{known}.*")]


def _published(timm: Any, name: str) -> dict[str, Any]:
    from timm.data import resolve_data_config

    return resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


def _warn_of_others(timm: Any, known: str, file: Path, taken: dict[str, Any]) -> None:
    others: dict[str, str] = {}
    for tag in _tags(timm, known):
        cfg = _published(timm, f"{known}.{tag}")
        if cfg != taken:
            others.setdefault(told(cfg), tag)
    if others:
        logger.warning(
            "%s: the file does not say how its images are preprocessed, and weights of timm's %s "
            "are published with several ways; taken is %s. If the model was trained otherwise, "
            "pass preprocess=TAG (--preprocess TAG), one of %s",
            file,
            known,
            told(taken),
            ", ".join(others.values()),
        )


def check_size(name: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Look at a blank image of the size. Raises ValueError where that fails."""
    try:
        with evaluating(model):
            model(torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"load: {name} cannot see {size[0]}x{size[1]} images: {error}") from error


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
    tags = _tags(timm, known)
    if tag and tags and tag not in tags:
        raise ValueError(f"load: timm's weights of {known} are {', '.join(tags)}; got {tag!r}")


def _load(
    trunk: nn.Module,
    name: str,
    weights: Path,
    own: tuple[int, int],  # (height, width) of the trunk
    sizes: tuple[tuple[int, int], ...],  # (height, width): what it may have; the one wanted
    rule: str,
) -> None:
    # a run of ours keeps the whole model; timm's own files also hold a classifier, under a name
    # that differs from model to model
    keys = trunk.state_dict().keys()
    classifier = getattr(trunk, "pretrained_cfg", {}).get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = {
        key.removeprefix(_TRUNK): tensor for key, tensor in read_safetensors(weights).items()
    }
    tensors = {
        key: tensor
        for key, tensor in tensors.items()
        if key in keys or not key.startswith(tuple(f"{name}." for name in names))
    }
    now = own
    try:
        # the weights tell which of the sizes they have; from there they are resampled once
        for size in dict.fromkeys(sizes):
            if size != now:
                # shapes alone: what is resampled here is filled in below
                set_timm_size(trunk, size, ANTIALIAS)
                now = size
            if _fits(trunk, tensors):
                break
        trunk.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileFormatError(
            f"{weights}: cannot be loaded as weights of {name}: {error}"
        ) from error
    if now != sizes[-1]:
        set_timm_size(trunk, sizes[-1], rule)


def _fits(trunk: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    own = trunk.state_dict()
    return all(key not in own or own[key].shape == x.shape for key, x in tensors.items())
