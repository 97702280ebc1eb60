"""open_clip models: loading, hook points by module name, capturing and editing activations,
zero-shot heads.

Every activation is shown as (B, T, d), whatever the block's own layout is: sequence-first blocks
are transposed, feature maps (B, C, H, W) flattened to (B, H*W, C), pooled outputs (B, d) given one
token.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsteer import assets
from clipsteer.clip.hooks import _first, _float_dtype, evaluating, hook_points
from clipsteer.clip.tokens import class_tokens as class_tokens
from clipsteer.io.files import FileFormatError, read_json

logger = logging.getLogger(__name__)

EMOJICLIP = "emojiclip"
EMOJI_TINY = "emoji-tiny"
_ASSETS = assets.EMOJI
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")


@dataclass(frozen=True, eq=False)
class CLIP:
    """A loaded model with what belongs to it.

    Attributes:
        model: the open_clip module, in eval mode.
        preprocess: PIL image -> (3, H, W) float tensor.
        tokenizer: list of n strings -> (n, context) int64 tensor.
        name, pretrained: what `load` was given.
    """

    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]
    name: str
    pretrained: str | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower's weights."""
        return _float_dtype(self.model)

    def encode_images(self, images: Iterable[Any], batch_size: int = 128) -> Tensor:
        """PIL images -> (N, e) image embeddings with unit rows, without gradients."""
        pending, out = [], []
        with evaluating(self.model):
            for image in images:
                pending.append(self.preprocess(image))
                if len(pending) == batch_size:
                    out.append(self.embed(torch.stack(pending)))
                    pending = []
            if pending:
                out.append(self.embed(torch.stack(pending)))
        if not out:
            raise ValueError("encode_images: images is empty")
        return torch.cat(out).to(self.dtype)

    def embed(self, pixels: Tensor) -> Tensor:
        """Preprocessed images (B, 3, H, W) -> unit image embeddings (B, e), at least float32; with
        gradients."""
        features = _first(self.model.encode_image(pixels.to(self.device, self.dtype)))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(
            f"open_clip could not be imported ({error}); install it with: pip install "
            f"open_clip_torch"
        ) from error
    except (RuntimeError, AttributeError, OSError) as error:
        raise RuntimeError(
            f"open_clip could not be imported: {error}. torch is {torch.__version__}; its "
            f"torchvision was most likely "
            "built for another torch, so that its compiled operators do not load. Install the pair "
            "from one index, "
            "for example: pip install --upgrade torch torchvision --index-url "
            "https://download.pytorch.org/whl/cpu"
        ) from error
    return open_clip


def load(
    model: str = EMOJICLIP,
    pretrained: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Load a model through open_clip.

    Args:
        model: "emojiclip" (the small model that comes with clipsteer, for 64 px drawings),
            "emoji-tiny" (a fifth of its size, without weights), an open_clip architecture
            ("ViT-B-32") or a .json file that describes one, "hf-hub:org/repo" or "local-dir:path".
        pretrained: for an architecture, one of its open_clip tags or a local weights file; None
            means random weights. For "emojiclip", other weights than the bundled ones. Not for
            hf-hub: and local-dir: names.
        device, dtype: where and as what the weights are kept; None keeps open_clip's float32.

    Raises:
        ValueError: unknown architecture or tag, or a weights file that is not there.
        FileFormatError: a weights file that is damaged or of another architecture.
        RuntimeError: open_clip or torchvision cannot be imported; weights could not be downloaded.
    """
    open_clip = _open_clip()
    pretrained = str(pretrained) if pretrained is not None else None
    weights, tokenizer_args, known = pretrained, {}, model
    if model in (EMOJICLIP, EMOJI_TINY):
        if model not in open_clip.list_models():
            open_clip.add_model_config(_ASSETS / f"{model}.json")
        if model == EMOJICLIP:
            weights = weights or str(_ASSETS / "emojiclip.safetensors")
        tokenizer_args = {"bpe_path": str(_ASSETS / "bpe_merges.txt.gz")}
    elif model.endswith(".json"):
        known = _add_architecture(open_clip, Path(model))
    _check_names(open_clip, known, weights)
    if weights is None and ":" not in model:
        logger.warning("%s: no pretrained weights were asked for, so the weights are random", model)
    try:
        module, _, preprocess = open_clip.create_model_and_transforms(
            known, pretrained=weights, device=device
        )
    except Exception as error:
        if weights is not None and Path(weights).is_file():
            raise FileFormatError(
                f"{weights}: cannot be loaded as weights of {model}: {error}"
            ) from error
        raise
    tokenizer = open_clip.get_tokenizer(known, **tokenizer_args)
    module = module.to(device=device, dtype=dtype).eval()
    return CLIP(module, preprocess, tokenizer, model, pretrained)


def _add_architecture(open_clip: Any, path: Path) -> str:
    """Make open_clip know the architecture of a .json file; returns its name."""
    if not path.is_file():
        raise ValueError(f"load: no such file: {path}")
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    config = read_json(path)
    if not isinstance(config, dict) or not all(part in config for part in parts):
        raise FileFormatError(f"{path}: not a model of open_clip's: expected {', '.join(parts)}")
    open_clip.add_model_config(path)
    return path.stem


def _check_names(open_clip: Any, model: str, pretrained: str | None) -> None:
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise ValueError(
                f"load: {model!r} brings its own weights; pretrained must be None, got "
                f"{pretrained!r}"
            )
        return
    known = open_clip.list_models()
    if model.replace("/", "-") not in known:
        near = difflib.get_close_matches(model, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()"
        raise ValueError(
            f"load: model must be 'emojiclip' or a name that open_clip knows, got {model!r}{hint}"
        )
    if pretrained is None or Path(pretrained).is_file():
        return
    if Path(pretrained).suffix in _WEIGHT_SUFFIXES or len(Path(pretrained).parts) > 1:
        raise ValueError(f"load: pretrained names a file that does not exist: {pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    if pretrained.lower().replace("-", "_") not in tags:
        raise ValueError(
            f"load: pretrained must be a file or one of {model}'s tags {tags}, got {pretrained!r}"
        )


def default_hook_point(clip: CLIP) -> str:
    """The last but one block of the image tower."""
    for pattern in ("visual.transformer.resblocks.*", "visual.trunk.blocks.*"):
        depth = pattern.count(".")
        blocks = [n for n in hook_points(clip.model, pattern) if n.count(".") == depth]
        if blocks:
            return blocks[max(len(blocks) - 2, 0)]
    raise ValueError(f"{clip.name} has no blocks that I know; pass hook_point, a module's name")
