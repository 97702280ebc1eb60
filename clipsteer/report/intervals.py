"""Means, deviations and exact intervals, from the incomplete beta function.

Sources: Clopper & Pearson 1934; Student 1908; the continued fraction: Lentz 1976.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def _beta_tail(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's
    method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _beta_tail(b, a, 1 - x)
    binomial = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(binomial + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c = 1.0
    d = 0.0
    fraction = 1.0
    for i in range(10_000):
        m = i // 2
        at = a + 2 * m
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((at - 1) * at)
        else:
            term = -(a + m) * (a + b + m) * x / (at * (at + 1))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        fraction *= c * d
        if i and abs(1 - c * d) < 1e-15:
            break
    return front * (fraction - 1)


def _beta_quantile(p: float, a: float, b: float) -> float:
    low = 0.0
    high = 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if _beta_tail(a, b, middle) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval for a binomial share: it covers the truth with probability at least
    `level`.

    Raises ValueError unless 0 <= successes <= n, n >= 1 and 0 < level < 1.
    """
    if not 0 <= successes <= n or n < 1 or not 0 < level < 1:
        raise ValueError(f"clopper_pearson: got {successes} of {n} at level {level}")
    tail = (1 - level) / 2
    failures = n - successes
    low = 0.0
    high = 1.0
    if successes:
        low = _beta_quantile(tail, successes, failures + 1)
    if failures:
        high = _beta_quantile(1 - tail, successes + 1, failures)
    return low, high


def student_quantile(p: float, degrees: int) -> float:
    """The t that Student's distribution with these degrees of freedom stays below with probability
    p >= 1/2."""
    x = _beta_quantile(2 * (1 - p), degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


def mean_interval(values: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Mean, standard deviation, n, and low and high of the t-interval for the mean.

    The interval covers the mean of independent values of a normal distribution with probability
    `level`. Of one value the deviation and the interval are None. Raises ValueError for no value,
    or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)) or not 0 < level < 1:
        got = f"{list(values)}, {level}"
        raise ValueError(f"mean_interval: expected finite values and 0 < level < 1, got {got}")
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return {"mean": mean, "sd": None, "n": 1, "low": None, "high": None}
    sd = statistics.stdev(values)
    reach = student_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "sd": sd, "n": n, "low": mean - reach, "high": mean + reach}


def varies(found: Mapping[str, Any]) -> bool:
    """Whether the values of `mean_interval` differ beyond rounding: one value, or one thing
    measured again, do not."""
    return found["sd"] is not None and found["sd"] > 1e-6 * abs(found["mean"])


def excludes_zero(found: Mapping[str, Any]) -> bool:
    """Whether the interval of `mean_interval` has 0 outside; False where the values do not vary and
    so tell nothing."""
    return varies(found) and not found["low"] <= 0 <= found["high"]
