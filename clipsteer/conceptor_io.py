"""Conceptor files: one safetensors file with U and s (and mean), float64, as ``Conceptor`` keeps them.

Header: format, format_version, rest ("0" or "1"), aperture if known, and the conceptor's metadata under "meta.".
"""

from __future__ import annotations

from pathlib import Path

import torch

from clipsteer._files import FileFormatError, read_safetensors, read_safetensors_header, write_safetensors
from clipsteer.conceptor import Conceptor

_FORMAT, _FORMAT_VERSION = "clipsteer-conceptor", "1"


def save(conceptor: Conceptor, path: str | Path) -> Path:
    """See ``Conceptor.save``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "rest": str(conceptor._rest)}
    if conceptor.aperture is not None:
        head["aperture"] = repr(conceptor.aperture)
    tensors = {"U": conceptor._U, "s": conceptor._s}
    if conceptor.mean is not None:
        tensors["mean"] = conceptor.mean
    write_safetensors(path, tensors, {**{f"meta.{k}": v for k, v in conceptor.metadata.items()}, **head})
    return path


def load(path: str | Path) -> Conceptor:
    """See ``Conceptor.load``."""
    path = Path(path)
    head = read_safetensors_header(path).metadata
    if head.get("format") != _FORMAT or head.get("format_version") != _FORMAT_VERSION:
        raise FileFormatError(f"{path}: not a conceptor of format_version {_FORMAT_VERSION}")
    tensors = read_safetensors(path)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{path}: {name!r} holds values that are not finite")
    named = {"U", "s"} <= tensors.keys() <= {"U", "s", "mean"}
    if not named or any(t.dtype != torch.float64 for t in tensors.values()):
        raise FileFormatError(f"{path}: expected U, s and maybe mean, all float64; got {sorted(tensors)}")
    try:
        aperture = float(head["aperture"]) if "aperture" in head else None
        metadata = {k[5:]: v for k, v in head.items() if k.startswith("meta.")}
        rest = {"0": 0, "1": 1}.get(head.get("rest", ""), -1)
        return Conceptor.from_factors(
            tensors["U"], tensors["s"], rest=rest, aperture=aperture, mean=tensors.get("mean"), metadata=metadata
        )
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from None
