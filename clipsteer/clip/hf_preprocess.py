"""How images are prepared for models of transformers, in the fields of timm's configuration."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from clipsteer.clip.setup import TIMM_DATA, check_preprocess
from clipsteer.io.files import FileFormatError, json_object, read_json

logger = logging.getLogger(__name__)

_FILE = "preprocessor_config.json"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
# what is published for each kind of model
_KINDS: dict[str, dict[str, Any]] = {
    "clip": _CLIP,
    "metaclip_2": _CLIP,
    "siglip": {**_HALF, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"},
    "siglip2": {**_HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "dinov2": {**_IMAGENET, "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"},
    "dinov3": {**_IMAGENET, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "vit": {**_HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
}
# of PIL
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def preprocess_of(config: Any, folder: str | None, name: str) -> dict[str, Any]:
    """Of a model's configuration and the folder or repository that it comes from.

    Raises FileFormatError for a description that is damaged, or that timm's transforms cannot
    follow.
    """
    vision = getattr(config, "vision_config", config)
    kind = max((k for k in _KINDS if config.model_type.startswith(k)), key=len)
    patch = vision.patch_size
    size = getattr(vision, "image_size", None)
    if size is None:  # SigLIP 2 has a number of patches
        size = math.isqrt(vision.num_patches) * patch
    height, width = size if isinstance(size, list | tuple) else (size, size)
    usual = {**_KINDS[kind], "input_size": (3, height, width)}
    found = _description(folder)
    if found is None:
        logger.warning(
            "%s: no %s says how images are prepared; taken is what is published for %s. If the "
            "model was trained otherwise, pass preprocess={…}",
            name,
            _FILE,
            kind,
        )
        return usual
    path, described = found
    try:
        return {**usual, **_read(described)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path}: not a preprocessing that is known: {error}") from None


def _description(folder: str | None) -> tuple[str, dict[str, Any]] | None:
    """What the file says, and where it is; None where there is none."""
    if folder is None:
        return None
    path: Any = Path(folder) / _FILE
    if not Path(folder).is_dir():
        from transformers.utils import cached_file

        try:
            path = cached_file(folder, _FILE)
        except OSError:
            return None
    if path is None or not Path(path).is_file():
        return None
    return str(path), dict(json_object(Path(path), read_json(path)))


def _read(cfg: dict[str, Any]) -> dict[str, Any]:
    """Fields of an image processor as timm's: resized to the shortest side and cut, or squashed."""
    found: dict[str, Any] = {}
    if cfg.get("do_rescale", True) and abs(255 * cfg.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        raise ValueError(f"rescale_factor must be 1/255, got {cfg['rescale_factor']}")
    if cfg.get("do_normalize", True):
        told = {"mean": cfg.get("image_mean"), "std": cfg.get("image_std")}
        found |= {field: value for field, value in told.items() if value is not None}
    else:
        found |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if cfg.get("resample") is not None:
        found["interpolation"] = _RESAMPLING[cfg["resample"]]
    crop = _size(cfg.get("crop_size")) if cfg.get("do_center_crop") else None
    crop = (crop, crop) if isinstance(crop, int) else crop
    size = _size(cfg.get("size"))
    if isinstance(size, int) and crop is None and not isinstance(cfg["size"], dict):
        size = (size, size)  # as earlier versions wrote a square
    if isinstance(size, int):
        crop = crop or (size, size)
        found |= {"crop_mode": "center", "crop_pct": min(crop) / size, "input_size": (3, *crop)}
    elif size is not None:
        if crop not in (None, size):
            raise ValueError(f"images squashed to {size} and cut to {crop}")
        found |= {"crop_mode": "squash", "crop_pct": 1.0, "input_size": (3, *size)}
    return check_preprocess(found, TIMM_DATA)


def _size(value: Any) -> Any:
    """The shortest side, or (height, width)."""
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return int(value["shortest_edge"])
        return int(value["height"]), int(value["width"])
    return value
