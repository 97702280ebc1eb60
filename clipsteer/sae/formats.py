"""SAE folders: clipsteer's own, and those of SAELens, sparsify and ViT-Prisma.

    clipsteer   cfg.json with "format": "clipsteer-sae", model.safetensors
                W_enc, W_dec (d_sae, d_in)
    saelens     cfg.json, sae_weights.safetensors
                W_enc (d_in, d_sae), W_dec (d_sae, d_in)
    sparsify    cfg.json, sae.safetensors
                encoder.weight, W_dec (d_sae, d_in)
    prisma      *.pt, with config.json or a configuration inside
                W_enc (d_in, d_sae), W_dec (d_sae, d_in)

Here an SAE is a plain description, ``Described``: ``SAE.from_pretrained`` builds the module from
it, and checks the weights against the configuration before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from clipsteer._version import __version__
from clipsteer.io.doors import door
from clipsteer.io.files import (
    FileFormatError,
    json_object,
    read_json,
    read_safetensors,
    refuse_nan,
    write_json,
    write_safetensors,
)
from clipsteer.io.kinds import Kind, write_kind
from clipsteer.io.weights import some
from clipsteer.sae import prisma, saelens, sparsify
from clipsteer.sae.foreign import Described
from clipsteer.sae.foreign import open_clip_name as open_clip_name

_OWN_FILE = "model.safetensors"
_KIND = Kind("clipsteer-sae", 1, "an SAE", _OWN_FILE, "cfg.json")
_HUB_FILES = (
    "cfg.json",
    "config.json",
    _OWN_FILE,
    saelens.FILE,
    sparsify.FILE,
    "weights.pt",
    "n_images_*.pt",
)
_HUB = "hf-hub:"
_FINITE = ("W_enc", "W_dec", "b_dec", "W_skip")
# arguments of SAE that a file has only where they say something
OPTIONAL = ("matryoshka", "d_out", "skip")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Describable(Protocol):
    """What can be written: an SAE."""

    def described(self) -> Described:
        """Configuration, weights and metadata."""
        ...


def _read_own(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> Described:
    path = folder / "cfg.json"
    _KIND.check(path, cfg)
    names = ("d_in", "d_sae", "architecture", "k", "normalize", "apply_b_dec_to_input")
    if missing := [name for name in names if name not in cfg]:
        raise FileFormatError(f"{path}: no {missing[0]!r}")
    if not isinstance(cfg["apply_b_dec_to_input"], bool):
        raise FileFormatError(f"{path}: apply_b_dec_to_input must be true or false")
    config = {name: cfg[name] for name in (*names, *OPTIONAL) if name in cfg}
    return Described(config, weights, json_object(path, cfg.get("metadata", {})))


_READERS = {
    "clipsteer": (_OWN_FILE, _read_own),
    "saelens": (saelens.FILE, saelens.read),
    "sparsify": (sparsify.FILE, sparsify.read),
}
_WRITERS = {"saelens": (saelens.FILE, saelens.export), "sparsify": (sparsify.FILE, sparsify.export)}


def detect(folder: str | Path) -> str:
    """ "clipsteer", "saelens", "sparsify" or "prisma". Raises FileNotFoundError or
    FileFormatError."""
    folder = Path(folder)
    if folder.is_file() and folder.suffix == ".pt":
        return "prisma"
    if not folder.exists():
        hint = f"; for the hub write {_HUB + str(folder)!r}" if str(folder).count("/") == 1 else ""
        raise FileNotFoundError(f"no SAE at {folder}{hint}")
    if (folder / "cfg.json").is_file():
        cfg = json_object(folder / "cfg.json", read_json(folder / "cfg.json"))
        if cfg.get("format") == _KIND.format:
            return "clipsteer"
        for name, found in ((saelens.FILE, "saelens"), (sparsify.FILE, "sparsify")):
            if (folder / name).is_file():
                return found
    elif folder.is_dir() and any(folder.glob("*.pt")):
        return "prisma"
    raise FileFormatError(
        f"{folder}: no SAE in here; looked for cfg.json with {_OWN_FILE} (clipsteer), "
        f"{saelens.FILE} (SAELens) or {sparsify.FILE} (sparsify), and for *.pt (ViT-Prisma)"
    )


def parse_hub(path: str) -> tuple[str, str]:
    """ "hf-hub:org/repo/sub/folder" -> ("org/repo", "sub/folder"). Raises ValueError."""
    parts = path.removeprefix(_HUB).split("/")
    if len(parts) < 2 or not all(parts) or any(part in (".", "..") for part in parts):
        raise ValueError(
            "SAE.from_pretrained: expected 'hf-hub:org/repo' or 'hf-hub:org/repo/subfolder', "
            f"got {path!r}"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def _download(path: str) -> Path:
    repo, subfolder = parse_hub(path)
    alternative = f"download the folder by hand and pass its path in place of {path!r}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"reading {path!r} needs huggingface_hub; install it, or {alternative}"
        ) from error
    patterns = [str(PurePosixPath(subfolder, name)) for name in _HUB_FILES]
    try:
        root = snapshot_download(repo, allow_patterns=patterns)
    except Exception as error:
        raise RuntimeError(
            f"the hub did not give {repo!r} ({type(error).__name__}: {error}); {alternative}"
        ) from error
    folder = Path(root) / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"the hub repository {repo!r} has no SAE in {subfolder!r}")
    return folder


@door
def read(path: str | Path) -> tuple[Path, Described]:
    """The SAE at `path` (see ``SAE.from_pretrained``) as it was written, and the folder that it was
    found in."""
    folder = _download(path) if isinstance(path, str) and path.startswith(_HUB) else Path(path)
    kind = detect(folder)
    if kind == "prisma":
        found = prisma.read(folder)
    else:
        name, reader = _READERS[kind]
        cfg = json_object(folder / "cfg.json", read_json(folder / "cfg.json"))
        found = reader(folder, cfg, read_safetensors(folder / name))
    for key in ("clip_model", "pretrained", "hook_point", "tokens"):
        if not isinstance(found.metadata.get(key), (str, type(None))):
            raise FileFormatError(
                f"{folder}: {key} of the metadata must be text, got {found.metadata[key]!r:.60}"
            )
    return folder, found


def fitting(
    path: Path, weights: Mapping[str, Any], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that an SAE's state dict wants; FileFormatError where one is missing, does not
    fit, or is there and unknown: what it would do to the result is not known either."""
    chosen: dict[str, Tensor] = {}
    for name, like in wanted.items():
        tensor = weights.get(name)
        if not isinstance(tensor, Tensor):
            there = sorted(map(str, weights))
            raise FileFormatError(f"{path}: no tensor {name!r}; there are {there}")
        if tensor.shape != like.shape or tensor.dtype not in _FLOATS:
            raise FileFormatError(
                f"{path}: {name} must be a floating tensor of shape {tuple(like.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        chosen[name] = tensor.detach()
    unknown = {name for name, value in weights.items() if isinstance(value, Tensor)} - set(chosen)
    if unknown:
        raise FileFormatError(
            f"{path}: this architecture has no {some(sorted(map(repr, unknown)))}; it has "
            f"{', '.join(wanted)}"
        )
    refuse_nan(path, chosen)
    # a threshold or a bias of infinity keeps a feature off
    refuse_nan(path, {n: t for n, t in chosen.items() if n in _FINITE}, infinity=True)
    return chosen


def _checked(sae: Describable) -> Described:
    """What is about to be written; whatever could not be read again shows here, before a file is
    touched."""
    config, weights, metadata = sae.described()
    broken = []
    for name, tensor in weights.items():
        wrong = ~tensor.isfinite() if name in _FINITE else tensor.isnan()
        if bool(wrong.any()):
            broken.append(name)
    if broken:
        raise ValueError(
            f"SAE: {', '.join(broken)} hold NaN or infinities; such a file could not be loaded "
            f"again"
        )
    metadata = {**metadata, "clipsteer_version": __version__}
    return Described(config, weights, json.loads(json.dumps(metadata, allow_nan=False)))


def save(sae: Describable, directory: str | Path) -> Path:
    """See ``SAE.save_pretrained``."""
    config, weights, metadata = _checked(sae)
    dtype = str(weights["W_enc"].dtype).removeprefix("torch.")
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    values = {**config, "dtype": dtype, "metadata": metadata}
    return write_kind(directory, _KIND, weights, values, texts=texts)


def export(sae: Describable, directory: str | Path, format: str) -> Path:
    """Write the SAE for another library: ``format`` is "saelens" or "sparsify".

    SAELens takes every architecture; batch_topk becomes the jumprelu it is at inference. sparsify
    takes topk without normalisation; apply_b_dec_to_input=False is folded into the encoder's bias.

    Raises:
        ValueError: a format that cannot say what this SAE does, an unknown format, NaN among the
            weights.
    """
    if format not in _WRITERS:
        raise ValueError(f"export: format must be one of {tuple(_WRITERS)}, got {format!r}")
    if sae.described().config.get("d_out") is not None:
        raise ValueError(f"export: {format!r} is not written for transcoders; use save_pretrained")
    name, writer = _WRITERS[format]
    weights, cfg = writer(_checked(sae))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / name, weights)
    write_json(directory / "cfg.json", cfg)
    return directory
