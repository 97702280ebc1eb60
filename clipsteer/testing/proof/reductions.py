"""Error rules of sums, products and selections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.proof.arithmetic import ARGUMENT, FUNCTION
from clipsteer.testing.proof.mode import ErrorBounds, Pair, Ranked, rule

aten = torch.ops.aten
# of more numbers some are looked at before all
_FEW = 256


def whole(t: Tensor) -> bool:
    """Whether all numbers are integers."""
    if not t.is_floating_point():
        return True
    if t.dim() and t.numel() > _FEW and not whole(t[0]):
        return False
    return bool((t == t.round()).all())


def _count(shape: Sequence[int], dims: Any) -> int:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return math.prod(shape)
    several = dims if isinstance(dims, (list, tuple)) else [dims]
    return math.prod(shape[dim] for dim in several) if shape else 1


@rule("sum", "mean", "cumsum")
def _sum(
    bounds: ErrorBounds, func: Any, x: Tensor, dims: Any = None, *more: Any, **named: Any
) -> Any:
    named.pop("dtype", None)
    given = () if func._overloadname == "default" and dims is None else (dims, *more)
    if not x.is_floating_point():
        value = func(x, *given, **named)
        if bounds.is_exact(x):
            return value
        return Pair(value, torch.full_like(value, math.inf, dtype=torch.float64))
    value = func(x, *given, **named)
    step = bounds.step(x)
    size = func(x.abs(), *given, **named)
    error = torch.zeros_like(size)
    if step is not None:
        error = func(step, *given, **named)
        size += error
    terms = _count(x.shape, dims)
    name = func.overloadpacket.__name__
    exact = torch.tensor(name != "mean" and not bounds.is_inexact(x) and whole(x))
    error = bounds.arithmetic.summed(size, error, max(terms - 1, 0), exact)
    if name == "mean":
        return bounds.rounded(value, error)
    return Pair(value, error)


@rule("var", "std", "var_mean", "std_mean")
def _spread(
    bounds: ErrorBounds,
    func: Any,
    x: Tensor,
    dims: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    **named: Any,
) -> Any:
    """By the definition, in two passes."""
    if isinstance(dims, bool):
        dims, unbiased = None, dims
    off = named.get("correction", 1 if unbiased is None else int(unbiased))
    off = 1 if off is None else off
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    keepdim = named.get("keepdim", keepdim)
    count = _count(x.shape, dims)
    with bounds:
        mean = x.mean(dims, keepdim=True)
        spread = (x - mean).square().sum(dims, keepdim=keepdim) / max(count - off, 0)
        if func.overloadpacket.__name__.startswith("std"):
            spread = spread.sqrt()
        if func.overloadpacket.__name__ in ("var", "std"):
            return spread
        return spread, (mean if keepdim else mean.reshape(spread.shape))


@rule("_softmax", "_log_softmax")
def _softmax(bounds: ErrorBounds, func: Any, x: Tensor, dim: int, half_to_float: bool) -> Any:
    """In the groupings that are usual: less the largest or less logsumexp, by exp or by exp2 of
    what is multiplied by log2(e) before the difference or after."""
    if x.numel() == 0:
        return Pair(func(x, dim, False))
    unit = bounds.arithmetic.unit
    with bounds:
        top = x.amax(dim, keepdim=True)
        off = x - top
    # of both their multiples, and of a logsumexp: its sum of logarithm and maximum
    terms = x.shape[dim] if x.dim() else 1
    more = (x.abs() + top.abs()) * ((ARGUMENT + 1) * unit)
    more = more.masked_fill_(~more.isfinite(), 0.0).add_((FUNCTION + 1) * unit * math.log(terms))
    bounds.attach(off, bounds.error(off) + (more if terms > 1 else 0.0))
    with bounds:
        powers = off.exp()
        total = powers.sum(dim, keepdim=True)
        if func.overloadpacket.__name__ == "_softmax":
            return powers / total
        return off - total.log()


@rule("prod")
def _prod(bounds: ErrorBounds, func: Any, x: Tensor, *given: Any, **named: Any) -> Any:
    value = func(x, *given, **named)
    size = func(x.abs() + bounds.error(x), *given, **named)
    terms = _count(x.shape, given[0] if given else None)
    return bounds.rounded(value, size - value.abs(), max(terms, 1))


def product(
    bounds: ErrorBounds,
    func: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    terms: int | Tensor,
    start: Pair | None = None,
) -> Pair:
    """The bound of sums of ``terms`` products, linear in both operands. ``start``, if any, is a
    number that each sum may begin with."""
    value = func(a, b)
    arithmetic = bounds.arithmetic
    step_a, step_b = bounds.step(a), bounds.step(b)
    size = func(a.abs(), b.abs())
    error = torch.zeros_like(size)
    if step_b is not None:
        error = func(a.abs(), step_b.contiguous())
    if step_a is not None:
        most = b.abs() if step_b is None else b.abs() + step_b
        error = error + func(step_a.contiguous(), most)
    size = size + error
    if arithmetic.operand:
        error = error + arithmetic.operand * size
    exact = torch.tensor(whole(a) and whole(b))
    if start is not None:
        assert start.error is not None
        value = value + start.value
        size = size + start.value.abs() + start.error
        error = error + start.error
        terms = terms + 1
        exact &= whole(start.value)
    return Pair(value, arithmetic.summed(size, error, terms, exact))


@rule("mm", "bmm", "mv", "dot", "vdot")
def _mm(bounds: ErrorBounds, func: Any, a: Tensor, b: Tensor) -> Any:
    return product(bounds, func, a, b, a.shape[-1])


@rule("addmm", "baddbmm", "addmv")
def _addmm(
    bounds: ErrorBounds,
    func: Any,
    c: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    multiply = {"addmm": aten.mm.default, "baddbmm": aten.bmm.default, "addmv": aten.mv.default}
    multiplied = multiply[func.overloadpacket.__name__]
    with bounds:
        c = c if beta == 1 else c * beta
        a = a if alpha == 1 else a * alpha
    start = Pair(c, bounds.error(c))
    return product(bounds, multiplied, a, b, a.shape[-1], start)


@rule("convolution")
def _convolution(
    bounds: ErrorBounds, func: Any, x: Tensor, w: Tensor, bias: Tensor | None, *settings: Any
) -> Any:
    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return func(a, b, None, *settings)

    transposed = settings[3]
    terms = w.numel() // w.shape[1 if transposed else 0]
    if bias is None:
        return product(bounds, convolve, x, w, terms)
    shape = (1, -1, *[1] * (x.dim() - 2))
    start = Pair(bias.view(shape), bounds.error(bias).view(shape))
    return product(bounds, convolve, x, w, terms, start)


@rule("convolution_backward")
def _convolution_backward(
    bounds: ErrorBounds, func: Any, grad: Tensor, x: Tensor, w: Tensor, *settings: Any
) -> Any:
    *most, mask = settings
    found: list[Any] = [None, None, None]
    spatial = math.prod(grad.shape[2:])
    if mask[0]:
        transposed = most[4]
        terms = w.numel() // w.shape[0 if transposed else 1]

        def of_x(g: Tensor, weight: Tensor) -> Tensor:
            return func(g, x, weight, *most, [True, False, False])[0]

        found[0] = product(bounds, of_x, grad, w, terms)
    if mask[1]:

        def of_w(g: Tensor, given: Tensor) -> Tensor:
            return func(g, given, w, *most, [False, True, False])[1]

        found[1] = product(bounds, of_w, grad, x, grad.shape[0] * spatial)
    if mask[2]:
        dims = [0, *range(2, grad.dim())]
        found[2] = _sum(bounds, aten.sum.dim_IntList, grad, dims)
    return tuple(found)


@rule("_cdist_forward")
def _cdist(bounds: ErrorBounds, func: Any, a: Tensor, b: Tensor, p: float, mode: Any) -> Any:
    if p != 2:
        bounds.lose(f"cdist of p = {p}")
        value = func(a, b, p, mode)
        return Pair(value, torch.full_like(value, math.inf))
    with bounds:
        off = a.unsqueeze(-2) - b.unsqueeze(-3)
        return off.square().sum(-1).sqrt()


@rule("_cdist_backward")
def _cdist_backward(
    bounds: ErrorBounds, func: Any, grad: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor
) -> Any:
    if p != 2:
        bounds.lose(f"the gradient of cdist of p = {p}")
        value = func(grad, a, b, p, distance)
        return Pair(value, torch.full_like(value, math.inf))
    with bounds:
        share = torch.where(distance > 0, grad / distance, 0.0).unsqueeze(-1)
        return (share * (a.unsqueeze(-2) - b.unsqueeze(-3))).sum(-2)


@rule("avg_pool2d", "avg_pool2d_backward")
def _pool(bounds: ErrorBounds, func: Any, *given: Any, **named: Any) -> Any:
    """A mean over windows: every number is a sum of as many terms as one has, times a constant."""
    x, *rest = given
    value = func(x, *rest, **named)
    step = bounds.error(x).contiguous()
    error = func(step, *rest, **named)
    size = func(x.abs() + step, *rest, **named)
    window = next(item for item in rest if isinstance(item, (list, tuple)))
    terms = math.prod(window) ** (2 if len(window) == 1 else 1) + 2
    return Pair(value, bounds.arithmetic.summed(size, error, terms, torch.tensor(False)))


@rule("amax", "amin", "max", "min")
def _extreme(bounds: ErrorBounds, func: Any, x: Tensor, *given: Any, **named: Any) -> Any:
    name = func.overloadpacket.__name__
    if name in ("max", "min") and given and isinstance(given[0], Tensor):
        from clipsteer.testing.proof.elementwise import _either

        return _either(
            bounds, aten.maximum.default if name == "max" else aten.minimum.default, x, *given
        )
    result = func(x, *given, **named)
    value = result[0] if isinstance(result, (tuple, list)) else result
    if not value.is_floating_point() or bounds.is_exact(x):
        return result
    dims = given[0] if given else named.get("dim")
    keep = given[1] if len(given) > 1 else named.get("keepdim", False)
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    several = dims if isinstance(dims, (list, tuple)) else [dims]
    step = bounds.error(x)
    limit = value
    if not keep:
        for dim in sorted(d % max(x.dim(), 1) for d in several):
            limit = limit.unsqueeze(dim)
    slack = torch.where((x == limit), step, 0.0).amax(several, keepdim=True)
    near = (x - limit).abs() <= step + slack
    error = torch.where(near, step, 0.0).amax(several, keepdim=keep)
    if not isinstance(result, (tuple, list)):
        return Pair(value, error)
    doubtful = near.sum(several, keepdim=keep) > 1
    return (Pair(value, error), Pair(result[1], torch.where(doubtful, math.inf, 0.0)))


@rule("argmax", "argmin")
def _argmax(
    bounds: ErrorBounds, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False
) -> Any:
    value = func(x, dim, keepdim)
    if bounds.is_exact(x):
        return value
    best = x.max() if func.overloadpacket.__name__ == "argmax" else x.min()
    if dim is not None:
        extreme = x.amax if func.overloadpacket.__name__ == "argmax" else x.amin
        best = extreme(dim, keepdim=True)
    step = bounds.error(x)
    top = torch.where(x == best, step, 0.0)
    top = top.max() if dim is None else top.amax(dim, keepdim=True)
    near = ((x - best).abs() <= step + top).double()
    doubtful = (near.sum() if dim is None else near.sum(dim, keepdim=keepdim)) > 1
    return Pair(value, torch.where(doubtful, math.inf, 0.0).expand(value.shape))


@rule("topk", "sort")
def _ranked(bounds: ErrorBounds, func: Any, x: Tensor, *given: Any, **named: Any) -> Any:
    """A ranked value is off by no more than the largest error of its row; its index is in doubt
    where a neighbour, the first one left out among them, is as near as both errors."""
    values, indices = func(x, *given, **named)
    if bounds.is_exact(x):
        return values, indices
    positional = list(given)
    if func.overloadpacket.__name__ == "topk":
        dim = positional[1] if len(positional) > 1 else named.get("dim", -1)
    else:
        names = [argument.name for argument in func._schema.arguments]
        at = names.index("dim") - 1
        dim = positional[at] if len(positional) > at else named.get("dim", -1)
    step = bounds.error(x)
    error = step.amax(dim, keepdim=True).expand(values.shape)
    descending = bool((values.diff(dim=dim) <= 0).all())
    full, order = torch.sort(x, dim=dim, descending=descending, stable=True)
    close = full.diff(dim=dim).abs() <= (2 * step.amax(dim, keepdim=True))
    size = values.shape[dim]
    edge = torch.zeros_like(full.narrow(dim, 0, 1), dtype=torch.bool)
    doubt = torch.cat([edge, close], dim) | torch.cat([close, edge], dim)
    bounds.attach(indices, torch.where(doubt.narrow(dim, 0, size), math.inf, 0.0))
    bounds.rank(indices, Ranked(x.detach(), step.clone(), dim, indices.shape))
    return Pair(values, error), indices
