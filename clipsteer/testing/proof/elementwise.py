"""Error rules of elementwise arithmetic, comparisons and choices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.proof.mode import ErrorBounds, Pair, rule


def operand(bounds: ErrorBounds, t: Any) -> tuple[Tensor, Tensor]:
    """A float64 tensor and its errors."""
    value = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    return value.double(), bounds.error(t)


def is_power_of_two(t: Any) -> bool:
    """Whether this is one number whose products are exact."""
    if isinstance(t, Tensor):
        return t.numel() == 1 and is_power_of_two(t.detach().item())
    return abs(math.frexp(t)[0]) == 0.5


@rule("add", "sub", "rsub", "__add__", "add_relu")
def _add(bounds: ErrorBounds, func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    value = func(a, b, alpha=alpha)
    if not value.is_floating_point():
        return integers(bounds, value, a, b)
    scaled, other = (a, b) if func.overloadpacket.__name__ == "rsub" else (b, a)
    error = bounds.step(scaled)
    if error is not None and alpha != 1:
        error = abs(alpha) * error
    if bounds.step(alpha) is not None:
        lost = operand(bounds, scaled)[0].abs() * bounds.error(alpha)
        error = lost if error is None else error + lost
    more = bounds.step(other)
    if more is not None:
        error = more if error is None else error + more
    sure = bounds.is_inexact(a) or bounds.is_inexact(b)
    return bounds.rounded(value, error, 1 if is_power_of_two(alpha) else 2, sure=sure)


@rule("mul")
def _mul(bounds: ErrorBounds, func: Any, a: Any, b: Any) -> Any:
    value = func(a, b)
    if not value.is_floating_point():
        return integers(bounds, value, a, b)
    error = multiplied(bounds, a, b)
    numbers = [t for t in (a, b) if not isinstance(t, Tensor) or t.dim() == 0]
    if any(is_power_of_two(t) for t in numbers if bounds.step(t) is None):
        return Pair(value, error)
    return bounds.rounded(value, error)


def multiplied(bounds: ErrorBounds, a: Any, b: Any) -> Tensor | None:
    """What the factors' errors make of products; None where they are exact."""
    step_a, step_b = bounds.step(a), bounds.step(b)
    if step_b is None:
        return None if step_a is None else operand(bounds, b)[0].abs() * step_a
    size = operand(bounds, a)[0].abs()
    if step_a is None:
        return size * step_b
    return (size + step_a) * step_b + operand(bounds, b)[0].abs() * step_a


@rule("div", "true_divide")
def _div(bounds: ErrorBounds, func: Any, a: Any, b: Any, **options: Any) -> Any:
    value = func(a, b, **options)
    if options.get("rounding_mode") is not None or not value.is_floating_point():
        return integers(bounds, value, a, b)
    _, error_x = operand(bounds, a)
    y, error_y = operand(bounds, b)
    if bounds.is_exact(b) and bool((y != 0).all()):
        error = None if bounds.step(a) is None else error_x / y.abs()
        return Pair(value, error) if is_power_of_two(b) else bounds.rounded(value, error)
    return bounds.rounded(value, quotient(bounds, value, error_x, y, error_y))


def quotient(
    bounds: ErrorBounds, value: Tensor, error: Tensor, divisor: Tensor, divisor_error: Tensor
) -> Tensor:
    """What the operands' errors make of a quotient; infinite where the divisor may be 0."""
    least = divisor.abs() - divisor_error
    moved = (value.abs() * divisor_error + error) / least
    exact = (error == 0) & (divisor_error == 0)
    moved = moved.masked_fill(~(least > 0), math.inf).masked_fill(exact, 0.0).expand(value.shape)
    if bool(moved.isinf().any()):
        bounds.lose("a quotient whose divisor is within its error of 0")
    return moved


def integers(bounds: ErrorBounds, value: Tensor, *arguments: Any) -> Pair:
    """An integer or boolean result: any element of a doubtful argument makes it doubtful."""
    doubt = torch.zeros((), dtype=torch.float64)
    for argument in arguments:
        doubt = doubt + bounds.error(argument)
    doubt = torch.where(doubt > 0, math.inf, 0.0)
    return Pair(value, doubt.expand(value.shape) if bool(doubt.any()) else None)


@rule("floor", "ceil", "round", "trunc", "sign", "floor_divide")
def _steps(bounds: ErrorBounds, func: Any, *arguments: Any, **options: Any) -> Any:
    value = func(*arguments, **options)
    x, *others = arguments
    step = bounds.error(x)
    if all(bounds.is_exact(t) for t in others):
        below = func(x - step, *others, **options)
        above = func(x + step, *others, **options)
        error = torch.where(below == above, 0.0, (above - below).abs().double())
    else:
        error = torch.full_like(value, math.inf, dtype=torch.float64)
    if bool(error.any()):
        bounds.lose(f"{func.overloadpacket.__name__} where an error takes it over a step")
    return Pair(value, error)


@rule("eq", "ne", "lt", "le", "gt", "ge")
def _compare(bounds: ErrorBounds, func: Any, a: Any, b: Any) -> Any:
    value = func(a, b)
    if bounds.is_exact(a) and bounds.is_exact(b):
        return value
    error = bounds.error(a) + bounds.error(b)
    left, _ = operand(bounds, a)
    right, _ = operand(bounds, b)
    if a is b:
        return value  # which a NaN alone decides
    doubtful = (error > 0) & ((left - right).abs() <= error)
    return Pair(value, torch.where(doubtful, math.inf, 0.0).expand(value.shape))


@rule(
    "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or",
    "bitwise_not", "bitwise_xor",
)  # fmt: skip
def _logic(bounds: ErrorBounds, func: Any, *arguments: Any) -> Any:
    return integers(bounds, func(*arguments), *arguments)


@rule("any", "all")
def _any(bounds: ErrorBounds, func: Any, x: Tensor, *given: Any, **named: Any) -> Any:
    value = func(x, *given, **named)
    if bounds.is_exact(x):
        return value
    # with every doubtful element either way
    doubtful = bounds.error(x) > 0
    either = func(x.bool() & ~doubtful, *given, **named) != func(
        x.bool() | doubtful, *given, **named
    )
    return Pair(value, torch.where(either, math.inf, 0.0))


@rule("isnan", "isinf", "isfinite")
def _kind(bounds: ErrorBounds, func: Any, x: Tensor) -> Any:
    value = func(x)
    unknown = bounds.error(x).isinf()
    return Pair(value, torch.where(unknown, math.inf, 0.0)) if bool(unknown.any()) else value


@rule("where")
def _where(bounds: ErrorBounds, func: Any, condition: Tensor, a: Any, b: Any) -> Any:
    value = func(condition, a, b)
    x, error_x = operand(bounds, a)
    y, error_y = operand(bounds, b)
    error = torch.where(condition, error_x, error_y)
    doubtful = bounds.error(condition) > 0
    if bool(doubtful.any()):
        either = (x - y).abs() + torch.maximum(error_x, error_y)
        error = torch.where(doubtful, either, error)
    return Pair(value, error.expand(value.shape))


@rule("masked_fill")
def _masked_fill(bounds: ErrorBounds, func: Any, x: Tensor, mask: Tensor, filled: Any) -> Any:
    return _where(
        bounds, torch.ops.aten.where.self, mask, torch.as_tensor(filled, dtype=x.dtype), x
    )


@rule("maximum", "minimum")
def _either(bounds: ErrorBounds, func: Any, a: Tensor, b: Tensor) -> Any:
    value = func(a, b)
    error_a, error_b = bounds.error(a), bounds.error(b)
    # one that is out of reach does not count
    near_a = (a - value).abs() <= error_a + error_b
    near_b = (b - value).abs() <= error_a + error_b
    error = torch.maximum(torch.where(near_a, error_a, 0.0), torch.where(near_b, error_b, 0.0))
    return Pair(value, error)


@rule("clamp", "clamp_min", "clamp_max", "relu", "hardtanh")
def _clamp(bounds: ErrorBounds, func: Any, x: Tensor, *limits: Any, **named: Any) -> Any:
    value = func(x, *limits, **named)
    if not value.is_floating_point():
        return integers(bounds, value, x, *limits)
    step = bounds.error(x)
    of_limits = torch.zeros((), dtype=torch.float64)
    for limit in (*limits, *named.values()):
        of_limits = torch.maximum(of_limits, bounds.error(limit))
    # a value that stays cut off has the error of its limit
    same = func(x - step, *limits, **named) == func(x + step, *limits, **named)
    cut = torch.where((value == x) & (step == 0), 0.0, of_limits)
    return Pair(value, torch.where(same, cut, torch.maximum(step, of_limits)))


@rule("neg", "abs", "conj", "alias_copy")
def _sign(bounds: ErrorBounds, func: Any, x: Tensor) -> Any:
    value = func(x)
    return Pair(value, bounds.error(x)) if value.is_floating_point() else integers(bounds, value, x)


@rule("threshold_backward")
def _threshold_backward(
    bounds: ErrorBounds, func: Any, grad: Tensor, x: Tensor, threshold: Any
) -> Any:
    value = func(grad, x, threshold)
    step = bounds.error(x)
    error = torch.where(x > threshold, bounds.error(grad), 0.0)
    doubtful = (step > 0) & ((x - threshold).abs() <= step)
    return Pair(value, torch.where(doubtful, grad.abs() + bounds.error(grad), error))
