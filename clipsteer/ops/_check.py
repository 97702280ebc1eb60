"""Argument checks shared by the ops: what was expected, what came, and all shapes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def shapes(named: dict[str, Any]) -> str:
    """Of all tensors among the arguments, for a message."""
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in named.items() if isinstance(t, Tensor))


def mistake(op: str, argument: str, expected: str, got: Any, named: dict[str, Any]) -> str:
    """What is wrong with an argument, in one line."""
    return f"{op}: {argument} must be {expected}, got {got} ({shapes(named)})"


def check_tensors(op: str, named: dict[str, Any], integer: tuple[str, ...] = ()) -> None:
    """All tensors on one device, the floating ones of one dtype, ``integer`` ones int64."""
    first = None
    for name, t in named.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(mistake(op, name, "a tensor", type(t).__name__, named))
        if name in integer:
            if t.dtype != torch.int64:
                raise TypeError(mistake(op, name, "int64", t.dtype, named))
        elif not t.is_floating_point():
            raise TypeError(mistake(op, name, "floating point", t.dtype, named))
        if first is None:
            first = name
            device = t.device
            dtype = t.dtype
        elif t.device != device:
            raise ValueError(mistake(op, name, f"on {first}'s device {device}", t.device, named))
        elif t.dtype != dtype and name not in integer:
            raise TypeError(mistake(op, name, f"of {first}'s dtype {dtype}", t.dtype, named))


def check_shape(
    op: str,
    named: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    symbols: str,
) -> None:
    """ValueError where the argument of this name is given and of another shape."""
    if named[name] is not None and named[name].shape != shape:
        expected = f"of shape {symbols} = {shape}"
        raise ValueError(mistake(op, name, expected, tuple(named[name].shape), named))


def has_values(t: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not of a fake one, nor of what stands for many
    under vmap."""
    if torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter):
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return False
        t = functorch.get_unwrapped(t)
    return not t.is_meta


def check_encoder(op: str, named: dict[str, Any], leading: str) -> None:
    """x (leading, d_in), W_enc (d_sae, d_in) and, if any, b_enc and scale (d_sae,) and columns
    (m,), where ``leading`` is "B" or, for any shape, "..."."""
    check_tensors(op, named, integer=("columns",))
    x = named["x"]
    W_enc = named["W_enc"]
    if W_enc.dim() != 2:
        expected = "of shape (d_sae, d_in)"
        raise ValueError(mistake(op, "W_enc", expected, tuple(W_enc.shape), named))
    fits = x.dim() == 2 if leading == "B" else x.dim() > 0
    if not fits or x.shape[-1] != W_enc.shape[1]:
        expected = f"of shape ({leading}, d_in = {W_enc.shape[1]})"
        raise ValueError(mistake(op, "x", expected, tuple(x.shape), named))
    n = W_enc.shape[0]
    for name in ("b_enc", "scale"):
        check_shape(op, named, name, (n,), "(d_sae,)")
    columns = named["columns"]
    if columns is None:
        return
    if columns.dim() != 1:
        expected = "the numbers of features, of shape (m,)"
        raise ValueError(mistake(op, "columns", expected, tuple(columns.shape), named))
    check_indices(op, columns, n, named, name="columns")


def check_indices(
    op: str,
    indices: Tensor,
    n: int,
    named: dict[str, Any],
    name: str = "indices",
    lowest: int = 0,
) -> None:
    """Raise on an index outside [lowest, n): always on the CPU; on a GPU, where it costs a
    synchronisation, only under ``CLIPSTEER_CHECK_INDICES=1``. Compiled CPU code relies on the
    kernels' own check."""
    # where there are none to look at, the kernels check for themselves
    if not _looked_at(indices) or indices.numel() == 0:
        return
    low, high = (int(v) for v in indices.aminmax())
    if low < lowest or high >= n:
        got = f"values from {low} to {high}"
        raise ValueError(mistake(op, name, f"in [{lowest}, {n})", got, named))


def check_offsets(op: str, offsets: Tensor, named: dict[str, Any]) -> None:
    """Raise where offsets (B + 1,) do not ascend from 0; where the values are looked at, as for
    ``check_indices``."""
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        expected = "of shape (B + 1,)"
        raise ValueError(mistake(op, "offsets", expected, tuple(offsets.shape), named))
    if not _looked_at(offsets):
        return
    if int(offsets[0]) != 0:
        raise ValueError(mistake(op, "offsets", "from 0", f"from {int(offsets[0])}", named))
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(mistake(op, "offsets", "ascending", "some that descend", named))


def _looked_at(t: Tensor) -> bool:
    """Whether values are checked here: on a GPU, where that costs a synchronisation, only on
    request."""
    if not has_values(t):
        return False
    return t.device.type == "cpu" or os.environ.get("CLIPSTEER_CHECK_INDICES", "0") == "1"


def is_positive(t: Tensor) -> bool:
    """Whether the number () is, or is NaN."""
    return not t.item() <= 0


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors (or None), the first of them one, as ``F.linear`` would cast them inside an autocast
    region; float64 stays."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    cast = [t is not None and t.is_floating_point() and t.dtype != torch.float64 for t in tensors]
    return tuple(t.to(dtype) if c else t for t, c in zip(tensors, cast))


def what_came(value: Any) -> str:
    """For a message: dtype and shape of a tensor, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
