"""The layouts of SAELens and sparsify, both ways, and what they share with ViT-Prisma's reader.

A reader turns a configuration and the tensors of a file into a ``Described``; ``sae_io`` builds the SAE from that.
Checked against sae-lens 6.54 and eai-sparsify 1.3, which also wrote the golden files of the tests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer._files import FileFormatError
from clipsteer.sae import SAE

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
    """An SAE in clipsteer's terms: the arguments of ``clipsteer.SAE``, its state dict, its metadata; nothing built."""

    config: dict[str, Any]
    weights: Mapping[str, Any]
    metadata: dict[str, Any]


def open_clip_name(hook_name: str) -> str | None:
    """The open_clip module of a TransformerLens or ViT-Prisma hook name; None where no module has that output.

    "blocks.9.hook_resid_post" -> "visual.transformer.resblocks.9". Names of open_clip modules pass through.
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


def json_object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: must be a JSON object")
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
        raise FileFormatError(f"{path}: {what} {value!r:.60} is not supported; supported: {known}") from None


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
    table = {"standard": "relu", "topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu", "gated": "gated"}
    architecture = lookup(folder, "architecture", architecture, table)
    normalize = cfg.get("normalize_activations")
    if normalize in ("expected_average_only_in", True):
        logger.warning("%s: %s is taken as folded into the weights, as SAELens does at inference", folder, normalize)
        normalize = "none"
    lookup(folder, "reshape_activations", cfg.get("reshape_activations"), {None: "none", "none": "none"})
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
    metadata = own if isinstance(own, dict) else metadata_of("saelens", meta.get("model_name"), hook)
    return Described(config, weights, metadata)


def _need_matrices(folder: Path, weights: Mapping[str, Tensor]) -> None:
    for name in ("W_enc", "W_dec"):
        if name not in weights or weights[name].dim() != 2 or not weights[name].is_floating_point():
            raise FileFormatError(f"{folder}: no matrix {name!r}; there are {sorted(weights)}")


def _fold_decoder_norm(folder: Path, weights: dict[str, Tensor]) -> None:
    """Selecting by pre · ‖W_dec‖ and decoding acts / ‖W_dec‖ is a plain top-k of rescaled weights."""
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
    d_sae = cfg["num_latents"] if cfg.get("num_latents") else d_in * positive(folder, cfg, "expansion_factor")
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    config = {"d_in": d_in, "d_sae": d_sae, "architecture": "topk", "k": cfg.get("k")}
    own = cfg.get("clipsteer")
    # sparsify names the folder after the module it hooked
    metadata = own if isinstance(own, dict) else metadata_of("sparsify", None, folder.resolve().name)
    return Described(config, weights, metadata)


def export_saelens(sae: SAE, weights: dict[str, Tensor], own: dict[str, Any]) -> dict[str, Any]:
    """cfg.json for SAELens; ``weights`` are rearranged in place, ``own`` is clipsteer's metadata."""
    names = {"relu": "standard", "batch_topk": "jumprelu"}
    norms = {ours: theirs for theirs, ours in _SAELENS_NORMS.items() if isinstance(theirs, str)}
    weights["W_enc"] = weights["W_enc"].T
    if sae.architecture == "batch_topk":
        weights["threshold"] = weights["threshold"].expand(sae.d_sae)
    cfg = {
        "architecture": names.get(sae.architecture, sae.architecture),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": norms[sae.normalize],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.metadata.get("clip_model"),
            "hook_name": sae.metadata.get("hook_point"),
            "clipsteer": own,
        },
    }
    if sae.architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def export_sparsify(sae: SAE, weights: dict[str, Tensor], own: dict[str, Any]) -> dict[str, Any]:
    """cfg.json for sparsify; ``weights`` are rearranged in place."""
    if sae.architecture != "topk" or sae.normalize != "none":
        raise ValueError(
            f"export: sparsify knows topk without input normalisation, this is {sae.architecture} with "
            f"normalize={sae.normalize!r}; use format='saelens'"
        )
    W_enc, b_enc = weights.pop("W_enc"), weights.pop("b_enc")
    if not sae.apply_b_dec_to_input:
        # sparsify always subtracts b_dec: give its share back
        b_enc = (b_enc.double() + W_enc.double() @ weights["b_dec"].double()).to(b_enc.dtype)
    weights |= {"encoder.weight": W_enc, "encoder.bias": b_enc}
    return {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "clipsteer": own,
    }
