"""One chart, on a page or as an SVG file: layers over two axes.

What has no place on its axis is left out: None, NaN, an infinity, 0 in decades, 0 and 1 in log
odds.

    chart = Chart("Loss", Line("train", steps, losses), x="step", y=Axis("loss", scale="log"))
    page.section("Training", chart)
    chart.write("loss.svg")
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from clipsteer.io.names import spoken
from clipsteer.report.axes import SCALES, Axis, Ruler
from clipsteer.report.layers import COLOURS, LEFT, NAMES, Frame, Layer, Line, Plot, Scales
from clipsteer.report.page import (
    FOLDER,
    LINE,
    Html,
    lines_of,
    render,
    shortened,
    width_of,
    write_whole,
)

logger = logging.getLogger(__name__)

_TOP = 10.0
_KEY = 14.0  # from one line of a file's legend to the next


class Chart:
    """A chart, to be put on a page as it is or written as a file.

    Args:
        title: above it; may be "" where the page says what it is.
        layers: `Line`, `Dots`, `Trend`, `Bars`, `Cells`, from the bottom.
        x, y: axes, or no more than their labels.
        height: between the axes, in units of which the chart is 400 wide.
        note: a last line of the legend.
    """

    def __init__(
        self,
        title: str,
        *layers: Layer,
        x: Axis | str = "",
        y: Axis | str = "",
        height: float = 176.0,
        note: str = "",
    ) -> None:
        self.title = title
        self.layers = layers
        self.note = note
        self.width = layers[0].width if layers else Layer.width
        self.frame = Frame(
            Axis(x) if isinstance(x, str) else x,
            Axis(y) if isinstance(y, str) else y,
            height,
        )
        for layer in layers:
            self.frame = layer.framed(self.frame)

    def _scene(self) -> dict[str, Any]:
        """What the template draws; it reaches from top to bottom."""
        scene = {
            "title": self.title,
            "width": self.width,
            "frame": self.frame,
            "spoken": "no data",
            "layers": [],
            "top": 0.0,
            "bottom": 30.0,
        }
        x_axis, y_axis, height = self.frame
        scales = Scales(SCALES[x_axis.scale], SCALES[y_axis.scale])
        points = [point for layer in self.layers for point in layer.points(scales)]
        if not points:
            return scene
        foot = _TOP + height
        y = y_axis.between(foot, _TOP, [point[1] for point in points])
        names = max((width_of(label) for _, label in y.ticks()), default=0.0)
        left = max(LEFT, min(names, max(layer.names for layer in self.layers)) + 8)
        named = self._named(scales, height)
        room = max((width_of(name) + 6 for name in named.values()), default=0.0)
        right = self.width - max(room, *(layer.right for layer in self.layers))
        x = x_axis.between(left, right, [point[0] for point in points])
        drawn = []
        count = 0
        for layer in self.layers:
            drawn.append(layer.drawn(Plot(x, y, count)))
            count += layer.lines
        ends = {i: drawn[i].told[-1][1] for i in named}
        for i, at in _apart(ends, _TOP, foot).items():
            drawn[i] = drawn[i]._replace(words=[(named[i], right + 5, at, "start", room)])
        return {
            **scene,
            "spoken": self._spoken(y),
            "layers": drawn,
            "left": left,
            "right": right,
            "foot": foot,
            "x_ticks": [(at, self._inside(at, label), label) for at, label in x.ticks()],
            "y_ticks": y.ticks(),
            "top": -17.0 if y_axis.label else 0.0,
            "bottom": foot + (34 if x_axis.label else 20 if x.ticks() else 2),
        }

    def _named(self, scales: Scales, height: float) -> dict[int, str]:
        """Of the layers, the lines that have their name at their end: where several are, as many
        as can be told apart and have room."""
        lines = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Line) and layer.points(scales):
                lines[i] = shortened(layer.name, NAMES - 6)
        return lines if 1 < len(lines) <= min(COLOURS, height // LINE) else {}

    def _spoken(self, y: Ruler) -> str:
        said = [layer.spoken() for layer in self.layers if layer.spoken()]
        if said:
            return "; ".join(said)
        x_label = self.frame.x.label or "x"
        y_label = self.frame.y.label or "value"
        low, high = (y.scale.show(y.value(share)) for share in (0, 1))
        return f"{y_label} against {x_label}, from {low} to {high}"

    def _inside(self, at: float, label: str) -> float:
        half = width_of(label) / 2
        return min(max(at, half), self.width - half)

    def __html__(self) -> Html:
        colours = {name: f"var(--{name})" for name in _colours()}
        return render("chart", scene=self._scene(), ink=colours, note=self.note)

    def __str__(self) -> str:
        return self.__html__()

    def svg(self) -> str:
        """A whole file, on white: the title, the drawing, and the legend below."""
        scene = self._scene()
        heading = []
        for line in reversed(lines_of(self.title, 0.9 * self.width)):
            heading.append((line, scene["top"] - 6))
            scene["top"] -= _KEY
        legend = []
        keys = [layer for layer in scene["layers"] if layer.key]
        for layer in keys:
            legend.append((layer, layer.key, scene["bottom"]))
            scene["bottom"] += LINE + LINE * len(lines_of(layer.key, self.width - 90)) - 8
        if self.note and keys:
            legend.append((None, self.note, scene["bottom"]))
            scene["bottom"] += LINE + 4
        scene["top"] -= 6
        scene["bottom"] += 8
        return render("file", scene=scene, ink=_colours(), heading=heading, legend=legend) + "\n"

    def write(self, path: str | os.PathLike[str]) -> list[Path]:
        """The chart as an SVG file, and beside it as a PNG, 1600 pixels wide.

        The PNG needs resvg-py; without that a line in the log says so. Returns the files written.
        """
        source = spoken(self.svg())
        path = write_whole(Path(path), source.encode())
        try:
            from resvg_py import svg_to_bytes
        except ImportError:
            logger.warning(
                "%s: no PNG beside it, that needs resvg-py: pip install 'clipsteer[data]'",
                path,
            )
            return [path]
        png = svg_to_bytes(svg_string=source, width=1600, background="#ffffff")
        return [path, write_whole(path.with_suffix(".png"), bytes(png))]


def _apart(ends: dict[int, float], top: float, foot: float) -> dict[int, float]:
    """Heights a line of words apart, near those that were asked for."""
    placed = {}
    low = top
    for left, (i, at) in enumerate(sorted(ends.items(), key=lambda pair: pair[1])):
        # those below need their room, too
        last = foot - LINE * (len(ends) - left - 1)
        placed[i] = min(max(at, low), last)
        low = placed[i] + LINE
    return placed


def write_svg(path: str | os.PathLike[str], chart: Chart) -> list[Path]:
    """`Chart.write` under its former name."""
    return chart.write(path)


def _colours() -> dict[str, str]:
    """The page's colours on white: few programs but browsers know its names for them."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return dict(reversed(re.findall(r"--(\w+): (#\w+)", style)))
