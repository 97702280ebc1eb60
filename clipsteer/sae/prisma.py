"""The layout of ViT-Prisma, to be read: a .pt file with its configuration inside or beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import Described, lookup, metadata_of, positive, without_scaling
from clipsteer.sae.found import Found

_NORMS = {
    None: "none",
    "none": "none",
    "None": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


def missing(found: Found) -> str | None:
    """What makes this not ViT-Prisma's, None where it is."""
    if lacking := found.lacks("W_enc", "W_dec"):
        return lacking
    inside = isinstance(found.value, dict) and found.value.get("cfg") is not None
    if not inside and found.config is None:
        return "no configuration inside, and no config.json beside it"
    return None


def _as_dict(path: Path, cfg: Any) -> dict[str, Any]:
    values = cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", None)
    if not isinstance(values, dict):
        raise FileFormatError(f"{path}: the configuration is a {type(cfg).__name__}")
    # what is read here is flat; a device, a dtype or a tensor says nothing about the SAE
    found = {key: _flat(value) for key, value in values.items() if isinstance(key, str)}
    return {key: value for key, value in found.items() if value is not None}


def _flat(value: Any) -> Any:
    """A text, a number that prints, or a list or a dictionary of such; else None."""
    if isinstance(value, list):
        return [_flat(part) for part in value if not isinstance(part, (list, dict))]
    if isinstance(value, dict):
        return {
            key: _flat(part)
            for key, part in value.items()
            if isinstance(key, str) and not isinstance(part, (list, dict))
        }
    if isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return None


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def read(found: Found) -> Described:
    """The SAE in a ``.pt`` file. Raises FileFormatError."""
    file = found.file or found.path
    weights = found.tensors
    inside = found.value.get("cfg")
    cfg = _as_dict(file, found.config if inside is None else inside)
    if weights["W_enc"].dim() != 2:
        raise FileFormatError(
            f"{file}: W_enc is of shape {tuple(weights['W_enc'].shape)}, not a matrix"
        )
    if cfg.get("is_transcoder"):
        raise FileFormatError(f"{file}: a transcoder, not an autoencoder")
    hook = cfg.get("hook_point")
    layer = _single(cfg.get("hook_point_layer"))
    subtype = cfg.get("layer_subtype")
    if not isinstance(hook, str) and type(layer) is int and isinstance(subtype, str):
        hook = f"blocks.{layer}.{subtype}"
    tokens = "all"
    if cfg.get("cls_token_only"):
        tokens = "cls"
    elif cfg.get("use_patches_only"):
        tokens = "patches"
    metadata = metadata_of("prisma", cfg.get("model_name"), hook, tokens=tokens)
    copies = without_scaling(file, found.copies(strict=False), applied=False)
    config = _config(file, cfg)
    if config["architecture"] == "gated":
        copies.pop("b_enc", None)  # Prisma makes one for every architecture
    return Described(config, {**copies, "W_enc": copies["W_enc"].T}, metadata)


def _config(path: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    cfg = {key: _single(value) for key, value in cfg.items()}
    d_in = positive(path, cfg, "d_in")
    if cfg.get("d_sae") is None:
        d_sae = d_in * positive(path, cfg, "expansion_factor")
    else:
        d_sae = positive(path, cfg, "d_sae")
    kinds = {"standard relu": "relu", "standard topk": "topk", "gated relu": "gated"}
    kind = f"{cfg.get('architecture', 'standard')} {cfg.get('activation_fn_str', 'relu')}"
    kwargs = cfg.get("activation_fn_kwargs")
    return {
        "d_in": d_in,
        "d_sae": d_sae,
        "architecture": lookup(path, "architecture and activation", kind, kinds),
        "k": kwargs.get("k") if isinstance(kwargs, dict) else None,
        "normalize": lookup(
            path, "normalize_activations", cfg.get("normalize_activations"), _NORMS
        ),
    }
