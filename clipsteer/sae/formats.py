"""SAE folders: clipsteer's own, and those of other libraries.

    clipsteer            cfg.json with "format": "clipsteer-sae", model.safetensors
                         W_enc (d_sae, d_in), W_dec (d_sae, d_in)
    saelens              cfg.json, sae_weights.safetensors
                         W_enc (d_in, d_sae), W_dec (d_sae, d_in)
    sparsify             cfg.json, sae.safetensors
                         encoder.weight, W_dec (d_sae, d_in)
    dictionary_learning  ae.pt, config.json with "trainer"
                         encoder.weight, decoder.weight (d_in, d_sae), or W_enc (d_in, d_sae), W_dec
    visaebench           sae.pt, config.json with "activation"
                         encoder.weight, decoder.weight (d_sae, d_in)
    saev                 one file: a line of JSON, then what torch.save writes
                         W_enc (d_in, d_sae), W_dec
    overcomplete         a state dict: encoder.…, dictionary._weights (d_sae, d_in)
    prisma               *.pt, with config.json or a configuration inside
                         W_enc (d_in, d_sae), W_dec (d_sae, d_in)

What is there decides, not what it is called. Here an SAE is a plain description, ``Described``:
``SAE.from_pretrained`` builds the module from it, and checks the weights against the configuration
before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from clipsteer.io.torch_files import write_torch
from clipsteer.io.weights import some
from clipsteer.sae import (
    dictionary_learning,
    hub,
    overcomplete,
    prisma,
    saelens,
    saev,
    sparsify,
    visaebench,
)
from clipsteer.sae.foreign import Described
from clipsteer.sae.foreign import open_clip_name as open_clip_name
from clipsteer.sae.found import Found
from clipsteer.sae.hub import parse_hub as parse_hub

_OWN_FILE = "model.safetensors"
_KIND = Kind("clipsteer-sae", 1, "an SAE", _OWN_FILE, "cfg.json")
_FINITE = ("W_enc", "W_dec", "b_dec", "W_skip")
# arguments of SAE that a file has only where they say something
OPTIONAL = ("matryoshka", "d_out", "skip")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# of folders that hold SAEs, to name them where one was expected
_DEEP = 3
_MOST = 1000


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


class Format(NamedTuple):
    """A layout of files: what a place lacks to have it, and how it is read."""

    title: str
    missing: Callable[[Found], str | None]  # None where it is one
    read: Callable[[Found], Described]
    whole: bool = False  # nothing is left open for the user to say


def _in_folder(
    title: str, file: str, read: Callable[[Path, dict[str, Any], dict[str, Tensor]], Described]
) -> Format:
    """A layout of cfg.json and a safetensors file; clipsteer's own says so in cfg.json."""
    own = file == _OWN_FILE

    def missing(found: Found) -> str | None:
        if found.cfg is None:
            return "no cfg.json"
        if own:
            right = found.cfg.get("format") == _KIND.format
            return None if right else f"no {_KIND.format!r} as the format of cfg.json"
        return None if (found.path / file).is_file() else f"no {file}"

    def reader(found: Found) -> Described:
        return read(found.path, found.cfg or {}, read_safetensors(found.path / file))

    return Format(title, missing, reader, whole=True)


_FORMATS = {
    "clipsteer": _in_folder("clipsteer", _OWN_FILE, _read_own),
    "saelens": _in_folder("SAELens", saelens.FILE, saelens.read),
    "sparsify": _in_folder("sparsify", sparsify.FILE, sparsify.read),
    "dictionary_learning": Format(
        "dictionary_learning", dictionary_learning.missing, dictionary_learning.read
    ),
    "saev": Format("saev", saev.missing, saev.read),
    "visaebench": Format("ViSAEBench", visaebench.missing, visaebench.read),
    "overcomplete": Format("overcomplete", overcomplete.missing, overcomplete.read),
    "prisma": Format("ViT-Prisma", prisma.missing, prisma.read),
}
EXPORTS = ("saelens", "sparsify", "dictionary_learning")


def detect(folder: str | Path, config: Mapping[str, Any] | None = None) -> str:
    """Whose layout a folder or a file has: one of the names above.

    Raises FileNotFoundError, and FileFormatError, which says of each what is missing.
    """
    return _detect(Found(Path(folder), config))


def _detect(found: Found) -> str:
    path = found.path
    if not path.exists():
        hint = (
            f"; for the hub write {hub.PREFIX + str(path)!r}" if str(path).count("/") == 1 else ""
        )
        raise FileNotFoundError(f"no SAE at {path}{hint}")
    lacking = {}
    for name, format in _FORMATS.items():
        what = format.missing(found)
        if what is None:
            return name
        lacking[format.title] = what
    inner = [str(folder.relative_to(path)) for folder in _inner(path)]
    if inner:
        raise FileFormatError(f"{path}: no SAE itself, but folders with one: {some(inner, 40)}")
    held = "".join(f"\n  {title}: {what}" for title, what in lacking.items())
    raise FileFormatError(f"{path}: no SAE in here; looked for the files of{held}")


def _inner(path: Path) -> list[Path]:
    """The folders below that have the files of an SAE, not too deep and not too many."""
    found: list[Path] = []
    level = [path] if path.is_dir() else []
    looked = 0
    for _ in range(_DEEP):
        level = [p for folder in level for p in sorted(folder.iterdir()) if p.is_dir()]
        looked += len(level)
        if looked > _MOST:
            break
        found += [p for p in level if hub.has_sae({file.name for file in p.iterdir()})]
    return found


@door
def read(
    path: str | Path, config: Mapping[str, Any] | str | Path | None = None
) -> tuple[Path, Described]:
    """The SAE at `path` (see ``SAE.from_pretrained``) as it was written, and where it was found."""
    on_hub = isinstance(path, str) and path.startswith(hub.PREFIX)
    where = hub.download(str(path)) if on_hub else Path(path)
    if isinstance(config, (str, Path)):
        config = json_object(Path(config), read_json(config))
    found = Found(where, config)
    try:
        format = _FORMATS[_detect(found)]
        if format.whole and found.given:
            raise ValueError(
                f"SAE.from_pretrained: {where} is of {format.title}, whose files say all; leave "
                f"out config={found.given!r:.60}"
            )
        described = format.read(found)
    except FileFormatError as error:
        if on_hub and (folders := hub.folders(str(path))):
            raise FileFormatError(f"{error}\n{path} has SAEs in {some(folders, 40)}") from None
        raise
    for key in ("clip_model", "pretrained", "hook_point", "tokens"):
        if not isinstance(described.metadata.get(key), (str, type(None))):
            raise FileFormatError(
                f"{where}: {key} of the metadata must be text, got {described.metadata[key]!r:.60}"
            )
    return where, described


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


def checked(sae: Describable) -> Described:
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
    return write(checked(sae), directory)


def write(found: Described, directory: str | Path) -> Path:
    """What ``checked`` gave, to a folder."""
    config, weights, metadata = found
    dtype = str(weights["W_enc"].dtype).removeprefix("torch.")
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    values = {**config, "dtype": dtype, "metadata": metadata}
    return write_kind(directory, _KIND, weights, values, texts=texts)


def export(sae: Describable, directory: str | Path, format: str) -> Path:
    """Write the SAE for another library: ``format`` is "saelens", "sparsify" or
    "dictionary_learning".

    SAELens takes every architecture, of transcoders all but topk and gated; batch_topk becomes the
    jumprelu it is at inference. sparsify takes topk without normalisation, of transcoders those
    whose output is as wide as their input. dictionary_learning takes every architecture without
    normalisation, no transcoders; what is matryoshka is so there where it is batch_topk, and
    computes the same where it is not. Where a library subtracts b_dec from its input and the SAE
    does not, that is folded into the encoder's bias.

    Raises:
        ValueError: a format that cannot say what this SAE does, an unknown format, NaN among the
            weights.
    """
    if format not in EXPORTS:
        raise ValueError(f"export: format must be one of {EXPORTS}, got {format!r}")
    described = checked(sae)
    directory = Path(directory)
    if format == "dictionary_learning":
        weights, cfg = dictionary_learning.export(described)
        directory.mkdir(parents=True, exist_ok=True)
        write_torch(directory / dictionary_learning.FILE, weights)
        write_json(directory / "config.json", cfg)
        return directory
    writer = saelens if format == "saelens" else sparsify
    weights, cfg = writer.export(described)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / writer.FILE, weights)
    write_json(directory / "cfg.json", cfg)
    return directory
