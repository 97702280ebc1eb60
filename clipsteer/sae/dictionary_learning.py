"""The layout of dictionary_learning, both ways: ae.pt, and config.json with a block "trainer".

Checked against dictionary-learning 0.1.0, which also wrote the golden files of the tests.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import torch
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
from clipsteer.sae.found import Found

FILE = "ae.pt"
_CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "batch_topk",
    # as it was first spelt
    "MatroyshkaBatchTopKSAE": "batch_topk",
}
# theirs -> ours
_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_TENSORS = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
        "r_mag": "r_mag",
    },
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "threshold"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "threshold": "threshold"},
}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
# that do not subtract the decoder's bias from their input
_AS_IT_IS = ("AutoEncoderNew", "JumpReluAutoEncoder")


def missing(found: Found) -> str | None:
    """What makes this not the library's, None where it is."""
    if found.file is None or found.line is not None:
        return f"no {FILE}"
    if _trainer(found) is None:
        return 'no config.json with a block "trainer" that names its dict_class'
    return None


def _trainer(found: Found) -> dict[str, Any] | None:
    """The block that says what was trained: "trainer", "trainer_config", or the whole file."""
    config = found.config or {}
    for block in (config.get("trainer"), config.get("trainer_config"), config):
        if isinstance(block, dict) and isinstance(block.get("dict_class"), str):
            return block
    return None


def read(found: Found) -> Described:
    """What ``load_dictionary`` of the library makes of the folder."""
    config = found.config or {}
    trainer = _trainer(found) or {}
    path = found.file or found.path
    # older files write the class out: <class '...dictionary.AutoEncoder'>
    name = (re.findall(r"\w+", trainer["dict_class"]) or [""])[-1]
    architecture = lookup(path, "dict_class", name, _CLASSES)
    name = name.replace("Matroyshka", "Matryoshka")
    theirs = found.copies()
    k = _k(path, trainer, theirs.pop("k", None)) if "TopK" in name else None
    groups = theirs.pop("group_sizes", None) if name.startswith("Matryoshka") else None
    if name == "AutoEncoderTopK":
        theirs.pop("threshold", None)  # of another way to encode, which is not the class's own
    weights = {_TENSORS[name].get(key, key): tensor for key, tensor in theirs.items()}
    for key in ("W_enc", "W_dec"):
        matrix(path, weights, key)
    linear = "encoder.weight" in _TENSORS[name]
    turned = "W_dec" if linear else "W_enc"
    weights[turned] = weights[turned].T
    if name == "AutoEncoder":
        _normalize(path, weights)
    d_sae, d_in = weights["W_enc"].shape
    sizes = {"activation_dim": d_in, "dict_size": d_sae} | trainer
    ours = {
        "d_in": positive(path, sizes, "activation_dim"),
        "d_sae": positive(path, sizes, "dict_size"),
        "architecture": architecture,
        "k": k,
        "apply_b_dec_to_input": name not in _AS_IT_IS,
    }
    if groups is not None:
        ours["matryoshka"] = _prefixes(path, groups)
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and buffer.get("io") == "in_and_out":
        _make_transcoder(path, ours, weights)
    own = config.get("clipsteer")
    if isinstance(own, dict):
        return Described(ours, weights, own)
    more = {"source_layer": trainer["layer"]} if type(trainer.get("layer")) is int else {}
    metadata = metadata_of(
        "dictionary_learning", trainer.get("lm_name"), trainer.get("submodule_name"), **more
    )
    return Described(ours, weights, metadata)


def _k(path: Path, trainer: dict[str, Any], stored: Tensor | None) -> Any:
    """k of the configuration and of the file, which must agree."""
    k = trainer.get("k")
    if stored is None or stored.numel() != 1:
        return k
    if k is not None and k != stored.item():
        raise FileFormatError(f"{path}: k is {stored.item()}, its config.json says {k!r:.60}")
    return stored.item()


def _make_transcoder(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """What was trained from one activation to another; its classes subtract the bias of the output
    from the input, which goes into the encoder's bias."""
    if config["apply_b_dec_to_input"]:
        biases = [t.shape for n, t in weights.items() if n in ("b_enc", "b_gate", "b_mag", "r_mag")]
        d_sae, d_in = weights["W_enc"].shape
        count = 3 if config["architecture"] == "gated" else 1
        whole = biases == [(d_sae,)] * count
        if not whole or "b_dec" not in weights or weights["b_dec"].shape != (d_in,):
            raise FileFormatError(f"{path}: biases that do not fit its encoder")
        shift_encoder(config, weights, -1)
    config |= {"d_out": weights["W_dec"].shape[1], "apply_b_dec_to_input": False}


def _prefixes(path: Path, groups: Tensor) -> list[int]:
    """The sizes of the groups -> where each ends."""
    if groups.dim() != 1 or groups.dtype != torch.int64 or groups.numel() > 1 << 16:
        raise FileFormatError(f"{path}: group_sizes must be a short list of whole numbers")
    return groups.cumsum(0).tolist()


def _normalize(path: Path, weights: dict[str, Tensor]) -> None:
    """Give every row of the decoder norm 1, as the library does when it loads this class, unless
    all have it within 1e-5; what is reconstructed stays. A row of zeros stays, too."""
    norm = torch.linalg.vector_norm(weights["W_dec"], dim=1)
    if bool(torch.isclose(norm, torch.ones_like(norm)).all()):
        return
    rows = [weights[name].shape[:1] for name in ("W_enc", "b_enc") if name in weights]
    if rows != [norm.shape] * 2:
        raise FileFormatError(f"{path}: encoder and decoder have not the same number of features")
    norm = torch.where(norm > 0, norm, 1)
    weights["W_dec"] = weights["W_dec"] / norm.unsqueeze(1)
    weights["W_enc"] = weights["W_enc"] * norm.unsqueeze(1)
    weights["b_enc"] = weights["b_enc"] * norm


def export(sae: Described) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the library's file, and its config.json."""
    config = sae.config
    name = _class_of(config)
    weights = dict(sae.weights)
    subtracts = name not in _AS_IT_IS
    if subtracts != config["apply_b_dec_to_input"]:
        shift_encoder(config, weights, 1 if subtracts else -1)
    turned = "W_dec" if "encoder.weight" in _TENSORS[name] else "W_enc"
    weights[turned] = weights[turned].T
    theirs = {key: weights[ours].contiguous() for key, ours in _TENSORS[name].items()}
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[name],
        "dict_class": name,
        "activation_dim": config["d_in"],
        "dict_size": config["d_sae"],
        "device": "cpu",
        "layer": None,
        "lm_name": sae.metadata.get("clip_model"),
        "submodule_name": sae.metadata.get("hook_point"),
    }
    if "TopK" in name:
        trainer["k"] = config["k"]
        theirs["k"] = torch.tensor(config["k"], dtype=torch.int)
        theirs.setdefault("threshold", torch.tensor(-1.0))
    if name.startswith("Matryoshka"):
        ends = [0, *config["matryoshka"]]
        sizes = [end - start for start, end in itertools.pairwise(ends)]
        trainer |= {
            "group_sizes": sizes,
            "group_fractions": [size / config["d_sae"] for size in sizes],
            "group_weights": [1 / len(sizes)] * len(sizes),
        }
        theirs["group_sizes"] = torch.tensor(sizes)
    return theirs, {"trainer": trainer, "clipsteer": sae.metadata}


def _class_of(config: dict[str, Any]) -> str:
    """The class that computes the same, or ValueError."""
    wrong = []
    if config["normalize"] != "none":
        wrong.append(f"normalize={config['normalize']!r}")
    if config.get("d_out") is not None:
        wrong.append("a transcoder")
    if config.get("skip"):
        wrong.append("a skip connection")
    if isinstance(config["k"], float):
        wrong.append(f"k={config['k']}, which is not whole")
    if wrong:
        raise ValueError(
            f"export: dictionary_learning has no class for {' and '.join(wrong)}; use "
            f"format='saelens'"
        )
    architecture = config["architecture"]
    if architecture == "relu":
        return "AutoEncoder" if config["apply_b_dec_to_input"] else "AutoEncoderNew"
    if architecture == "batch_topk":
        return "MatryoshkaBatchTopKSAE" if config.get("matryoshka") else "BatchTopKSAE"
    names = {"topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
    return names.get(architecture, "GatedAutoEncoder")
