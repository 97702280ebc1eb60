"""The layout of ViT-Prisma, to be read: a .pt file with its configuration inside or beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.io.files import FileFormatError, read_json
from clipsteer.io.torch_files import read_torch_weights_only
from clipsteer.sae.foreign import Described, lookup, metadata_of, positive, without_scaling

# packages whose configuration classes occur inside the checkpoints; they are replaced by inert
# stand-ins
_STAND_INS = ("vit_prisma", "sae", "sae_lens", "sae_training")


_NORMS = {
    None: "none",
    "none": "none",
    "None": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


def _weights_file(folder: Path) -> Path:
    """weights.pt, else the checkpoint with the most images seen."""
    if (folder / "weights.pt").is_file():
        return folder / "weights.pt"
    found = [p for p in folder.glob("*.pt") if "log_feature_sparsity" not in p.name]
    if not found:
        raise FileFormatError(f"{folder}: no weights among its .pt files")

    def images(path: Path) -> tuple[int, str]:
        number = re.search(r"n_images_(\d+)", path.name)
        return int(number[1]) if number else -1, path.name

    return max(found, key=images)


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


def read(path: Path) -> Described:
    """The SAE in a ``.pt`` file, or in a folder that holds one. Raises FileFormatError,
    FileNotFoundError."""
    file = _weights_file(path) if path.is_dir() else path
    value = read_torch_weights_only(file, stand_in_modules=_STAND_INS)
    if not isinstance(value, dict):
        raise FileFormatError(f"{file}: holds a {type(value).__name__}, not a dictionary")
    weights = value.get("state_dict", value)
    beside = file.with_name("config.json")
    if value.get("cfg") is not None:
        cfg = _as_dict(file, value["cfg"])
    elif beside.is_file():
        cfg = _as_dict(beside, read_json(beside))
    else:
        raise FileFormatError(f"{file}: no configuration inside, and no config.json beside it")
    if not isinstance(weights, dict) or not all(
        isinstance(weights.get(n), Tensor) for n in ("W_enc", "W_dec")
    ):
        raise FileFormatError(f"{file}: no W_enc and W_dec")
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
    # copies: the file is only mapped, and two names may share one storage
    copies = {n: t.detach().clone() for n, t in weights.items() if isinstance(t, Tensor)}
    copies = without_scaling(file, copies, applied=False)
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
