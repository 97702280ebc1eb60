"""Error rules of elementwise operators: |f′| times the error, taken over all of where the argument
may be, and the rounding of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.proof.arithmetic import FUNCTION
from clipsteer.testing.proof.mode import ErrorBounds, Pair, rule

Unary = Callable[[Tensor, Tensor, Tensor], Tensor]  # of argument, its error and the value


def operand(bounds: ErrorBounds, t: Any) -> tuple[Tensor, Tensor]:
    """A float64 tensor and its errors; a number is exact."""
    value = t if isinstance(t, Tensor) else torch.tensor(t)
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
    _, error_a = operand(bounds, a)
    _, error_b = operand(bounds, b)
    if func.overloadpacket.__name__ == "rsub":
        error = error_b + abs(alpha) * error_a
    else:
        error = error_a + abs(alpha) * error_b
    error = error.expand(value.shape)
    roundings = 1 if is_power_of_two(alpha) else 2
    return Pair(value, bounds.arithmetic.rounded(value, error, roundings))


@rule("mul")
def _mul(bounds: ErrorBounds, func: Any, a: Any, b: Any) -> Any:
    value = func(a, b)
    if not value.is_floating_point():
        return integers(bounds, value, a, b)
    x, error_x = operand(bounds, a)
    y, error_y = operand(bounds, b)
    # of what is exact there is no part
    error = torch.zeros((), dtype=torch.float64)
    if not bounds.is_exact(b):
        error = (x.abs() + error_x) * error_y
    if not bounds.is_exact(a):
        error = error + y.abs() * error_x
    scaled = any(not isinstance(t, Tensor) or t.dim() == 0 for t in (a, b))
    if scaled and any(
        is_power_of_two(t) for t in (a, b) if not isinstance(t, Tensor) or t.dim() == 0
    ):
        return Pair(value, error.expand(value.shape))
    return Pair(value, bounds.arithmetic.rounded(value, error.expand(value.shape)))


@rule("div", "true_divide")
def _div(bounds: ErrorBounds, func: Any, a: Any, b: Any, **options: Any) -> Any:
    value = func(a, b, **options)
    if options.get("rounding_mode") is not None or not value.is_floating_point():
        return integers(bounds, value, a, b)
    _, error_x = operand(bounds, a)
    y, error_y = operand(bounds, b)
    error = quotient(bounds, value, error_x, y, error_y)
    if is_power_of_two(b) and not bool(error_y.any()):
        return Pair(value, error)
    return Pair(value, bounds.arithmetic.rounded(value, error))


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
    error = bounds.error(a) + bounds.error(b)
    if not bool(error.any()):
        return value
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
    return _where(bounds, torch.ops.aten.where.self, mask, torch.as_tensor(filled).to(x), x)


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
    error = bounds.error(x)
    for limit in (*limits, *named.values()):
        if isinstance(limit, Tensor):
            error = torch.maximum(error, bounds.error(limit))
    # a value that stays cut off has no error
    step = bounds.error(x)
    same = func(x - step, *limits, **named) == func(x + step, *limits, **named)
    return Pair(value, torch.where(same & (error == step), 0.0, error))


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


def _exp(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return value * torch.expm1(step)


def _exp2(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return value * torch.expm1(step * math.log(2))


def _expm1(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return (value + 1) * torch.expm1(step)


def _log(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs())


def _log2(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs()) / math.log(2)


def _log10(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs()) / math.log(10)


def _log1p(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / (1 + x))


def _log_step(share: Tensor) -> Tensor:
    return torch.where(share < 1, -torch.log1p(-share), math.inf)


def _sqrt(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    total = value + (x - step).clamp_min(0).sqrt()
    return torch.where(total > 0, step / total, step.sqrt())


def _rsqrt(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    least = (x - step).clamp_min(0)
    return step / (x.sqrt() * least.sqrt() * (x.sqrt() + least.sqrt()))


def _reciprocal(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return step * value.abs() / (x.abs() - step).clamp_min(0)


def _nearest_zero(x: Tensor, step: Tensor) -> Tensor:
    """Where |f′| of a curve that is steepest at 0 is largest."""
    return (x.abs() - step).clamp_min(0)


def _tanh(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return 2 * _sigmoid(2 * x, 2 * step, value)  # 1 - tanh² is 4 σ(2x) σ(-2x)


def _sigmoid(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    near = _nearest_zero(x, step)
    # 1 - s would cancel far out, where the value itself is as small
    return step * torch.sigmoid(near) * torch.sigmoid(-near)


def _erf(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return step * (2 / math.sqrt(math.pi)) * torch.exp(-_nearest_zero(x, step).square())


def _by_one(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return step


# What is held to an absolute error: libraries take polynomials that are so good only. Of erf: 2.5
# roundings of formula 7.1.26 of Abramowitz and Stegun, 9 of its three factors, 1 of its sum.
_ABSOLUTE = ("erf", "sin", "cos")
# what the argument's error makes of each, and the roundings of the function
UNARY: dict[str, tuple[Unary, int]] = {
    "exp": (_exp, FUNCTION),
    "exp2": (_exp2, FUNCTION),
    "expm1": (_expm1, FUNCTION),
    "log": (_log, FUNCTION),
    "log2": (_log2, FUNCTION),
    "log10": (_log10, FUNCTION),
    "log1p": (_log1p, FUNCTION),
    "sqrt": (_sqrt, 1),
    "rsqrt": (_rsqrt, 2),
    "reciprocal": (_reciprocal, 1),
    "tanh": (_tanh, FUNCTION),
    "sigmoid": (_sigmoid, FUNCTION),
    "erf": (_erf, 13),
    "sin": (_by_one, FUNCTION),
    "cos": (_by_one, FUNCTION),
    "atan": (_by_one, FUNCTION),
}


@rule(*UNARY)
def _unary(bounds: ErrorBounds, func: Any, x: Tensor) -> Any:
    value = func(x.double() if not x.is_floating_point() else x)
    step = bounds.error(x)
    name = func.overloadpacket.__name__
    derived, roundings = UNARY[name]
    error = derived(x.double(), step, value)
    error = error.masked_fill(step == 0, 0.0).nan_to_num_(nan=math.inf, posinf=math.inf)
    if error.numel() and bool(error.amax().isinf()):
        bounds.lose(f"{name} where its argument may leave its domain")
    least = 1.0 if name in _ABSOLUTE else 0.0
    return Pair(value, bounds.arithmetic.rounded(value, error, roundings, least))


@rule("pow")
def _pow(bounds: ErrorBounds, func: Any, x: Any, exponent: Any) -> Any:
    value = func(x, exponent)
    if not isinstance(x, Tensor) or isinstance(exponent, Tensor):
        if bounds.is_exact(x) and bounds.is_exact(exponent):
            return Pair(value, bounds.arithmetic.rounded(value, torch.zeros_like(value), FUNCTION))
        bounds.lose("pow of two tensors with errors")
        return Pair(value, torch.full_like(value, math.inf))
    step = bounds.error(x)
    if exponent == 2:
        return Pair(value, bounds.arithmetic.rounded(value, 2 * x.abs() * step + step * step))
    # the two ends, as a power is monotone on either side of 0
    least = (x.abs() - step).clamp_min(0)
    most = x.abs() + step
    size = value.abs()
    ends = torch.maximum((func(most, exponent) - size).abs(), (func(least, exponent) - size).abs())
    if exponent != int(exponent):
        ends = torch.where(x - step >= 0, ends, math.inf)
    elif exponent % 2:
        # across 0 the sign turns
        ends = torch.where(x.abs() < step, func(most, exponent) + size, ends)
    error = torch.where(step == 0, 0.0, ends).nan_to_num(nan=math.inf, posinf=math.inf)
    return Pair(value, bounds.arithmetic.rounded(value, error, FUNCTION))
