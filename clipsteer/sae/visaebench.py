"""The layout of ViSAEBench, to be read: sae.pt, and config.json with an "activation".

Checked against visaebench 0.1.0, which also wrote what the golden files of the tests expect.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.sae.foreign import (
    Described,
    lookup,
    matrix,
    metadata_of,
    number,
    positive,
    strictly_above,
)
from clipsteer.sae.found import Found

logger = logging.getLogger(__name__)

_KEYS = ("activation", "sae_type", "architecture")
_ACTIVATIONS = {"topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}
# theirs -> ours; the second layout is that of overcomplete
_SIMPLE = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
_OVERCOMPLETE = {
    "encoder.final_block.0.weight": "W_enc",
    "encoder.final_block.0.bias": "b_enc",
    "dictionary._weights": "W_dec",
}
_THRESHOLD = "_running_threshold"
# of the thresholds of jumprelu where the file has none
_DEFAULT_THRESHOLD = 0.01


def missing(found: Found) -> str | None:
    """What makes this not the benchmark's, None where it is."""
    if found.file is None or found.line is not None:
        return "no sae.pt"
    config = found.config
    if config is None:
        if any((found.folder / name).is_file() for name in ("config.yaml", "config.yml")):
            return "config.yaml is not read; write it as config.json"
        return "no config.json"
    if "class" in config or not any(isinstance(config.get(key), str) for key in _KEYS):
        return f"config.json names none of {', '.join(_KEYS)}"
    simple = found.lacks("encoder.weight", "decoder.weight")
    if simple is None or found.lacks(*_OVERCOMPLETE) is None:
        return None
    return simple


def read(found: Found) -> Described:
    """What ``load_sae`` of the benchmark makes of the folder.

    What the benchmark does before it encodes, (x - mean) / std with the statistics of its own
    activations, is in no file of its; with "mean" (a number a dimension) and "std" in the
    configuration that becomes part of the SAE.
    """
    config = found.config or {}
    path = found.file or found.path
    named = next(config[key] for key in _KEYS if isinstance(config.get(key), str))
    architecture = lookup(path, "activation", named.lower(), _ACTIVATIONS)
    theirs = found.copies()
    names = _SIMPLE if "encoder.weight" in theirs else _OVERCOMPLETE
    multiplier = theirs.pop("dictionary.multiplier", None)
    running = theirs.pop(_THRESHOLD, None)
    jumps = _jumps(found, theirs) if architecture == "jumprelu" else None
    # the benchmark computes in float32 whatever the file holds
    weights = {names.get(key, key): tensor.float() for key, tensor in theirs.items()}
    for key in ("W_enc", "W_dec"):
        matrix(path, weights, key)
    if multiplier is not None and names is _OVERCOMPLETE:
        weights["W_dec"] = weights["W_dec"] * multiplier.float().exp()
    d_sae, d_in = weights["W_enc"].shape
    sizes = {"input_dim": d_in, "hidden_dim": d_sae} | config
    weights.setdefault("b_dec", torch.zeros(d_in))
    k = config.get("k")
    if architecture == "batch_topk":
        threshold = _threshold(found, config, running)
        if k is None:
            # nothing says how many are kept in training: what is left is its threshold
            architecture = "jumprelu"
            threshold = threshold.expand(d_sae)
        weights["threshold"] = threshold
    elif architecture == "jumprelu":
        if jumps is None:
            logger.warning("%s: no thresholds; all are %s", path, _DEFAULT_THRESHOLD)
            jumps = torch.full((d_sae,), _DEFAULT_THRESHOLD)
        weights["threshold"] = jumps.float()
    more = {
        key: config[key] for key in ("backbone", "layer") if type(config.get(key)) in (str, int)
    }
    if not _standardize(found, config, weights):
        more["input"] = "(x - mean) / std"
        logger.warning(
            "%s: takes standardised activations, (x - mean) / std, and the file has no mean and "
            "std; pass config={'mean': …, 'std': …} for an SAE of the activations themselves",
            path,
        )
    ours = {
        "d_in": positive(path, sizes, "input_dim"),
        "d_sae": positive(path, sizes, "hidden_dim"),
        "architecture": architecture,
        "k": k,
        "apply_b_dec_to_input": False,
    }
    return Described(ours, weights, metadata_of("visaebench", None, None, **more))


def _jumps(found: Found, theirs: dict[str, Tensor]) -> Tensor | None:
    """The thresholds, a feature each, of jumprelu."""
    jumps = theirs.pop("jump_thresholds", None)
    if jumps is None and "thresholds" in theirs:
        if "encoder.weight" not in theirs:
            raise FileFormatError(
                f"{found.file}: thresholds in the layout of overcomplete, which keeps their "
                f"logarithms, where visaebench takes them as they are; config={{'class': "
                f"'JumpSAE'}} reads them as overcomplete does, 'jump_thresholds' in place of "
                f"'thresholds' is read as visaebench does"
            )
        jumps = theirs.pop("thresholds")
    return jumps


def _threshold(found: Found, config: dict[str, Any], running: Tensor | None) -> Tensor:
    """() float32: what batch_topk must exceed; the benchmark keeps what equals its threshold."""
    default = 0.0 if running is None or running.numel() != 1 else float(running)
    return strictly_above(torch.tensor(number(found.path, config, "threshold", default)))


def _standardize(found: Found, config: dict[str, Any], weights: dict[str, Tensor]) -> bool:
    """Make (x - mean) / std, and its inverse on what is decoded, part of the weights, where the
    configuration has them."""
    given = [config.get(key) for key in ("mean", "std")]
    if given == [None, None]:
        return False
    d_in = weights["W_enc"].shape[1]
    try:
        mean, std = (torch.as_tensor(part).double() for part in given)
        fits = mean.shape == (d_in,) and std.numel() == 1 and float(std) > 0
    except (TypeError, ValueError, RuntimeError):
        fits = False
    shapes = [weights[name].shape for name in ("b_enc", "b_dec") if name in weights]
    if not fits or shapes != [weights["W_enc"].shape[:1], mean.shape]:
        raise FileFormatError(
            f"{found.path}: mean must be {d_in} numbers and std a positive one, together"
        )
    scaled = weights["W_enc"].double() / std
    b_enc = weights["b_enc"].double() - scaled @ mean
    b_dec = weights["b_dec"].double() * std + mean
    weights |= {
        "W_enc": scaled.float(),
        "W_dec": (weights["W_dec"].double() * std).float(),
        "b_enc": b_enc.float(),
        "b_dec": b_dec.float(),
    }
    return True
