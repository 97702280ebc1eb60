"""What a chart draws over its axes: lines, dots, trends, bars and shaded cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from clipsteer.report.axes import Axis, Number, Ruler, Scale, Values, number
from clipsteer.report.page import LINE, lines_of

LEFT = 46.0
NAMES = 116.0  # the most room that names have at an upright axis
COLOURS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_TOLD = 60  # points of a line at most that say what they are


class Frame(NamedTuple):
    """The axes as asked for, and how much room is between those that lie."""

    x: Axis
    y: Axis
    height: float


class Scales(NamedTuple):
    """Those of both axes."""

    x: Scale
    y: Scale

    def rows(self, xs: Values, *columns: Values) -> list[Any]:
        """(x, y, …) of which each has a place."""
        rows = [row for row in zip(xs, *columns) if self.x.holds(row[0])]
        return [row for row in rows if all(map(self.y.holds, row[1:]))]


class Box(NamedTuple):
    """A bar or a cell."""

    colour: str
    left: float
    right: float
    top: float
    bottom: float
    opacity: float = 1.0
    name: str = ""
    edge: str = "line"


class Drawn(NamedTuple):
    """What the template draws of a layer; colours are names of style.css, all else are lengths."""

    colour: str = "soft"
    dashes: str = "2 3"
    width: float = 1.5
    path: str = ""  # of a line
    band: str = ""  # around a shaded room
    symbols: Sequence[tuple[str, float, float]] = ()  # kind, x, y
    boxes: Sequence[Box] = ()
    words: Sequence[tuple[Any, ...]] = ()  # words, x, y, anchor, room
    key: str = ""  # in the legend
    told: Sequence[tuple[float, float, str]] = ()  # x, y, and what a page says there


class Plot(NamedTuple):
    """Where a layer is drawn, as which of the lines."""

    x: Ruler
    y: Ruler
    line: int

    @property
    def scales(self) -> Scales:
        return Scales(self.x.scale, self.y.scale)

    def path(self, points: Iterable[tuple[Number, Number]]) -> str:
        return " ".join(f"{self.x.at(x)},{self.y.at(y)}" for x, y in points)


class Layer:
    """Drawn after the layers before it."""

    width = 400.0
    right = 10.0
    names = NAMES
    lines = 0

    def framed(self, frame: Frame) -> Frame:
        """What this layer makes of the frame that was asked for."""
        return frame

    def points(self, scales: Scales) -> list[Any]:
        """(x, y) that the axes must hold; where they are given, any."""
        return []

    def drawn(self, plot: Plot) -> Drawn:
        raise NotImplementedError

    def spoken(self) -> str:
        """For those who do not see the chart, where the axes do not say it."""
        return ""


@dataclass(frozen=True)
class Line(Layer):
    """A curve.

    Attributes:
        band: lows and highs at each x, between which the room is shaded.
        symbols: "ring", "square", "diamond" or "" at each x.
        label: in the legend; by default the name and the last value.
    """

    name: str
    xs: Values
    ys: Values
    band: tuple[Values, Values] | None = None
    symbols: Sequence[str] = ()
    label: str | None = None
    lines = 1

    def points(self, scales: Scales) -> list[Any]:
        found = scales.rows(self.xs, self.ys)
        if found and self.band:
            for x, *ends in scales.rows(self.xs, *self.band):
                found += [(x, end) for end in ends]
        return found

    def drawn(self, plot: Plot) -> Drawn:
        rows = plot.scales.rows(self.xs, self.ys)
        last = plot.y.scale.show(rows[-1][1]) if rows else "no data"
        symbols = [
            (symbol, plot.x.at(x), plot.y.at(y))
            for x, y, symbol in zip(self.xs, self.ys, self.symbols)
            if symbol and (x, y) in rows
        ]
        if len(rows) == 1 and not symbols:
            ((x, y),) = rows
            symbols = [("dot", plot.x.at(x), plot.y.at(y))]
        told = []
        for x, y in [*rows[:-1][:: math.ceil(len(rows) / _TOLD) or 1], *rows[-1:]]:
            at = f"{plot.x.scale.show(x)}: {plot.y.scale.show(y)}"
            told.append((plot.x.at(x), plot.y.at(y), f"{self.name}, {at}"))
        return Drawn(
            colour=f"s{plot.line % COLOURS}",
            # every pair of a colour and a dash once, before one comes again
            dashes=_DASHES[(plot.line + plot.line // COLOURS) % len(_DASHES)],
            width=2,
            path=plot.path(rows),
            band=self._band(plot),
            symbols=symbols,
            key=f"{self.name}: {last}" if self.label is None else self.label,
            told=told,
        )

    def _band(self, plot: Plot) -> str:
        rows = plot.scales.rows(self.xs, *self.band) if self.band else []
        if len(rows) < 2:
            return ""
        highs = [(x, high) for x, _, high in rows]
        lows = [(x, low) for x, low, _ in rows]
        return plot.path(highs + lows[::-1])


@dataclass(frozen=True)
class Dots(Layer):
    """Single points, in a quiet colour."""

    xs: Values
    ys: Values

    def points(self, scales: Scales) -> list[Any]:
        return scales.rows(self.xs, self.ys)

    def drawn(self, plot: Plot) -> Drawn:
        rows = self.points(plot.scales)
        return Drawn(symbols=[("dot", plot.x.at(x), plot.y.at(y)) for x, y in rows])


@dataclass(frozen=True)
class Trend(Layer):
    """A function of x where it stays inside the axes, which it does not widen."""

    name: str
    function: Callable[[float], float]

    def drawn(self, plot: Plot) -> Drawn:
        xs = [plot.x.value(i / 100) for i in range(101)]
        inside = []
        for x in xs:
            y = self.function(x)
            if plot.y.low <= plot.y.scale.place(y) <= plot.y.high:
                inside.append((x, y))
        return Drawn(path=plot.path(inside), key=self.name)


@dataclass(frozen=True)
class Bars(Layer):
    """Horizontal bars: (name, value) or (name, value, shown text).

    Where a value is negative, 0 is in the middle. ``limit`` is the value of a whole bar, by default
    the largest; ``intervals`` are lows and highs, a thin line each.
    """

    items: Sequence[tuple[Any, ...]]
    limit: float | None = None
    intervals: Sequence[tuple[float, float]] = ()
    width = 300.0
    right = 46.0

    def framed(self, frame: Frame) -> Frame:
        values = [item[1] for item in self.items]
        values = list(filter(math.isfinite, [*values, *chain(*self.intervals)]))
        top = self.limit or max(map(abs, values), default=0.0) or 1.0
        low = -top if min(values, default=0.0) < 0 else 0.0
        names = [str(item[0]) for item in self.items]
        lines = max((len(lines_of(name, NAMES)) for name in names), default=1)
        return Frame(
            replace(frame.x, low=low, high=top, ticks=()),
            replace(frame.y, names=names),
            len(names) * (LINE * lines + 6),
        )

    def points(self, scales: Scales) -> list[Any]:
        return [(0.0, 0.0) for _ in self.items]

    def _written(self) -> list[str]:
        return [str(shown[0]) if shown else f"{value:.3g}" for _, value, *shown in self.items]

    def drawn(self, plot: Plot) -> Drawn:
        boxes = []
        words = []
        for i, written in enumerate(self._written()):
            value = self.items[i][1]
            y = plot.y.at(i + 0.5)
            ends = [plot.x.at(0), plot.x.at(value if math.isfinite(value) else 0)]
            colour = "s1" if value < 0 else "s0"
            boxes.append(Box("line", plot.x.start, plot.x.end, y - 6, y + 6))
            boxes.append(Box(colour, min(ends), max(ends), y - 6, y + 6))
            if self.intervals and all(map(math.isfinite, self.intervals[i])):
                low, high = map(plot.x.at, self.intervals[i])
                boxes.append(Box("fg", low, high, y - 1, y + 1))
            words.append((written, self.width, y, "end", self.right))
        return Drawn(boxes=boxes, words=words)

    def spoken(self) -> str:
        pairs = zip(self.items, self._written())
        return "; ".join(f"{item[0]}: {written}" for item, written in pairs)


@dataclass(frozen=True)
class Cells(Layer):
    """A matrix, each cell the darker the nearer to ``peak``, with figures where they fit; NaN stays
    empty.

    Attributes:
        middle: makes ratios of the values: green from here on, red and framed below, and the darker
            the farther away in decades, fully at ``peak`` and its mirror image.
        tall: the height of a row at most.
        names: the most room for the names of rows.
    """

    values: Sequence[Sequence[float]]  # (R, C)
    rows: Sequence[Any]  # R names, from the top
    columns: Sequence[Any]  # C names
    peak: float
    show: Callable[[float], str] = number
    middle: float | None = None
    tall: float = 34.0
    names: float = NAMES

    def framed(self, frame: Frame) -> Frame:
        wide = (self.width - LEFT - self.right) / max(len(self.columns), 1)
        return Frame(
            replace(frame.x, names=self.columns),
            replace(frame.y, names=self.rows),
            min(self.tall, wide) * len(self.rows),
        )

    def points(self, scales: Scales) -> list[Any]:
        return [(0.0, 0.0) for _ in self.rows]

    def drawn(self, plot: Plot) -> Drawn:
        boxes = []
        words = []
        for r, line in enumerate(self.values):
            for c, value in enumerate(line):
                if math.isfinite(value):
                    box = self._cell(plot, r, c, value)
                    boxes.append(box)
                    written = self.show(value)
                    room = box.right - box.left
                    if room >= 7 * len(written) - 2:
                        x = plot.x.at(c + 0.5)
                        y = plot.y.at(r + 0.5)
                        words.append((written, x, y, "middle", 2 * room))
        return Drawn(boxes=boxes, words=words)

    def _cell(self, plot: Plot, r: int, c: int, value: float) -> Box:
        share = self._share(value)
        below = share < 0
        colour = "s0"
        if self.middle is not None:
            colour = "s1" if below else "s2"
        return Box(
            colour,
            left=plot.x.at(c) + 1,
            right=plot.x.at(c + 1) - 1,
            top=plot.y.at(r) + 1,
            bottom=plot.y.at(r + 1) - 1,
            # half the colour at most, so that the figure on it can be read
            opacity=0.5 * abs(share),
            name=f"{self.rows[r]}, {self.columns[c]}: {self.show(value)}",
            edge="fg" if below else "line",
        )

    def _share(self, value: float) -> float:
        """Of a cell's colour: 1 at the peak, negative below the middle."""
        if self.middle is None:
            return min(max(value / self.peak, 0.0), 1.0) if self.peak > 0 else 0.0
        if value <= 0:
            return -1.0
        return min(max(math.log(value / self.middle, self.peak / self.middle), -1.0), 1.0)

    def spoken(self) -> str:
        return f"{len(self.rows)} × {len(self.columns)}"
