"""One door for models: ``load`` opens whatever has a name, and gives it with all it needs."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer.clip.axes import first_of
from clipsteer.clip.hf_models import HF, is_transformers, open_hf, tokenizer_of, wrap
from clipsteer.clip.hooks import _float_dtype, evaluating, hook_points
from clipsteer.clip.open_clip_models import (
    EMOJI_TINY,
    EMOJICLIP,
    PREFIXES,
    Parts,
    is_open_clip,
    known_names,
    open_parts,
)
from clipsteer.clip.pixels import evaluation_transform_of, from_any_mode, stacks
from clipsteer.clip.runs import CONFIG, missing_run, read_run
from clipsteer.clip.setup import Asked, Setup, setup_of
from clipsteer.clip.timm_models import TIMM, NoTokenizer, no_text, open_timm
from clipsteer.clip.tokens import class_tokens as class_tokens
from clipsteer.io.digests import described
from clipsteer.io.doors import door
from clipsteer.io.names import utf8_path

__all__ = [
    "CLIP",
    "EMOJICLIP",
    "EMOJI_TINY",
    "KINDS",
    "as_texts",
    "class_tokens",
    "default_hook_point",
    "load",
    "load_origin",
    "provenance",
]

logger = logging.getLogger(__name__)

KINDS = (
    "emojiclip or emoji-tiny; an architecture of open_clip, such as ViT-B-32, or a .json file that "
    "describes one; hf-hub:ORG/REPO; local-dir:PATH; timm:NAME (an image tower alone); "
    "hf:ORG/NAME or hf:PATH (of transformers); a folder that clipsteer train, finetune or wise-ft "
    "merge left"
)


@dataclass(frozen=True, eq=False)
class CLIP:
    """A loaded model with what belongs to it.

    It is taken as it is by ``steer``, ``capture``, ``harvest`` and everything else that hooks into
    a model.

    Attributes:
        model: the torch module, in eval mode.
        preprocess: PIL image of any mode -> (3, H, W) float tensor, as `encode_images` sees it.
        tokenizer: list of n strings -> (n, context) int64 tensor.
        name, pretrained: the architecture and the weights, as `load` takes them.
    """

    # Any, since open_clip and timm give modules whose methods no type knows
    model: Any
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    name: str
    pretrained: str | None

    @property
    def device(self) -> torch.device:
        """The device of the image tower's weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower's weights."""
        return _float_dtype(self.model)

    @property
    def setup(self) -> Setup | None:
        """Its preprocessing and activation, which are written with it; None where the module is not
        one of `load`."""
        found = setup_of(self.model)
        if found is not None:
            own = evaluation_transform_of(self.model)
            known = (described(own), described(from_any_mode(own)))
            if described(self.preprocess) not in known:
                logger.warning(
                    "%s: the preprocess of this CLIP is not that of its setup, and what is written "
                    "with it is the setup, %s; load(…, preprocess=…) makes one that is",
                    self.name,
                    dict(found.preprocess),
                )
        return found

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower; models of timm have none."""
        return bool(getattr(self.model, "has_text", True))

    def need_text(self, what: str) -> None:
        """Raise ValueError, with `what` in front, where there is no text tower."""
        if not self.has_text:
            raise ValueError(no_text(what, self.name, self.model.lacks_text))

    def encode_images(self, images: Any, batch_size: int = 128) -> Tensor:
        """Image embeddings (N, e) with unit rows, without gradients.

        Args:
            images: PIL images, paths, or preprocessed tensors (3, H, W), mixed as you like; a batch
                (B, 3, H, W) of such tensors; or a data set of images or (image, target) pairs.

        Raises:
            TypeError, ValueError: none, something else, or tensors of several sizes.
            FileFormatError: a file that is no image. FileNotFoundError.
        """
        with evaluating(self.model):
            batches = stacks(images, self.preprocess, batch_size)
            found = [self.embed(batch) for batch in batches]
        if not found:
            raise ValueError("encode_images: images is empty")
        return torch.cat(found).to(self.dtype)

    def embed(
        self,
        pixels: Tensor,  # (B, 3, H, W)
    ) -> Tensor:
        """Unit embeddings (B, e) of preprocessed images, at least float32; with gradients."""
        features = first_of(self.model.encode_image(pixels.to(self.device, self.dtype)))
        wide = torch.promote_types(features.dtype, torch.float32)
        return F.normalize(features.to(wide), dim=-1)


def needs_weights(name: str) -> bool:
    """Whether a name is an architecture alone, whose weights are random where none are named."""
    return is_open_clip(name) and name != EMOJICLIP and not name.startswith(PREFIXES)


@door
def load(
    name: str | Path | nn.Module = EMOJICLIP,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    force_quick_gelu: bool | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    position_interpolation: str | None = None,
) -> CLIP:
    """Open a model by name.

    Args:
        name: one of
            "emojiclip" (the small model that comes with clipsteer, for 64 px drawings) or
            "emoji-tiny" (a fifth of its size, without weights);
            an architecture of open_clip ("ViT-B-32"), or a .json file that describes one;
            "hf-hub:org/repo" or "local-dir:path", which bring their own weights;
            "timm:NAME", a model of timm, which has an image tower alone;
            "hf:ORG/NAME" or "hf:PATH", a model of transformers (CLIP, MetaCLIP 2, SigLIP,
            SigLIP 2, DINOv2 with and without registers, DINOv3, ViT), with a text tower where it
            has one and its tokenizer's files are there; or such a module itself, whose parts are
            shared;
            a folder that `clipsteer train`, `finetune` (its zeroshot/ or finetuned/) or
            `wise-ft merge` left.
        pretrained: of an architecture, one of its open_clip tags or a weights file; None means
            random weights. For "emojiclip" other weights than the bundled ones. For timm a
            safetensors file or "random"; None downloads timm's own. For "hf:" a weights file of a
            run, or "random". Not for a folder and a module.
        device, dtype: where and as what the weights are kept; None keeps the library's float32.
        preprocess: how images are prepared: a published tag of the architecture, whose way it is,
            or fields of open_clip's preprocess_cfg (for timm of its data configuration) that are
            to be others. None is what was written with the weights, or published with the tag. A
            weights file that says nothing gets what all published weights of the architecture
            have; where these differ, a warning says what was taken.
        force_quick_gelu: True builds open_clip's towers with QuickGELU, False with GELU. None is
            found as `preprocess` is.
        image_size: N or (height, width) of the images that the model sees; position embeddings
            are resampled. A tower of patches takes whole ones: another size than its own must be
            a multiple of theirs. None is the size that was written with the weights, or the
            architecture's. force_image_size is the same under open_clip's name.
        position_interpolation: how they are: "antialias" (bicubic with PIL's filter: open_clip,
            timm, DINOv2 with registers) or "bicubic" without it (DINO, DINOv2, transformers' CLIP
            and SigLIP). None is what was written with the weights, or the way of the code that
            they come from; at half the size features move by some 5 % from one to the other.

    Returns a `CLIP`. That of a folder has the name of its architecture, and its weights file as
    `pretrained`.

    Raises:
        ValueError: an unknown name or tag, a weights file that is not there, or a setup that the
            model cannot have.
        FileFormatError: a damaged file, or weights of another architecture.
        RuntimeError: open_clip, timm or torchvision cannot be imported; weights could not be
            downloaded.
    """
    weights = None if pretrained is None else str(pretrained)
    setup = (preprocess, force_quick_gelu, image_size, force_image_size, position_interpolation)
    asked = Asked.of(*setup)
    if not isinstance(name, nn.Module):
        return _load(str(name), weights, device, dtype, asked)
    parts, called = _module_parts(name, weights, asked)
    return _made(parts, called, None, device, dtype)


def _load(
    name: str,
    weights: str | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    asked: Asked,
) -> CLIP:
    if name.startswith(TIMM):
        parts = _timm_parts(name, weights, asked)
    elif name.startswith(HF):
        model, tokenizer = open_hf(name.removeprefix(HF), weights, asked)
        parts = Parts(model, evaluation_transform_of(model), tokenizer)
    elif is_open_clip(name):
        if needs_weights(name) and weights is None:
            logger.warning(
                "%s: no pretrained weights were asked for, so the weights are random", name
            )
        with utf8_path(weights or "") as file:
            parts = open_parts(name, file or None, device, asked)
    else:
        return _load_run(name, weights, device, dtype, asked)
    return _made(parts, name, weights, device, dtype)


def _made(
    parts: Parts,
    name: str,
    weights: str | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> CLIP:
    module = parts.model.to(device=device, dtype=dtype).eval()
    return CLIP(module, from_any_mode(parts.preprocess), parts.tokenizer, name, weights)


def _module_parts(module: nn.Module, weights: str | None, asked: Asked) -> tuple[Parts, str]:
    """A module of transformers, and what to call it. Raises TypeError for any other."""
    if not is_transformers(module):
        raise TypeError(
            "load: expected a name or a model of transformers, got a "
            f"{type(module).__name__}; a CLIP of any other is clipsteer.clip.CLIP(module, …)"
        )
    if weights is not None:
        raise ValueError(f"load: a module has its weights; pretrained must be None, got {weights}")
    source = str(module.name_or_path)
    name = HF + (source or type(module).__name__)
    folder = source if Path(source).is_dir() and source else None
    tokenizer: Any = tokenizer_of(module, folder)
    model = wrap(module, name, folder, tokenizer, asked)
    if not model.has_text:
        tokenizer = NoTokenizer(name)
    return Parts(model, evaluation_transform_of(model), tokenizer), name


@door
def load_origin(
    origin: Mapping[str, Any],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    preprocess: str | Mapping[str, Any] | None = None,
    force_quick_gelu: bool | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    position_interpolation: str | None = None,
) -> CLIP:
    """The model that something was fitted on, of its metadata as `provenance` gives them.

    The other arguments are taken in place of what stands there. A model of another name has a setup
    of its own. Raises as `load`, and ValueError where no model is named.
    """
    name = model or origin.get("clip_model")
    if name is None:
        raise ValueError("load_origin: the metadata name no model; pass one")
    if model is None and pretrained is None:
        pretrained = origin.get("pretrained")
    known = None
    if origin.get("setup") is not None and name == origin.get("clip_model"):
        known = Setup.from_json(f"the metadata of something fitted on {name}", origin["setup"])
    setup = (preprocess, force_quick_gelu, image_size, force_image_size, position_interpolation)
    return _load(name, pretrained, device, None, Asked.of(*setup, known))


def provenance(clip: CLIP, hook_point: str, tokens: str) -> dict[str, Any]:
    """Which activations these are, for the metadata of what is fitted on them; JSON-able."""
    found: dict[str, Any] = {
        "clip_model": clip.name,
        "pretrained": clip.pretrained,
        "hook_point": hook_point,
        "tokens": tokens,
    }
    if (setup := clip.setup) is not None:
        found["setup"] = setup.to_json()
    return found


def as_texts(origin: Mapping[str, Any]) -> dict[str, str]:
    """`provenance` for metadata that are text alone; what is None is left out."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in origin.items()
        if value is not None
    }


def _timm_parts(name: str, weights: str | None, asked: Asked) -> Parts:
    model = open_timm(name.removeprefix(TIMM), weights, asked)
    return Parts(model, evaluation_transform_of(model), NoTokenizer(name))


def _load_run(
    name: str,
    weights: str | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    asked: Asked,
) -> CLIP:
    """The model in a folder. Raises ValueError where there is none, as no kind has the name."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(_unknown(name))
    if weights is not None:
        raise ValueError(
            f"load: the folder {name} brings its own weights; pretrained must be None, got "
            f"{weights!r}"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"load: {missing_run(folder)}")
    run = read_run(folder)
    return _load(run.model, str(run.weights), device, dtype, asked)


def _unknown(name: str) -> str:
    """That no model has this name; which are near, and which kinds of names there are."""
    if Path(name).is_file():
        return (
            f"load: {name} is a file; a weights file goes with the name of its architecture: "
            f"load(NAME, {name!r})"
        )
    near = difflib.get_close_matches(name, known_names(), n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"load: no model is called {name!r}; {hint}A model is {KINDS}"


def default_hook_point(clip: CLIP) -> str:
    """The last but one block of the image tower."""
    for pattern in ("visual.transformer.resblocks.*", "visual.trunk.blocks.*"):
        depth = pattern.count(".")
        blocks = [name for name in hook_points(clip, pattern) if name.count(".") == depth]
        if blocks:
            return blocks[max(len(blocks) - 2, 0)]
    raise ValueError(
        f"default_hook_point: {clip.name} has no blocks at visual.transformer.resblocks or "
        "visual.trunk.blocks; pass hook_point, a module's name"
    )
