"""What the readers and writers of other libraries' SAEs have in common.

A reader turns a configuration and the tensors of a file into a ``Described``, a writer turns one
into theirs; a module each: ``saelens``, ``sparsify``, ``dictionary_learning``, ``visaebench``,
``saev``, ``overcomplete``, ``prisma`` in ``clipsteer.sae``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError

_SCALING = ("scaling_factor", "finetuning_scaling_factor")


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
    layer = int(match[1])
    site = match[2]
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


def without_scaling(
    path: Path, weights: Mapping[str, Tensor], *, applied: bool
) -> dict[str, Tensor]:
    """The weights (W_dec with a feature a row) with the factors of a fine-tuned SAE folded in.

    SAELens before version 6, and what grew from it, decode (acts · factor) W_dec where the
    configuration says that the SAE was fine-tuned (``applied``). For a while they wrote ones into
    every file.

    Raises FileFormatError for other factors than ones where they are not applied, and for factors
    of another shape than one a feature.
    """
    rest = {name: tensor for name, tensor in weights.items() if name not in _SCALING}
    names = [name for name in _SCALING if name in weights]
    if not names:
        return rest
    factor = weights[names[0]]
    decoder = rest["W_dec"]
    fits = decoder.dim() == 2 and factor.shape == decoder.shape[:1] and factor.is_floating_point()
    if len(names) > 1 or not fits:
        raise FileFormatError(
            f"{path}: {' and '.join(names)} must be one factor a feature, W_dec is "
            f"{tuple(decoder.shape)}, {names[0]} {factor.dtype} {tuple(factor.shape)}"
        )
    if bool((factor == 1).all()):
        return rest
    if not applied:
        raise FileFormatError(
            f"{path}: {names[0]} is not 1 everywhere, and the configuration does not say "
            f"finetuning_scaling_factor: whether it counts cannot be known"
        )
    wide = torch.promote_types(decoder.dtype, torch.float32)
    rest["W_dec"] = (decoder.to(wide) * factor.to(wide).unsqueeze(1)).to(decoder.dtype)
    return rest


def positive(path: Path, cfg: Mapping[str, Any], key: str) -> int:
    """The positive integer at a key, or FileFormatError."""
    value = cfg.get(key)
    if type(value) is not int or value < 1:
        raise FileFormatError(f"{path}: {key} must be a positive integer, got {value!r:.60}")
    return value


def lookup(path: Path, what: str, value: Any, table: Mapping[Any, str]) -> str:
    """What a value of theirs is called here, or FileFormatError, which names those supported."""
    try:
        return table[value]
    except (KeyError, TypeError):
        known = ", ".join(str(key) for key in table if isinstance(key, str))
        raise FileFormatError(
            f"{path}: {what} {value!r:.60} is not supported; supported: {known}"
        ) from None


def number(path: Path, cfg: Mapping[str, Any], key: str, default: float) -> float:
    """The number at a key, or FileFormatError."""
    value = cfg.get(key)
    if value is None:
        return default
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise FileFormatError(f"{path}: {key} must be a number, got {value!r:.60}")


def matrix(path: Path | None, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The floating matrix of a name, or FileFormatError."""
    tensor = weights.get(name)
    fits = tensor is not None and tensor.dim() == 2 and tensor.is_floating_point()
    if tensor is None or not fits or not tensor.numel():
        raise FileFormatError(f"{path}: no matrix {name!r}; there are {sorted(weights)}")
    return tensor


def shift_encoder(config: Mapping[str, Any], weights: dict[str, Tensor], sign: int) -> None:
    """Move W_enc b_dec into the biases of the encoder, in float64, and round once: with +1 for a
    library that subtracts b_dec from its input where the SAE does not, with -1 the other way."""
    wide = weights["W_enc"].double() @ weights["b_dec"].double()

    def shift(name: str, by: Tensor) -> None:
        bias = weights[name]
        weights[name] = (bias.double() + sign * by).to(bias.dtype)

    if config["architecture"] == "gated":
        shift("b_gate", wide)
        shift("b_mag", wide * weights["r_mag"].double().exp())
    else:
        shift("b_enc", wide)


def strictly_above(threshold: Tensor) -> Tensor:
    """The largest thresholds t with (x >= threshold) = (x > t) for every x of their dtype."""
    return torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))
