"""The layout of SAELens, both ways: cfg.json and sae_weights.safetensors.

Checked against sae-lens 6.54, which also wrote the golden files of the tests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import Described, lookup, metadata_of, positive, without_scaling

logger = logging.getLogger(__name__)

FILE = "sae_weights.safetensors"
# the release whose layout is written
_VERSION = "6.0.0"
_NORMS = {
    None: "none",
    False: "none",
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


_ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


def read(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    """SAELens ≥ 6, and the flat configurations before it."""
    meta = cfg.get("metadata")
    meta = meta if isinstance(meta, dict) else cfg
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture = cfg.get("architecture", "standard")
    kwargs = cfg.get("activation_fn_kwargs")
    k = cfg.get("k")
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise FileFormatError(f"{folder}: activation function {activation!r:.60} is not supported")
    if architecture == "topk" and isinstance(kwargs, dict):
        k = kwargs.get("k", k)  # before version 6
    theirs = architecture
    architecture = lookup(folder, "architecture", theirs, _ARCHITECTURES)
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
    _need_matrices(folder, weights)
    weights["W_enc"] = weights["W_enc"].T
    if "topk_threshold" in weights and weights["topk_threshold"].numel() == 1:
        weights["threshold"] = weights.pop("topk_threshold").reshape(())
    if architecture == "jumprelu" and "log_threshold" in weights:
        # of training checkpoints of versions that trained its logarithm
        weights["threshold"] = weights.pop("log_threshold").exp()
    rescale = _flag(folder, cfg, "rescale_acts_by_decoder_norm", False)
    if rescale and architecture in ("topk", "batch_topk"):
        _fold_decoder_norm(folder, weights)
    # after that: the norms are those of the decoder without factors
    weights = without_scaling(
        folder, weights, applied=_flag(folder, cfg, "finetuning_scaling_factor", False)
    )
    transcoder = theirs.endswith("transcoder")
    d_sae = positive(folder, cfg, "d_sae")
    config = {
        "d_in": positive(folder, cfg, "d_in"),
        "d_sae": d_sae,
        "architecture": architecture,
        "k": k,
        "normalize": lookup(folder, "normalize_activations", normalize, _NORMS),
        "apply_b_dec_to_input": _flag(folder, cfg, "apply_b_dec_to_input", not transcoder),
    }
    if transcoder:
        config |= {"d_out": positive(folder, cfg, "d_out"), "skip": "skip" in theirs}
    prefixes = cfg.get("matryoshka_widths", meta.get("matryoshka"))
    if prefixes is not None:
        config["matryoshka"] = _prefixes(folder, prefixes, d_sae)
    hook = meta.get("hook_name", meta.get("hook_point"))
    own = meta.get("clipsteer")
    if not isinstance(own, dict):
        own = metadata_of("saelens", meta.get("model_name"), hook)
    return Described(config, weights, own)


def _flag(folder: Path, cfg: Mapping[str, Any], key: str, default: bool) -> bool:
    value = cfg.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FileFormatError(f"{folder}: {key} must be true or false, got {value!r:.60}")
    return value


def _prefixes(folder: Path, widths: Any, d_sae: int) -> list[int]:
    """The widths, and d_sae where SAELens would add it."""
    if not isinstance(widths, list) or not widths or type(widths[-1]) is not int:
        raise FileFormatError(
            f"{folder}: matryoshka_widths must be whole numbers, got {widths!r:.60}"
        )
    return widths if widths[-1] == d_sae else [*widths, d_sae]


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


def export(sae: Described) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of SAELens' file, and its cfg.json."""
    weights = dict(sae.weights)
    architecture = sae.config["architecture"]
    names = {"relu": "standard", "batch_topk": "jumprelu"}
    if sae.config.get("d_out") is not None:
        skip = "skip_" if sae.config.get("skip") else ""
        names = dict.fromkeys(("jumprelu", "batch_topk"), f"jumprelu_{skip}transcoder")
        names["relu"] = f"{skip}transcoder"
        if architecture not in names:
            raise ValueError(
                f"export: SAELens has transcoders of relu and jumprelu alone, this is "
                f"{architecture}"
            )
    norms = {ours: theirs for theirs, ours in _NORMS.items() if isinstance(theirs, str)}
    weights["W_enc"] = weights["W_enc"].T
    if architecture == "batch_topk":
        weights["threshold"] = weights["threshold"].expand(sae.config["d_sae"])
    cfg: dict[str, Any] = {
        "architecture": names.get(architecture, architecture),
        "d_in": sae.config["d_in"],
        "d_sae": sae.config["d_sae"],
        "dtype": str(weights["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.config["apply_b_dec_to_input"],
        "normalize_activations": norms[sae.config["normalize"]],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.metadata.get("clip_model"),
            "hook_name": sae.metadata.get("hook_point"),
            "clipsteer": sae.metadata,
        },
    }
    if sae.config.get("d_out") is not None:
        cfg["d_out"] = sae.config["d_out"]
    if sae.config.get("matryoshka"):
        # of an inference model of theirs, prefixes are history
        cfg["metadata"]["matryoshka"] = list(sae.config["matryoshka"])
    if architecture == "topk":
        cfg |= {"k": sae.config["k"], "rescale_acts_by_decoder_norm": False}
    return weights, cfg
