"""The layout of sparsify, both ways: cfg.json and sae.safetensors.

Checked against eai-sparsify 1.3, which also wrote the golden files of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import Described, lookup, metadata_of, positive

FILE = "sae.safetensors"


def _refuse(path: Path, cfg: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if cfg.get(key):
            raise FileFormatError(f"{path}: {key} = {cfg[key]!r:.60} is not supported")


def read(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    """sparsify's SparseCoder; transcoders are refused."""
    _refuse(folder, cfg, "transcode", "skip_connection", "signed")
    lookup(folder, "activation", cfg.get("activation", "topk"), {"topk": "topk"})
    d_in = positive(folder, cfg, "d_in")
    # num_latents 0 or absent: the expansion factor says
    d_sae = cfg.get("num_latents") or d_in * positive(folder, cfg, "expansion_factor")
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    config = {"d_in": d_in, "d_sae": d_sae, "architecture": "topk", "k": cfg.get("k")}
    own = cfg.get("clipsteer")
    # sparsify names the folder after the module it hooked
    if not isinstance(own, dict):
        own = metadata_of("sparsify", None, folder.resolve().name)
    return Described(config, weights, own)


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
    W_enc = weights.pop("W_enc")
    b_enc = weights.pop("b_enc")
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
