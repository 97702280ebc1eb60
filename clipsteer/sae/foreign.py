"""The layouts of SAELens and sparsify, both ways, and what they share with ViT-Prisma's reader.

A reader turns a configuration and the tensors of a file into a ``Described``, a writer turns one
into theirs. Checked against sae-lens 6.54 and eai-sparsify 1.3, which also wrote the golden files
of the tests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError, read_json
from clipsteer.io.torch_files import read_torch_weights_only

logger = logging.getLogger(__name__)

SAELENS_FILE, SPARSIFY_FILE = "sae_weights.safetensors", "sae.safetensors"
# the SAELens release whose layout is written
_SAELENS_VERSION = "6.0.0"
_SAELENS_NORMS = {
    None: "none",
    False: "none",
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


class Described(NamedTuple):
    """An SAE in clipsteer's terms: the arguments of ``clipsteer.SAE``, its state dict, its
    metadata; nothing built."""

    config: dict[str, Any]
    weights: Mapping[str, Any]
    metadata: dict[str, Any]


def open_clip_name(hook_name: str) -> str | None:
    """The open_clip module of a TransformerLens or ViT-Prisma hook name; None where no module has
    that output.

    "blocks.9.hook_resid_post" -> "visual.transformer.resblocks.9". Names of open_clip modules pass
    through.
    """
    if hook_name.startswith(("visual.", "transformer.")):
        return hook_name
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if not match:
        return None
    layer, site = int(match[1]), match[2]
    block = f"visual.transformer.resblocks.{layer}"
    if site == "hook_resid_pre":
        return "visual.ln_pre" if layer == 0 else f"visual.transformer.resblocks.{layer - 1}"
    suffixes = {
        "hook_resid_post": "",
        "hook_mlp_out": ".mlp",
        "hook_attn_out": ".attn",
        "mlp.hook_pre": ".mlp.c_fc",
        "mlp.hook_post": ".mlp.gelu",
    }
    return block + suffixes[site] if site in suffixes else None


def metadata_of(source: str, model: Any, hook_name: Any, **more: Any) -> dict[str, Any]:
    """Where an SAE of another library belongs; keys without a value are left out."""
    model = model if isinstance(model, str) else None
    if model is not None and model.startswith("open-clip:"):
        # ViT-Prisma's names: a repository on the hub, or an architecture
        name = model.removeprefix("open-clip:")
        model = f"hf-hub:{name}" if "/" in name else name
    found: dict[str, Any] = {"source": source, "clip_model": model, **more}
    if isinstance(hook_name, str):
        found |= {"hook_point": open_clip_name(hook_name), "source_hook": hook_name}
    return {key: value for key, value in found.items() if value is not None}


def positive(path: Path, cfg: Mapping[str, Any], key: str) -> int:
    value = cfg.get(key)
    if type(value) is not int or value < 1:
        raise FileFormatError(f"{path}: {key} must be a positive integer, got {value!r:.60}")
    return value


def _refuse(path: Path, cfg: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if cfg.get(key):
            raise FileFormatError(f"{path}: {key} = {cfg[key]!r:.60} is not supported")


def lookup(path: Path, what: str, value: Any, table: Mapping[Any, str]) -> str:
    try:
        return table[value]
    except (KeyError, TypeError):
        known = ", ".join(str(key) for key in table if isinstance(key, str))
        raise FileFormatError(
            f"{path}: {what} {value!r:.60} is not supported; supported: {known}"
        ) from None


def read_saelens(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    """SAELens ≥ 6, and the flat configurations before it."""
    meta = cfg.get("metadata")
    meta = meta if isinstance(meta, dict) else cfg
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture = cfg.get("architecture", "standard")
    kwargs = cfg.get("activation_fn_kwargs")
    k = cfg.get("k")
    if activation == "topk" and architecture == "standard":
        architecture, k = "topk", kwargs.get("k") if isinstance(kwargs, dict) else None
    elif activation not in ("relu", "topk"):
        raise FileFormatError(f"{folder}: activation function {activation!r:.60} is not supported")
    table = {
        "standard": "relu",
        "topk": "topk",
        "batchtopk": "batch_topk",
        "jumprelu": "jumprelu",
        "gated": "gated",
    }
    architecture = lookup(folder, "architecture", architecture, table)
    normalize = cfg.get("normalize_activations")
    if normalize in ("expected_average_only_in", True):
        logger.warning(
            "%s: %s is taken as folded into the weights, as SAELens does at inference",
            folder,
            normalize,
        )
        normalize = "none"
    lookup(
        folder,
        "reshape_activations",
        cfg.get("reshape_activations"),
        {None: "none", "none": "none"},
    )
    scaling = weights.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        raise FileFormatError(f"{folder}: a fine-tuning scaling_factor is not supported")
    _need_matrices(folder, weights)
    weights["W_enc"] = weights["W_enc"].T
    if "topk_threshold" in weights and weights["topk_threshold"].numel() == 1:
        weights["threshold"] = weights.pop("topk_threshold").reshape(())
    if cfg.get("rescale_acts_by_decoder_norm") and architecture in ("topk", "batch_topk"):
        _fold_decoder_norm(folder, weights)
    config = {
        "d_in": positive(folder, cfg, "d_in"),
        "d_sae": positive(folder, cfg, "d_sae"),
        "architecture": architecture,
        "k": k,
        "normalize": lookup(folder, "normalize_activations", normalize, _SAELENS_NORMS),
        "apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True)),
    }
    hook = meta.get("hook_name", meta.get("hook_point"))
    own = meta.get("clipsteer")
    metadata = (
        own if isinstance(own, dict) else metadata_of("saelens", meta.get("model_name"), hook)
    )
    return Described(config, weights, metadata)


def _need_matrices(folder: Path, weights: Mapping[str, Tensor]) -> None:
    for name in ("W_enc", "W_dec"):
        if name not in weights or weights[name].dim() != 2 or not weights[name].is_floating_point():
            raise FileFormatError(f"{folder}: no matrix {name!r}; there are {sorted(weights)}")


def _fold_decoder_norm(folder: Path, weights: dict[str, Tensor]) -> None:
    """Selecting by pre · ‖W_dec‖ and decoding acts / ‖W_dec‖ is a plain top-k of rescaled
    weights."""
    if "b_enc" not in weights or weights["b_enc"].shape != weights["W_dec"].shape[:1]:
        raise FileFormatError(f"{folder}: no b_enc of one number a feature")
    if weights["W_enc"].shape != weights["W_dec"].shape:
        raise FileFormatError(f"{folder}: W_enc and W_dec are not of one shape")
    norm = torch.linalg.vector_norm(weights["W_dec"], dim=-1, keepdim=True).clamp_min(1e-8)
    weights |= {
        "W_enc": weights["W_enc"] * norm,
        "b_enc": weights["b_enc"] * norm[:, 0],
        "W_dec": weights["W_dec"] / norm,
    }


def read_sparsify(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    """sparsify's SparseCoder; transcoders are refused."""
    _refuse(folder, cfg, "transcode", "skip_connection", "signed")
    lookup(folder, "activation", cfg.get("activation", "topk"), {"topk": "topk"})
    d_in = positive(folder, cfg, "d_in")
    # num_latents 0 or absent: the expansion factor says
    d_sae = (
        cfg["num_latents"]
        if cfg.get("num_latents")
        else d_in * positive(folder, cfg, "expansion_factor")
    )
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    config = {"d_in": d_in, "d_sae": d_sae, "architecture": "topk", "k": cfg.get("k")}
    own = cfg.get("clipsteer")
    # sparsify names the folder after the module it hooked
    metadata = (
        own if isinstance(own, dict) else metadata_of("sparsify", None, folder.resolve().name)
    )
    return Described(config, weights, metadata)


def export_saelens(sae: Described) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of SAELens' file, and its cfg.json."""
    weights, architecture = dict(sae.weights), sae.config["architecture"]
    names = {"relu": "standard", "batch_topk": "jumprelu"}
    norms = {ours: theirs for theirs, ours in _SAELENS_NORMS.items() if isinstance(theirs, str)}
    weights["W_enc"] = weights["W_enc"].T
    if architecture == "batch_topk":
        weights["threshold"] = weights["threshold"].expand(sae.config["d_sae"])
    cfg = {
        "architecture": names.get(architecture, architecture),
        "d_in": sae.config["d_in"],
        "d_sae": sae.config["d_sae"],
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.config["apply_b_dec_to_input"],
        "normalize_activations": norms[sae.config["normalize"]],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.metadata.get("clip_model"),
            "hook_name": sae.metadata.get("hook_point"),
            "clipsteer": sae.metadata,
        },
    }
    if architecture == "topk":
        cfg |= {"k": sae.config["k"], "rescale_acts_by_decoder_norm": False}
    return weights, cfg


def export_sparsify(sae: Described) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of sparsify's file, and its cfg.json."""
    weights, config = dict(sae.weights), sae.config
    if config["architecture"] != "topk" or config["normalize"] != "none":
        raise ValueError(
            f"export: sparsify knows topk without input normalisation, this is "
            f"{config['architecture']} with "
            f"normalize={config['normalize']!r}; use format='saelens'"
        )
    W_enc, b_enc = weights.pop("W_enc"), weights.pop("b_enc")
    if not config["apply_b_dec_to_input"]:
        # sparsify always subtracts b_dec: give its share back
        b_enc = (b_enc.double() + W_enc.double() @ weights["b_dec"].double()).to(b_enc.dtype)
    weights |= {"encoder.weight": W_enc, "encoder.bias": b_enc}
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config["d_sae"] // config["d_in"]),
        "normalize_decoder": True,
        "num_latents": config["d_sae"],
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config["d_in"],
        "clipsteer": sae.metadata,
    }
    return weights, cfg


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
    # what could not stand in a JSON file (a device, a dtype, a tensor) says nothing about the SAE
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, (str, int, float, list, dict))
    }


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_whole(tensor: Tensor) -> bool:
    """Dense, on the CPU, and not a small storage expanded to any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_prisma(path: Path) -> Described:
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
    layer, subtype = _single(cfg.get("hook_point_layer")), cfg.get("layer_subtype")
    if not isinstance(hook, str) and type(layer) is int and isinstance(subtype, str):
        hook = f"blocks.{layer}.{subtype}"
    tokens = (
        "cls" if cfg.get("cls_token_only") else "patches" if cfg.get("use_patches_only") else "all"
    )
    metadata = metadata_of("prisma", cfg.get("model_name"), hook, tokens=tokens)
    # copies: the file is only mapped, and two names may share one storage
    copies = {
        n: t.detach().clone() for n, t in weights.items() if isinstance(t, Tensor) and _is_whole(t)
    }
    if "W_enc" not in copies:
        raise FileFormatError(f"{file}: W_enc is not a dense matrix with storage of its own")
    return Described(_config(file, cfg), {**copies, "W_enc": copies["W_enc"].T}, metadata)


def _config(path: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    cfg = {key: _single(value) for key, value in cfg.items()}
    d_in = positive(path, cfg, "d_in")
    d_sae = (
        d_in * positive(path, cfg, "expansion_factor")
        if cfg.get("d_sae") is None
        else positive(path, cfg, "d_sae")
    )
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
