"""A conceptor as a file: U, s and mean in safetensors, and what is text in its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.conceptors.algebra import Factors, checked
from clipsteer.conceptors.fit import check_aperture
from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind

_KIND = Kind("clipsteer-conceptor", 1, "a conceptor")


class Described(NamedTuple):
    """What a conceptor is made of."""

    factors: Factors
    aperture: float | None
    mean: Tensor | None  # (d,)
    metadata: dict[str, str]


def write(
    path: str | Path,
    factors: Factors,
    aperture: float | None,
    mean: Tensor | None,  # (d,)
    metadata: Mapping[str, str],
) -> Path:
    """See ``Conceptor.save``."""
    values: dict[str, float] = {"rest": factors.rest}
    if aperture is not None:
        values["aperture"] = aperture
    tensors = {"U": factors.U, "s": factors.s}
    if mean is not None:
        tensors["mean"] = mean
    texts = {f"meta.{name}": text for name, text in metadata.items()}
    return write_kind(path, _KIND, tensors, values, texts=texts)


def read(path: str | Path) -> Described:
    """See ``Conceptor.load``."""
    tensors, values = read_kind(path, _KIND)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FileFormatError(f"{path}: {name!r} holds values that are not finite")
    named = {"U", "s"} <= tensors.keys() <= {"U", "s", "mean"}
    if not named or any(tensor.dtype != torch.float64 for tensor in tensors.values()):
        raise FileFormatError(
            f"{path}: expected U, s and maybe mean, all float64; got {sorted(tensors)}"
        )
    rest = {"0": 0, "1": 1}.get(values.get("rest", ""), -1)
    mean = tensors.get("mean")
    metadata = {name[5:]: text for name, text in values.items() if name.startswith("meta.")}
    try:
        factors = checked(Factors(tensors["U"], tensors["s"], rest))
        if mean is not None and mean.shape != (factors.d,):
            raise ValueError(f"mean must be of shape ({factors.d},), got {tuple(mean.shape)}")
        aperture = check_aperture(float(values["aperture"])) if "aperture" in values else None
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from None
    return Described(factors, aperture, mean, metadata)
