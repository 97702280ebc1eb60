"""Axes of a chart: where values lie, and which are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipsteer.report.page import LINE, width_of

Number = float | None
Values = Sequence[Number]
_FILLED = 2 / 3  # of an axis by its values, at least
_RARE_SHARES = tuple(10.0**-k for k in range(9, 2, -1))
_USUAL_SHARES = (0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 0.99)


def logit(share: float, n: float | None = None) -> float:
    """Log odds of a share; of n things, smoothed as (k + 1/2)/(n + 1), so that 0 and 1 are
    finite."""
    p = share if n is None else (share * n + 0.5) / (n + 1)
    return math.log(p / (1 - p))


def sigmoid(log_odds: float) -> float:
    """The share of these log odds."""
    return 1 / (1 + math.exp(min(-log_odds, 700.0)))  # the exponential of 710 is infinite


def number(value: float) -> str:
    """A value in few digits, as axes and legends have it."""
    size = abs(value)
    if value and (size >= 1e5 or size < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.4g}" if size < 1e4 else f"{value:,.0f}"


def _round_step(low: float, high: float) -> float:
    """Of about five round steps from low to high."""
    raw = (high - low) / 5
    step = 10 ** math.floor(math.log10(raw))
    return step * next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw * 0.999)


def round_values(low: float, high: float) -> list[float]:
    """A few round values inside [low, high], at least one."""
    if low == high:
        return [low]
    step = _round_step(low, high)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def round_values_around(low: float, high: float) -> list[float]:
    """A few round values from one at most ``low`` to one at least ``high``."""
    step = _round_step(low, high)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _powers(low: float, high: float) -> Iterable[Sequence[float]]:
    exponents = range(math.floor(low), min(math.ceil(high), 308) + 1)
    yield [10.0**k for k in exponents]
    yield [m * 10.0**k for k in exponents for m in (1, 2, 5)]


def _shares(low: float, high: float) -> Iterable[Sequence[float]]:
    nearly_all = [1 - share for share in reversed(_RARE_SHARES)]
    yield [*_RARE_SHARES, *_USUAL_SHARES, *nearly_all]
    for n in (20, 50, 100):
        yield [i / n for i in range(1, n)]


@dataclass(frozen=True)
class Scale:
    """Where values lie on an axis.

    Attributes:
        forward, back: from a value to its place, increasing, and from a place to its value.
        candidates: values worth writing around two places, the coarsest first.
        show: how a value is written.
    """

    forward: Callable[[Any], float]
    back: Callable[[float], float]
    candidates: Callable[[float, float], Iterable[Sequence[float]]]
    show: Callable[[float], str] = number

    def place(self, value: Number) -> float:
        """NaN for a value that has no place here."""
        try:
            return self.forward(value)
        except (TypeError, ValueError, ArithmeticError):
            return math.nan

    def holds(self, value: Number) -> bool:
        """Whether the scale has a place for a value."""
        return math.isfinite(self.place(value))

    def ticks(self, low: float, high: float) -> Sequence[float]:
        """Values between two places: the coarsest candidates of which three are there, or round
        ones."""
        for values in self.candidates(low, high):
            inside = [value for value in values if low <= self.place(value) <= high]
            if len(inside) >= 3:
                return inside
        return round_values(self.back(low), self.back(high))

    def around(self, low: float, high: float) -> tuple[float, float]:
        """The places of the next values worth writing: the coarsest of which three are there, and
        of whose room the values between fill most."""
        for values in self.candidates(low, high):
            places = [self.place(value) for value in values]
            below = [place for place in places if place <= low]
            above = [place for place in places if place >= high]
            if below and above and high - low >= _FILLED * (above[0] - below[-1]):
                inside = [place for place in places if below[-1] <= place <= above[0]]
                if len(inside) >= 3:
                    return below[-1], above[0]
        ends = self.back(low), self.back(high)
        if not ends[0] < ends[1]:
            return low, high
        first, *_, last = map(self.place, round_values_around(*ends))
        # round values may have no place, as 0 in decades
        return (first if first <= low else low), (last if last >= high else high)


SCALES = {
    "linear": Scale(float, float, lambda low, high: ()),
    "log": Scale(math.log10, lambda place: 10.0 ** min(place, 308.0), _powers),
    "logit": Scale(logit, sigmoid, _shares, lambda share: f"{100 * share:.10g}"),
}


@dataclass(frozen=True)
class Axis:
    """An axis as it is asked for; what is None comes from the values.

    Attributes:
        label: what it measures.
        scale: "linear", "log" (decades) or "logit" (log odds of shares, written in per cent).
        low, high: values at its ends, by default the next that are written; what lies beyond is
            drawn at the end.
        ticks: values to write at it.
        names: instead of values, names of its parts; from the top where it is upright.
    """

    label: str = ""
    scale: str = "linear"
    low: Number = None
    high: Number = None
    ticks: Sequence[float] | None = None
    names: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"Axis: scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        for end in (self.low, self.high):
            if end is not None and not SCALES[self.scale].holds(end):
                raise ValueError(f"Axis: {end} is no end of a {self.scale} axis")

    def between(self, start: float, end: float, values: Values) -> Ruler:
        """The axis from start to end of a drawing, for values of which each has a place."""
        scale = SCALES[self.scale]
        if self.names is not None:
            count = float(len(self.names))
            if start < end:
                return Ruler(self, scale, 0.0, count, start, end)
            return Ruler(self, scale, count, 0.0, start, end)
        places = [scale.place(value) for value in values]
        low = min(places) if self.low is None else scale.place(self.low)
        high = max(places) if self.high is None else scale.place(self.high)
        if high <= low:
            size = abs(low) if self.scale == "linear" else 0.0
            high = low + (size or 1.0)
        if self.ticks is None:
            first, last = scale.around(low, high)
            low = first if self.low is None else low
            high = last if self.high is None else high
        return Ruler(self, scale, low, high, start, end)


class Ruler(NamedTuple):
    """An axis in a drawing, with the places low and high at start and end."""

    axis: Axis
    scale: Scale
    low: float
    high: float
    start: float
    end: float

    def at(self, value: Number) -> float:
        """Where a value is drawn."""
        share = (self.scale.place(value) - self.low) / (self.high - self.low)
        inside = min(max(share, 0.0), 1.0)
        return round(self.start + inside * (self.end - self.start), 1)

    def value(self, share: float) -> float:
        """The value that lies at a share of the way from start to end."""
        return self.scale.back(self.low + share * (self.high - self.low))

    def _written(self) -> list[tuple[float, str]]:
        if self.axis.names is not None:
            return [(i + 0.5, str(name)) for i, name in enumerate(self.axis.names)]
        values = self.axis.ticks
        if values is None:
            values = self.scale.ticks(self.low, self.high)
        else:
            values = [v for v in values if self.low <= self.scale.place(v) <= self.high]
        return [(value, self.scale.show(value)) for value in values]

    def ticks(self) -> list[tuple[float, str]]:
        """Where what is written, as many as have room beside each other."""
        written = self._written()
        room = LINE
        if self.start < self.end:
            room = 5.0 + max((width_of(label) for _, label in written), default=0.0)
        kept: list[tuple[float, str]] = []
        for value, label in written:
            where = self.at(value)
            if not kept or abs(where - kept[-1][0]) >= room:
                kept.append((where, label))
        return kept
