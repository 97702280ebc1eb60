"""Error rules of functions of one number: |f′| times the error, taken over all of where the
argument may be, and the rounding of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipsteer.testing.proof.arithmetic import ARGUMENT, FUNCTION
from clipsteer.testing.proof.elementwise import operand
from clipsteer.testing.proof.mode import ErrorBounds, Pair, rule

Unary = Callable[[Tensor, Tensor, Tensor], Tensor]  # of argument, its error and the value


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
    return value * _powers(step)


def _exp2(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return value * _powers(step * math.log(2))


def _expm1(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return (value + 1) * _powers(step)


def _powers(step: Tensor) -> Tensor:
    """At least exp(step) - 1, without a function where that is small."""
    if step.numel() and bool(step.amax() < 2.0**-10):
        return step * (1 + step)
    return torch.expm1(step)


def _log(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs())


def _log2(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs()) / math.log(2)


def _log10(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / x.abs()) / math.log(10)


def _log1p(x: Tensor, step: Tensor, value: Tensor) -> Tensor:
    return _log_step(step / (1 + x))


def _log_step(share: Tensor) -> Tensor:
    if share.numel() and bool(share.amax() < 2.0**-10):
        return share * (1 + share)  # at least -log(1 - share)
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
    power = torch.exp(-near)
    return step * power / (1 + power).square()


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
    return bounds.rounded(value, error, roundings, least, sure=bounds.is_inexact(x))


@rule("pow")
def _pow(bounds: ErrorBounds, func: Any, x: Any, exponent: Any) -> Any:
    value = func(x, exponent)
    step = bounds.error(x)
    if not isinstance(exponent, Tensor) and exponent == 2:
        if bounds.step(x) is None:
            return bounds.rounded(value, None)
        error = x.abs().mul_(2).add_(step).mul_(step)
        return bounds.rounded(value, error, sure=bounds.is_inexact(x))
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
