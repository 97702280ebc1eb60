"""Error rules of elementwise operators: |f′| times the error, taken over all of where the argument
may be, and the rounding of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.proof.arithmetic import ARGUMENT, FUNCTION
from clipsteer.testing.proof.mode import ErrorBounds, Pair, rule

Unary = Callable[[Tensor, Tensor, Tensor], Tensor]  # of argument, its error and the value


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
    return bounds.rounded(value, error, 1 if is_power_of_two(alpha) else 2)


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
    error = None
    if step_b is not None:
        error = operand(bounds, a)[0].abs()
        if step_a is not None:
            error = error + step_a
        error = error * step_b
    if step_a is not None:
        lost = operand(bounds, b)[0].abs() * step_a
        error = lost if error is None else error + lost
    return error


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


@rule("elu_backward")
def _elu_backward(
    bounds: ErrorBounds,
    func: Any,
    grad: Tensor,
    alpha: float,
    scale: float,
    input_scale: float,
    is_result: bool,
    x: Tensor,
) -> Any:
    """Of the argument or of the result, whose distance from the lower end is off by a rounding."""
    with bounds:
        below = grad * (alpha * scale * input_scale)
        curve = x + alpha * scale if is_result else (x * input_scale).exp() * (alpha * scale)
        found = torch.where(x <= 0, grad * input_scale * curve, grad * scale)
    more = below.abs().mul_(2 * bounds.arithmetic.unit).masked_fill_(x > 0, 0.0)
    return Pair(found, bounds.error(found) + more)


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
_OF_EXP = ("exp", "exp2", "expm1", "sigmoid", "tanh")
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
    name = func.overloadpacket.__name__
    derived, roundings = UNARY[name]
    step = bounds.step(x)
    if name in _OF_EXP:
        of_argument = x.abs().double().mul_(ARGUMENT * bounds.arithmetic.unit)
        of_argument.nan_to_num_(nan=0.0, posinf=0.0)
        step = of_argument if step is None else of_argument.add_(step)
    error = None
    if step is not None:
        error = derived(x.double(), step, value)
        if not bounds.is_inexact(x):
            error = error.masked_fill(step == 0, 0.0)
        if error.numel() and not bool(error.amax() < math.inf):
            error = error.nan_to_num(nan=math.inf, posinf=math.inf)
            bounds.lose(f"{name} where its argument may leave its domain")
    least = 1.0 if name in _ABSOLUTE else 0.0
    return bounds.rounded(value, error, roundings, least)


@rule("pow")
def _pow(bounds: ErrorBounds, func: Any, x: Any, exponent: Any) -> Any:
    value = func(x, exponent)
    step = bounds.error(x)
    if not isinstance(exponent, Tensor) and exponent == 2:
        error = None if bounds.step(x) is None else 2 * x.abs() * step + step * step
        return bounds.rounded(value, error)
    base, _ = operand(bounds, x)
    power, lost = operand(bounds, exponent)
    # as exp of a multiple of log, where it is not of multiplications and roots
    roundings = FUNCTION
    if not isinstance(exponent, Tensor) and float(2 * exponent).is_integer():
        roundings = max(FUNCTION, int(abs(exponent)) + 3)
    else:
        lost = lost + power.abs() * ((FUNCTION + ARGUMENT) * bounds.arithmetic.unit)
    along = None
    if bool(lost.any()):
        along = (lost * base.abs().log().abs()).expm1() * value.abs()
        along = along.nan_to_num(nan=0.0, posinf=math.inf)  # 0 to a power is 0, or infinite
    if bounds.is_exact(x):
        return bounds.rounded(value, along, roundings)
    if isinstance(exponent, Tensor):
        bounds.lose("pow of two tensors with errors")
        return Pair(value, torch.full_like(value, math.inf))
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
    return bounds.rounded(value, error if along is None else error + along, roundings)
