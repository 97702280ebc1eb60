"""Models of transformers under clipsteer's names: image towers, and the text towers of CLIPs.

The towers are transformers' own modules and run its own code; their parts are registered anew, so
that hook points are called as in timm's and open_clip's towers: ``visual.trunk.blocks.N`` and
``text.transformer.resblocks.N``. Inside of a block names are transformers'.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.hf_preprocess import preprocess_of
from clipsteer.clip.hf_towers import Rule, Text, Trunk
from clipsteer.clip.patches import check_whole
from clipsteer.clip.positions import ANTIALIAS, BICUBIC
from clipsteer.clip.setup import NOTHING, TIMM_DATA, Asked, check_preprocess
from clipsteer.clip.timm_models import RANDOM, ImageModel, NoTokenizer, check_size
from clipsteer.io.files import FileFormatError, read_safetensors, refuse_nan
from clipsteer.io.weights import check_weights_file

logger = logging.getLogger(__name__)

HF = "hf:"
# model_type -> the class that gives features, and how its own code resamples positions; None where
# it has no table, or resamples it in a way that is no choice
_KINDS: dict[str, tuple[str, str | None]] = {
    "clip": ("CLIPModel", BICUBIC),
    "clip_vision_model": ("CLIPVisionModel", BICUBIC),
    "metaclip_2": ("MetaClip2Model", BICUBIC),
    "metaclip_2_vision_model": ("MetaClip2VisionModel", BICUBIC),
    "siglip": ("SiglipModel", BICUBIC),
    "siglip_vision_model": ("SiglipVisionModel", BICUBIC),
    "siglip2": ("Siglip2Model", None),
    "siglip2_vision_model": ("Siglip2VisionModel", None),
    "dinov2": ("Dinov2Model", BICUBIC),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", ANTIALIAS),
    "dinov3_vit": ("DINOv3ViTModel", None),
    "vit": ("ViTModel", BICUBIC),
}
# image towers that keep the projection of their CLIP
_PROJECTED = ("CLIPVisionModelWithProjection", "MetaClip2VisionModelWithProjection")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class HFModel(ImageModel):
    """An image tower of transformers; with a text tower a CLIP.

    whole: transformers' model, whose logit scale and bias are kept.
    """

    def __init__(self, trunk: Trunk, preprocess: dict[str, Any], whole: Any, text: Any) -> None:
        super().__init__(trunk, preprocess)
        self.text = text
        self.has_text = text is not None
        if text is not None:
            self.logit_scale = whole.logit_scale
            self.logit_bias = getattr(whole, "logit_bias", None)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features (B, e), not normalised. Raises RuntimeError without text tower."""
        return super().encode_text(tokens) if self.text is None else self.text(tokens)

    def forward(self, pixels: Tensor, tokens: Tensor | None = None) -> Any:
        """As ``encode_image``; with tokens (B, L), unit features of both and the logit scale."""
        image = self.encode_image(pixels)
        if tokens is None:
            return image
        texts = F.normalize(self.encode_text(tokens), dim=-1)
        return F.normalize(image, dim=-1), texts, self.logit_scale.exp()


class Tokenizer:
    """Strings -> (n, context) token ids, padded as CLIPs and SigLIPs are trained."""

    def __init__(self, tokenizer: Any, context: int, lower: bool) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.lower = lower

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n strings -> (n, context) int64."""
        texts = [text.lower() if self.lower else text for text in texts]
        given = {"padding": "max_length", "truncation": True, "max_length": self.context}
        return self.tokenizer(texts, return_tensors="pt", **given).input_ids


def import_transformers() -> Any:
    """The package. Raises RuntimeError where it cannot be imported, with the remedy."""
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"transformers could not be imported ({error}); install it with: "
            "pip install clipsteer[hf]"
        ) from error
    return transformers


def open_hf(name: str, weights: str | None = None, asked: Asked = NOTHING) -> tuple[HFModel, Any]:
    """A model of transformers with its tokenizer.

    Args:
        name: a folder with config.json, or ORG/NAME on the hub.
        weights: None for its own, "random", or what a run of clipsteer wrote.
        asked: how it is set up.

    Raises:
        ValueError: no such folder, a kind of model that is not known, weights that are not there,
            or a setup that the model cannot have.
        FileFormatError: a damaged folder, or one that lacks weights of the model.
        RuntimeError: transformers cannot be imported; nothing could be downloaded.
    """
    transformers = import_transformers()
    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"load: no such folder: {name}; write {HF}PATH or {HF}ORG/NAME")
    if weights not in (None, RANDOM) and not Path(weights).is_file():
        raise ValueError(
            f"load: {HF}{name} brings its own weights; pretrained must be None, 'random' or a "
            f"weights file of a run, got {weights!r}"
        )
    if local:
        _check_folder(Path(name))
    refuse = _refusal(name, local)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = _kind(transformers, config)
        more = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        if weights is not None:
            whole = kind(config, **more)
        else:
            whole, info = kind.from_pretrained(name, output_loading_info=True, **more)
            # an unused token of masked images is all that may be lacking
            lacking = sorted(key for key in info["missing_keys"] if "mask_token" not in key)
            if lacking:
                raise FileFormatError(f"{name}: lacks weights of its model: {lacking[:3]} …")
    except (OSError, KeyError, RuntimeError) as error:
        refuse(error)
    tokenizer = tokenizer_of(whole, name)
    file = Path(weights) if weights not in (None, RANDOM) else None
    model = wrap(whole, HF + name, name if local else None, tokenizer, asked.knowing(weights))
    if file is not None:
        try:
            model.load_state_dict(read_safetensors(file))
        except RuntimeError as error:
            raise FileFormatError(
                f"{file}: cannot be loaded as weights of {HF}{name} with transformers "
                f"{transformers.__version__}, whose versions name some weights differently: {error}"
            ) from error
    if weights != RANDOM:
        refuse_nan(str(file or name), model.state_dict(), infinity=True)
    return model, tokenizer if model.has_text else NoTokenizer(HF + name)


def _refusal(name: str, local: bool) -> Callable[[Exception], NoReturn]:
    def refuse(error: Exception) -> NoReturn:
        if local:
            raise FileFormatError(f"{name}: cannot be opened by transformers: {error}") from error
        raise RuntimeError(
            f"load: {HF}{name} could not be had ({error}); download it where there is a network, "
            f"and pass {HF}PATH"
        ) from error

    return refuse


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileFormatError(f"{folder}: no model of transformers: config.json is not there")
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".bin"):
            check_weights_file(file)


def _kind(transformers: Any, config: Any) -> Any:
    """The class of a configuration."""
    known = _KINDS.get(config.model_type)
    if known is None:
        raise ValueError(
            f"load: transformers' {config.model_type!r} is no kind of model that is known here; "
            f"known are {', '.join(_KINDS)}"
        )
    projected = [name for name in _PROJECTED if name in (config.architectures or [])]
    name = (*projected, known[0])[0]
    if not hasattr(transformers, name):
        raise RuntimeError(
            f"load: transformers {transformers.__version__} has no {name}; install a newer one"
        )
    return getattr(transformers, name)


def tokenizer_of(whole: Any, source: str | None) -> Tokenizer | None:
    """Of a model's folder or repository; None where it has no text tower or no tokenizer."""
    text = getattr(whole.config, "text_config", None)
    if text is None or source is None:
        return None
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in _TOKENIZERS):
        return None  # transformers would make an empty one
    try:
        found = import_transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("%s%s: no tokenizer, so no text tower: %s", HF, source, error)
        return None
    # SigLIP 2 was trained on lower case, and goes by SigLIP's name where its images have one size;
    # SigLIP's own tokenizer says what it does
    lower = whole.config.model_type.startswith("siglip") and not hasattr(found, "do_lower_case")
    return Tokenizer(found, text.max_position_embeddings, lower)


def is_transformers(module: nn.Module) -> bool:
    """Whether a module is a model of transformers; which is imported already if it is."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def wrap(
    whole: Any, name: str, folder: str | None, tokenizer: Any, asked: Asked = NOTHING
) -> HFModel:
    """A module of transformers under clipsteer's names; its parts are shared, not copied.

    Args:
        whole: a model of a known kind.
        name: what messages call it.
        folder: where its preprocessing is described; None is what is published for its kind.
        tokenizer: of its text tower; without one the image tower is taken alone.

    Raises ValueError for a kind that is not known, and a setup that the model cannot have.
    """
    kind = whole.config.model_type
    if kind not in _KINDS:
        _kind(None, whole.config)
    if asked.quick_gelu is not None:
        raise ValueError(
            f"load: force_quick_gelu is for open_clip's models; {name} has what its config.json "
            "says"
        )
    cfg = _preprocess(whole, name, folder, asked)
    size = tuple(cfg["input_size"][-2:])
    tower = whole if hasattr(whole, "embeddings") else whole.vision_model
    trunk = Trunk(tower, size, getattr(whole, "visual_projection", None))
    own = _KINDS[kind][1]
    rule = asked.rule(own or ANTIALIAS)
    if own is None and rule != ANTIALIAS:
        raise ValueError(
            f"load: position_interpolation={rule!r} is for towers with a table of positions that "
            f"is resampled bicubically; {name} has its own way"
        )
    if own is not None and rule != own:
        tower.embeddings.interpolate_pos_encoding = Rule(tower.embeddings, rule)
    text = None
    if tokenizer is not None and hasattr(whole, "text_model"):
        text = Text(whole.text_model, getattr(whole, "text_projection", None))
    model = HFModel(trunk, cfg, whole, text).eval()
    if hasattr(whole, "text_model") and text is None:
        model.lacks_text = "its tokenizer's files are not there"
    model.visual.position_interpolation = rule
    check_size(name, model, size)
    return model


def _preprocess(whole: Any, name: str, folder: str | None, asked: Asked) -> dict[str, Any]:
    """The data configuration in timm's fields: what is asked for, then what was written with the
    weights, then what the folder says."""
    if isinstance(asked.preprocess, str):
        raise ValueError(
            f"load: {name!r} has no tags; preprocess must be a dictionary with fields of "
            f"{', '.join(TIMM_DATA)}, got {asked.preprocess!r}"
        )
    if asked.known is not None:
        if "input_size" not in asked.known.preprocess:
            raise FileFormatError(f"{name}: weights of a model of open_clip's")
        cfg = check_preprocess(asked.known.preprocess, TIMM_DATA)
    else:
        cfg = preprocess_of(whole.config, folder, name)
    own = cfg["input_size"][-2:]
    if asked.preprocess is not None:
        cfg = {**cfg, **check_preprocess(asked.preprocess, TIMM_DATA)}
    if asked.image_size is not None:
        cfg = {**cfg, "input_size": (3, *asked.image_size)}
    check_whole(name, whole, cfg["input_size"][-2:], own)
    return cfg
