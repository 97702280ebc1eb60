"""Descriptions of architectures in JSON, checked before anything of their sizes is made."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsteer.io.files import FileFormatError

logger = logging.getLogger(__name__)

# largest values; the largest published towers have a tenth of them
_LIMITS = {
    "layers": 512,
    "width": 1 << 15,
    "head_width": 1 << 15,
    "heads": 1 << 10,
    "mlp_ratio": 64,
    "patch_size": 1 << 10,
    "image_size": 1 << 13,
    "context_length": 1 << 13,
    "vocab_size": 1 << 21,
    "attn_pooler_queries": 1 << 13,
    "attn_pooler_heads": 1 << 10,
}
# a number a stage, or one for the height and one for the width
_SEVERAL = ("layers", "image_size", "patch_size")
_MOST_PARAMETERS = 1 << 35
_MOST_TOKENS = 1 << 16
# what a description without these has in open_clip
_VISION = {"layers": 12, "width": 768, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT = {"layers": 12, "width": 512, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}


def check_architecture(path: str | Path, config: Any, weights: Path | None = None) -> None:
    """Raise FileFormatError where ``config``, read from ``path``, describes no model of
    open_clip's, or one too large.

    With a weights file, more parameters than it has bytes are too many: a description of a few
    bytes must not take the memory of the machine before the two are compared.
    """
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or not all(part in config for part in parts):
        raise FileFormatError(f"{path}: not a model of open_clip's: expected {', '.join(parts)}")
    _number(path, "embed_dim", config["embed_dim"], _LIMITS["width"])
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if part in config:
            _check_part(path, part, config[part])
    count = _vision(path, config["vision_cfg"], config["embed_dim"])
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            count += _text(config[part], config["embed_dim"])
    most = min(_MOST_PARAMETERS, _memory() // 4)
    says = f"at most {most:.3g} are made, and fit into the memory of this machine"
    if weights is not None:
        most = weights.stat().st_size
        says = f"{weights} has {most} bytes"
    if count > most:
        raise FileFormatError(f"{path}: describes {count:.3g} parameters; {says}")


def _memory() -> int:
    """Bytes of this machine's memory, or as many as would never be too few."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 60


def _number(path: str | Path, name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise FileFormatError(
            f"{path}: {name} must be a number of at most {most}, got {value!r:.60}"
        )


def _check_part(path: str | Path, part: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise FileFormatError(f"{path}: {part} must be an object")
    for name, most in _LIMITS.items():
        value = config.get(name)
        several = value if isinstance(value, list) and name in _SEVERAL else [value]
        if len(several) > 4:
            raise FileFormatError(f"{path}: {part} has {len(several)} values for {name}")
        for number in several:
            if value is not None:
                _number(path, f"{name} of {part}", number, most)


def _vision(path: str | Path, config: Mapping[str, Any], embed: int) -> float:
    """Parameters of an image tower, roughly; 0 where timm knows its sizes."""
    if config.get("timm_model_name"):
        return 0
    known = _with(_VISION, config)
    width = known["width"]
    if isinstance(known["layers"], list):
        # a bottleneck of 4w → w → w → 4w channels; each stage has twice those of the one before
        stages = enumerate(known["layers"])
        return sum(blocks * 17 * (width * 2**i) ** 2 for i, blocks in stages) + (64 * width) ** 2
    tokens = 1.0
    sides = known["image_size"], known["patch_size"]
    heights, patches = (side if isinstance(side, list) else [side, side] for side in sides)
    for side, patch in zip(heights, patches):
        tokens *= side / max(patch, 1)
    for side, patch in dict.fromkeys(zip(heights, patches)):
        if patch and side % patch:
            logger.warning(
                "%s: images of %d pixels are not whole patches of %d: the last %d are seen by none",
                path,
                side,
                patch,
                side % patch,
            )
    if tokens > _MOST_TOKENS:
        raise FileFormatError(
            f"{path}: images of {tokens:.3g} patches, at most {_MOST_TOKENS} are made"
        )
    positions = (tokens + 3 * math.prod(patches) + embed) * width
    return positions + _blocks(known)


def _text(config: Mapping[str, Any], embed: int) -> float:
    """Parameters of a text tower, roughly; 0 where transformers knows its sizes."""
    if config.get("hf_model_name"):
        return 0
    known = _with(_TEXT, config)
    outside = known["vocab_size"] + known["context_length"] + embed
    return outside * known["width"] + _blocks(known)


def _with(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **{name: value for name, value in config.items() if value is not None}}


def _blocks(known: Mapping[str, Any]) -> float:
    """Attention's four square matrices and the two of the MLP, in each layer."""
    layers = known["layers"]
    depth = sum(layers) if isinstance(layers, list) else layers
    return depth * known["width"] ** 2 * (4 + 2 * known["mlp_ratio"])
