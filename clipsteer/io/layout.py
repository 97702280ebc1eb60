"""What the tensors of a file must be, taken from those that they are to replace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipsteer.io.files import FileFormatError


class Spec(NamedTuple):
    """One tensor: its dtype and shape, and what its elements may be.

    Attributes:
        least, most: bounds of the elements; by default finite ones of any size.
        any_value: nothing is asked of the elements, NaN included.
        optional: the tensor may be missing.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    least: float = -torch.finfo(torch.float64).max
    most: float = torch.finfo(torch.float64).max
    any_value: bool = False
    optional: bool = False

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


Layout = dict[str, Spec]


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Tensors like these: finite where they are now."""
    found = {}
    for name, tensor in tensors.items():
        spec = Spec(tensor.dtype, tuple(tensor.shape))
        found[name] = spec._replace(any_value=_outside(tensor.detach(), spec) is not None)
    return found


def check_layout(path: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise FileFormatError, naming ``path`` and the tensor, unless these are the layout's."""
    for name in sorted(layout.keys() - tensors.keys()):
        if not layout[name].optional:
            raise FileFormatError(f"{path}: lacks the tensor {name!r}, {layout[name]}")
    for name, tensor in tensors.items():
        spec = layout.get(name)
        if spec is None:
            raise FileFormatError(f"{path}: holds {name!r:.200}, which belongs to nothing here")
        got = Spec(tensor.dtype, tuple(tensor.shape))
        if (got.dtype, got.shape) != (spec.dtype, spec.shape):
            raise FileFormatError(f"{path}: {name!r} must be {spec}, got {got}")
        wrong = None if spec.any_value else _outside(tensor, spec)
        if wrong is not None:
            raise FileFormatError(f"{path}: {name!r} {wrong}")


def _outside(tensor: Tensor, spec: Spec) -> str | None:
    """What is wrong with the elements; one pass over them."""
    if not tensor.numel():
        return None
    low, high = (x.item() for x in torch.aminmax(tensor))  # both NaN where an element is
    if math.isnan(low):
        return "holds NaN"
    if low < spec.least or high > spec.most:
        bounds = f"at least {spec.least:g} and at most {spec.most:g}"
        if math.isinf(low) or math.isinf(high):
            bounds = "finite"
        return f"must be {bounds}, got elements from {low:g} to {high:g}"
    return None
