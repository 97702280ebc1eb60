"""The layout of sparsify, both ways: cfg.json and sae.safetensors.

Checked against eai-sparsify 1.3, which also wrote the golden files of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import (
    Described,
    lookup,
    matrix,
    metadata_of,
    positive,
    shift_encoder,
)

FILE = "sae.safetensors"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def _refuse(path: Path, cfg: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if cfg.get(key):
            raise FileFormatError(f"{path}: {key} = {cfg[key]!r:.60} is not supported")


def read(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    """sparsify's SparseCoder, autoencoder or transcoder."""
    _refuse(folder, cfg, "signed")
    lookup(folder, "activation", cfg.get("activation", "topk"), {"topk": "topk"})
    d_in = positive(folder, cfg, "d_in")
    # num_latents 0 or absent: the expansion factor says
    d_sae = cfg.get("num_latents") or d_in * positive(folder, cfg, "expansion_factor")
    renamed = {theirs: ours for ours, theirs in _NAMES.items()}
    weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    config = {"d_in": d_in, "d_sae": d_sae, "architecture": "topk", "k": cfg.get("k")}
    flags = [cfg.get(key, False) for key in ("transcode", "skip_connection")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise FileFormatError(f"{folder}: transcode and skip_connection must be true or false")
    if any(flags):
        config |= {"d_out": d_in, "skip": flags[1], "apply_b_dec_to_input": False}
        if not flags[0]:
            # an autoencoder with a skip connection: what it subtracts goes into the encoder's bias
            _subtract(folder, config, weights)
    own = cfg.get("clipsteer")
    # sparsify names the folder after the module it hooked
    if not isinstance(own, dict):
        own = metadata_of("sparsify", None, folder.resolve().name)
    return Described(config, weights, own)


def _subtract(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    rows = matrix(folder, weights, "W_enc").shape
    fits = [weights[name].shape for name in ("b_enc", "b_dec") if name in weights]
    if fits != [rows[:1], rows[1:]]:
        raise FileFormatError(f"{folder}: no encoder.bias and b_dec that fit encoder.weight")
    shift_encoder(config, weights, -1)


def export(sae: Described) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of sparsify's file, and its cfg.json."""
    weights = dict(sae.weights)
    config = sae.config
    if config["architecture"] != "topk" or config["normalize"] != "none":
        raise ValueError(
            f"export: sparsify knows topk without input normalisation, this is "
            f"{config['architecture']} with "
            f"normalize={config['normalize']!r}; use format='saelens'"
        )
    transcoder = config.get("d_out") is not None
    if transcoder and config["d_out"] != config["d_in"]:
        raise ValueError(
            f"export: a transcoder of sparsify gives what is as wide as its input, this one "
            f"{config['d_out']} from {config['d_in']}; use format='saelens'"
        )
    if not transcoder and not config["apply_b_dec_to_input"]:
        # sparsify always subtracts b_dec: give its share back
        shift_encoder(config, weights, 1)
    weights = {_NAMES.get(name, name): tensor for name, tensor in weights.items()}
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config["d_sae"] // config["d_in"]),
        "normalize_decoder": True,
        "num_latents": config["d_sae"],
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": bool(config.get("skip")),
        "transcode": transcoder,
        "d_in": config["d_in"],
        "clipsteer": sae.metadata,
    }
    return weights, cfg
