"""Error rules of operators that move values, or add those that meet."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipsteer.testing.proof.mode import ErrorBounds, Pair, rule
from clipsteer.testing.proof.reductions import whole

aten = torch.ops.aten


def moved(bounds: ErrorBounds, func: Any, args: Any, kwargs: Any) -> Pair:
    """The errors go where the values go."""
    value = func(*args, **kwargs)

    def error_of(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point():
            return bounds.error(t).contiguous()
        return t

    if not value.is_floating_point():
        return Pair(value)
    return Pair(value, func(*tree_map(error_of, args), **kwargs))


@rule(
    "clone", "cat", "flip", "roll", "repeat", "constant_pad_nd", "tril", "triu", "copy", "fill",
    "select_backward", "slice_backward", "diagonal_backward", "select_scatter", "slice_scatter",
    "pixel_shuffle", "as_strided_copy", "view_copy", "expand_copy", "stack", "diag_embed",
    "unfold_copy", "repeat_interleave", "im2col", "reflection_pad2d", "replication_pad2d",
    "upsample_nearest2d", "view_as_real_copy", "_reshape_copy", "zero",
)  # fmt: skip
def _move(bounds: ErrorBounds, func: Any, *args: Any, **kwargs: Any) -> Any:
    if func.overloadpacket.__name__ in ("fill", "constant_pad_nd", "zero"):
        value = func(*args, **kwargs)
        if not value.is_floating_point():
            return value
        given = zip(func._schema.arguments, args)
        marks = [_mark(bounds, a) if known.name in ("self", "value") else a for known, a in given]
        kwargs = {k: _mark(bounds, a) if k == "value" else a for k, a in kwargs.items()}
        return Pair(value, func(*marks, **kwargs))
    pair = moved(bounds, func, args, kwargs)
    if pair.error is None and any(not bounds.is_exact(t) for t in args if isinstance(t, Tensor)):
        # marks of integers move too, as numbers
        marks = [bounds.error(t).contiguous() if isinstance(t, Tensor) else t for t in args]
        pair.error = func(*marks, **kwargs)
    return pair


def _mark(bounds: ErrorBounds, given: Any) -> Any:
    """The error of a tensor, or of a number."""
    error = bounds.error(given)
    return error.contiguous() if isinstance(given, Tensor) else error.item()


@rule("_to_copy", "to")
def _cast(bounds: ErrorBounds, func: Any, x: Tensor, **options: Any) -> Any:
    """A cast to fewer digits rounds; the value stays in float64."""
    dtype = options.get("dtype")
    if dtype is None or not dtype.is_floating_point or not x.is_floating_point():
        value = func(x, **options)
        error = bounds.error(x)
        if value.is_floating_point() or not bool(error.any()):
            return Pair(value.double() if value.is_floating_point() else value, error)
        bounds.lose("a cast to integers of what has an error")
        return Pair(value, torch.where(error > 0, math.inf, 0.0))
    value = x.double().clone()
    if torch.finfo(dtype).eps <= 2 * bounds.arithmetic.unit:
        return Pair(value, bounds.error(x))
    unit = torch.finfo(dtype).eps / 2
    same = value.to(dtype).double() == value
    step = bounds.error(x)
    own = torch.where(same & (step == 0), 0.0, unit * (value.abs() + step))
    return Pair(value, step + own + torch.finfo(dtype).smallest_normal * ~same)


def _doubted(bounds: ErrorBounds, index: Tensor) -> Tensor | None:
    """Which indices rounding may change; None: none of them."""
    return None if bounds.is_exact(index) else bounds.error(index) > 0


@rule("gather", "index_select", "embedding", "take_along_dim", "take")
def _gather(bounds: ErrorBounds, func: Any, *args: Any, **kwargs: Any) -> Any:
    pair = moved(bounds, func, args, kwargs)
    name = func.overloadpacket.__name__
    index = args[1] if name in ("embedding", "take_along_dim", "take") else args[2]
    doubt = _doubted(bounds, index)
    if doubt is None or pair.error is None:
        return pair
    bounds.lose(f"{name} at an index that a near tie decides")
    if name == "embedding":
        doubt = doubt.unsqueeze(-1)
    elif name == "index_select":
        shape = [1] * pair.value.dim()
        shape[args[1]] = -1
        doubt = doubt.view(shape)
    return Pair(pair.value, torch.where(doubt, math.inf, pair.error))


@rule("index")
def _index(bounds: ErrorBounds, func: Any, x: Tensor, indices: Any) -> Any:
    value = func(x, indices)
    there = [t for t in indices if t is not None]
    doubts = [_doubted(bounds, t) for t in there]
    marks = bounds.error(x).contiguous()
    error = func(marks, indices)
    if all(doubt is None for doubt in doubts):
        return Pair(value, error) if value.is_floating_point() or bool(error.any()) else value
    if any(t.dtype == torch.bool for t in there):
        bounds.lose("a mask that rounding may change picks elements")
        return Pair(value, torch.full_like(error, math.inf))
    bounds.lose("an index that a near tie decides")
    together = torch.zeros(torch.broadcast_shapes(*[t.shape for t in there]), dtype=torch.bool)
    for doubt in doubts:
        if doubt is not None:
            together = together | doubt
    leading = len([t for t in indices[: len(there)] if t is not None]) == len(there)
    if not leading:
        return Pair(value, torch.full_like(error, math.inf))
    together = together.view(*together.shape, *[1] * (value.dim() - together.dim()))
    return Pair(value, torch.where(together, math.inf, error))


@rule("scatter")
def _scatter(bounds: ErrorBounds, func: Any, x: Tensor, dim: int, index: Tensor, src: Any) -> Any:
    value = func(x, dim, index, src)
    marks = _mark(bounds, src)
    error = func(bounds.error(x).contiguous(), dim, index, marks)
    doubt = _doubted(bounds, index)
    if doubt is not None:
        bounds.lose("scatter at an index that a near tie decides")
        error = torch.where(doubt.any(dim, keepdim=True), math.inf, error)
    return Pair(value, error)


def _added(
    bounds: ErrorBounds, func: Any, base: Tensor | None, source: Tensor, index: Any, place: Any
) -> Pair:
    """Sums of what lands on one element, in any order; ``place(x, source)`` puts them there."""
    zeros = torch.zeros_like(func) if base is None else base
    value = place(zeros, source)
    step = bounds.error(source).contiguous()
    nothing = torch.zeros_like(value)
    size = place(zeros.abs() + bounds.error(zeros), source.abs() + step)
    error = place(bounds.error(zeros).contiguous(), step)
    count = place(nothing, torch.ones_like(source))
    # a sum that starts from 0 has one rounding fewer
    terms = torch.where(zeros == 0, (count - 1).clamp_min(0), count)
    exact = torch.tensor(whole(zeros) and whole(source))
    pair = Pair(value, bounds.arithmetic.summed(size, error, terms, exact))
    # what nothing was added to is as it was
    kept = torch.where(count == 0, bounds.error(zeros), pair.error)  # type: ignore[arg-type]
    indices = index if isinstance(index, (list, tuple)) else [index]
    if any(_doubted(bounds, t) is not None for t in indices if t is not None):
        bounds.lose("a sum at indices that a near tie decides")
        kept = torch.full_like(kept, math.inf)
    return Pair(value, kept)


@rule("scatter_add", "index_add")
def _scatter_add(
    bounds: ErrorBounds, func: Any, x: Tensor, dim: int, index: Tensor, src: Tensor, **more: Any
) -> Any:
    if more.get("alpha", 1) != 1:
        with bounds:
            src = src * more["alpha"]

    def place(base: Tensor, source: Tensor) -> Tensor:
        return func(base, dim, index, source)

    return _added(bounds, func, x, src, index, place)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(
    bounds: ErrorBounds,
    func: Any,
    x: Tensor,
    indices: Any,
    values: Tensor,
    accumulate: bool = False,
    *_: Any,
) -> Any:
    plain = aten.index_put.default
    if not accumulate:
        value = plain(x, indices, values)
        marks = bounds.error(values).contiguous()
        error = plain(bounds.error(x).contiguous(), indices, marks)
        if any(_doubted(bounds, t) is not None for t in indices if t is not None):
            bounds.lose("a write at an index that a near tie decides")
            error = torch.full_like(error, math.inf)
        return Pair(value, error)

    def place(base: Tensor, source: Tensor) -> Tensor:
        return plain(base, indices, source, True)

    return _added(bounds, func, x, values, indices, place)


@rule("embedding_dense_backward")
def _embedding_backward(
    bounds: ErrorBounds,
    func: Any,
    grad: Tensor,
    index: Tensor,
    rows: int,
    padding: int,
    scale: bool,
) -> Any:
    zeros = grad.new_zeros(rows, grad.shape[-1])

    def place(base: Tensor, source: Tensor) -> Tensor:
        return base + func(source, index, rows, padding, scale)

    return _added(bounds, func, zeros, grad, index, place)


@rule(
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
)
def _read(bounds: ErrorBounds, func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    if any(not bounds.is_exact(t) for t in args if isinstance(t, Tensor)):
        bounds.lose(f"{func.overloadpacket.__name__} reads what has an error")
        bounds.undecided = True
    return result
