"""The state dicts of overcomplete's SAEs, to be read with what their constructor was given.

The library writes no configuration. ``config`` of ``SAE.from_pretrained``, or a config.json beside
the file, names

    class                  "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE" or "RAJumpSAE"
    top_k                  of TopKSAE and RATopKSAE; null: a tenth of the features, as there
    threshold              of BatchTopKSAE: its running_threshold, which its state dict leaves out
    dictionary_params      {"normalization": "l2"}, which also is what is taken without
    delta                  of RATopKSAE and RAJumpSAE, 1.0 without

and whatever else the constructor takes, which is not needed. Checked against overcomplete 0.3.0,
which also wrote the golden files of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError
from clipsteer.io.weights import some
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

_CLASSES = {
    "TopKSAE": "topk",
    "RATopKSAE": "topk",
    # at inference: all above one threshold, its k is of a whole batch
    "BatchTopKSAE": "jumprelu",
    "JumpSAE": "jumprelu",
    "RAJumpSAE": "jumprelu",
}
_EPS = 1e-8
_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda d: d / (d.norm(p=2, dim=1, keepdim=True) + _EPS),
    "max_l2": lambda d: d / d.norm(p=2, dim=1).amax(),
    "l1": lambda d: d / (d.norm(p=1, dim=1, keepdim=True) + _EPS),
    "max_l1": lambda d: d / d.norm(p=1, dim=1).amax(),
    "identity": lambda d: d,
}
# a dictionary of atoms, and one of points that atoms are made of
_DICTIONARIES = ("dictionary._weights", "dictionary.C")
_LINEAR = ("encoder.final_block.0.weight", "encoder.final_block.0.bias")
_UNTIED = ("encoder.weight", "encoder.bias")


def missing(found: Found) -> str | None:
    """What makes this not the library's, None where it is."""
    if found.file is None or not any(name in found.tensors for name in _DICTIONARIES):
        return found.lacks(_DICTIONARIES[0])
    return None


def read(found: Found) -> Described:
    """The SAE in evaluation mode, as ``load_state_dict`` followed by ``train()`` and ``eval()``
    makes it."""
    config = found.config or {}
    path = found.file or found.path
    if "class" not in config:
        raise FileFormatError(
            f"{path}: overcomplete writes no configuration; pass config={{'class': …}}, or write "
            f"a config.json beside it, with what its constructor was given (class: one of "
            f"{', '.join(_CLASSES)}; top_k; dictionary_params)"
        )
    architecture = lookup(path, "class", config["class"], _CLASSES)
    theirs = found.copies()
    # a tied encoder holds the dictionary, too
    tied = [name for name in theirs if name.startswith("encoder.tied_to.")]
    W_dec = _dictionary(found, config, theirs)
    d_sae, d_in = W_dec.shape
    weights = {"W_dec": W_dec, "b_dec": torch.zeros(d_in, dtype=W_dec.dtype)}
    if tied:
        weights["W_enc"] = W_dec.clone()
        for name in tied:
            del theirs[name]
    else:
        names = _LINEAR if _LINEAR[0] in theirs else _UNTIED
        weights["W_enc"] = matrix(path, theirs, names[0])
        del theirs[names[0]]
    bias = next((theirs.pop(name) for name in (_LINEAR[1], _UNTIED[1]) if name in theirs), None)
    weights["b_enc"] = torch.zeros(d_sae, dtype=W_dec.dtype) if bias is None else bias
    k = None
    if architecture == "topk":
        k = _top_k(found, config, d_sae)
    else:
        weights["threshold"] = _threshold(found, config, theirs, W_dec)
    if theirs:
        raise FileFormatError(
            f"{path}: {some(sorted(theirs))}: of an encoder that is more than one linear layer, or "
            f"not of a {config['class']}"
        )
    sizes = {"input_shape": d_in, "nb_concepts": d_sae} | config
    ours = {
        "d_in": positive(path, sizes, "input_shape"),
        "d_sae": positive(path, sizes, "nb_concepts"),
        "architecture": architecture,
        "k": k,
        "apply_b_dec_to_input": False,
    }
    return Described(ours, weights, metadata_of("overcomplete", None, None))


def _dictionary(found: Found, config: dict[str, Any], theirs: dict[str, Tensor]) -> Tensor:
    """(d_sae, d_in): the atoms, as they are fused for evaluation; their tensors are taken out."""
    path = found.file or found.path
    multiplier = theirs.pop("dictionary.multiplier", torch.zeros(()))
    if multiplier.numel() != 1 or not multiplier.is_floating_point():
        raise FileFormatError(f"{path}: dictionary.multiplier must be one number")
    if (_DICTIONARIES[1] in theirs) != str(config["class"]).startswith("RA"):
        raise FileFormatError(f"{path}: the dictionary is not that of a {config['class']}")
    if _DICTIONARIES[0] in theirs:
        params = config.get("dictionary_params") or {}
        if not isinstance(params, dict):
            raise FileFormatError(f"{path}: dictionary_params must be an object")
        how = params.get("normalization", "l2")
        lookup(path, "normalization", how, {name: name for name in _NORMALIZATIONS})
        atoms = _NORMALIZATIONS[how](matrix(path, theirs, _DICTIONARIES[0]))
        del theirs[_DICTIONARIES[0]]
    else:
        points = matrix(path, theirs, "dictionary.C")  # (points, d_in)
        mixture = matrix(path, theirs, "dictionary.W")  # (d_sae, points)
        relax = matrix(path, theirs, "dictionary.Relax")  # (d_sae, d_in)
        if mixture.shape != (len(relax), len(points)) or points.shape[1] != relax.shape[1]:
            raise FileFormatError(f"{path}: dictionary.C, W and Relax do not fit one another")
        mixture = mixture.relu()
        mixture = mixture / (mixture.sum(-1, keepdim=True) + _EPS)
        delta = number(path, config, "delta", 1.0)
        relax = relax * (delta / relax.norm(dim=-1, keepdim=True)).clamp(max=1)
        atoms = mixture @ points + relax
        for name in ("C", "W", "Relax"):
            del theirs[f"dictionary.{name}"]
    return atoms * multiplier.exp().reshape(())


def _top_k(found: Found, config: dict[str, Any], d_sae: int) -> int:
    if "top_k" not in config:
        raise FileFormatError(f"{found.path}: no top_k of the {config['class']} in the config")
    if config["top_k"] is None:
        return max(d_sae // 10, 1)
    return positive(found.path, config, "top_k")


def _threshold(
    found: Found, config: dict[str, Any], theirs: dict[str, Tensor], W_dec: Tensor
) -> Tensor:
    """(d_sae,): what must be exceeded; the library keeps what equals its thresholds."""
    path = found.file or found.path
    if config["class"] != "BatchTopKSAE":
        logarithms = theirs.pop("thresholds", None)
        if logarithms is None or not logarithms.is_floating_point():
            raise FileFormatError(f"{path}: no thresholds of the {config['class']}")
        return strictly_above(logarithms.exp())
    if config.get("threshold") is None:
        raise FileFormatError(
            f"{path}: a BatchTopKSAE's state dict lacks its threshold; pass config={{'class': "
            f"'BatchTopKSAE', 'threshold': float(sae.running_threshold)}}"
        )
    threshold = torch.tensor(number(path, config, "threshold", 0.0), dtype=W_dec.dtype)
    return strictly_above(threshold).expand(len(W_dec))
