from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipsteer import report

VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Checker(HTMLParser):
    """Every element is closed in order; attributes that would fetch something are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(markup: str) -> Checker:
    checker = Checker()
    checker.feed(markup)
    checker.close()
    assert checker.open == []
    return checker


def picture(colour=(200, 30, 30), size=(8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


def full_page() -> report.Page:
    page = report.Page("A <b> title", "sub & title", footer="end")
    page.lead(report.stats([("images", 12), ("EV", "0.9", "held out")]))
    page.section(
        "One",
        "plain <script>alert(1)</script>",
        report.table(["a", "b"], [["x<y", 1], ["z", 2.5]], caption="cap"),
        report.figures([(picture(), 'say "hi"'), (picture(), "", "alone")]),
        report.charts(report.line_chart({"s": ([0, 1, 2], [3, 1, 2])}, title="T", x_label="step", y_label="loss")),
        report.cards(report.card("Card", report.bars([("up", 0.5), ("down", -0.25, "−25")]))),
        report.code("a < b"),
    )
    return page


def test_page_is_well_formed_self_contained_and_escaped(tmp_path):
    path = full_page().write(tmp_path / "deep" / "report.html")
    markup = path.read_text(encoding="utf-8")
    checker = parse(markup)
    tags = [t for t, _ in checker.tags]
    assert "script" not in tags
    assert "link" not in tags
    assert "<b>" not in markup
    for tag, attrs in checker.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert "aria-label" in attrs or attrs.get("aria-hidden") == "true"
    assert not re.search(r"url\(|@import|https?://", markup)
    assert "prefers-color-scheme:dark" in markup
    assert tags.count("h1") == 1
    assert "plain <script>alert(1)</script>" in "".join(checker.text)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_images_decode_to_what_went_in():
    markup = report.image(picture((10, 200, 40), (16, 9)), "green")
    data = re.search(r"base64,([A-Za-z0-9+/=]+)", markup)[1]
    back = Image.open(io.BytesIO(base64.b64decode(data)))
    assert back.size == (16, 9)
    assert np.abs(np.asarray(back.convert("RGB")).astype(int) - (10, 200, 40)).max() < 12


def test_line_chart_places_points_and_skips_nan():
    nan = float("nan")
    markup = report.line_chart({"a": ([0, 5, 10], [0.0, 1.0, 0.5]), "b": ([0, 10], [nan, 1.0])}, title="t")
    first, *_ = re.findall(r'polyline points="([^"]*)"', markup)
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, p.split(","))) for p in first.split()]
    assert x0 < x1 < x2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y2 > y1
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "nan" not in markup
    assert "no data" in report.line_chart({"a": ([], [])}, title="t")
    parse(report.line_chart({"flat": ([3, 3], [2, 2])}, title="t"))


def test_up_to_sixteen_lines_differ():
    chart = report.line_chart({str(i): ([0, 1], [0, i]) for i in range(16)}, title="many")
    assert len(set(re.findall(r'<polyline points="[^"]*" (style="[^"]*" stroke-dasharray="[^"]*")', chart))) == 16


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0, 1e-6), (12.1, 12.4), (-1e6, 1e7), (0.7, 0.9)])
def test_ticks_are_inside_and_few(low, high):
    ticks = report._ticks(low, high)
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 6
    assert all(low - slack <= t <= high + slack for t in ticks)


def test_bars_keep_sign_and_proportion():
    markup = report.bars([("a", 1.0), ("b", -0.5)])
    spans = re.findall(r'class="(up|down)" style="left:([\d.]+)%;width:([\d.]+)%"', markup)
    assert spans == [("up", "50.0", "50.0"), ("down", "25.0", "25.0")]
    assert "left:0.0%;width:50.0%" in report.bars([("a", 2.0), ("b", 1.0)])


def test_heat_overlay_glows_only_where_hot():
    overlay = report.heat_overlay(picture((0, 0, 255), (64, 64)), [[0.0, 1.0], [0.0, 0.0]], size=64)
    shown = np.asarray(overlay).astype(int)
    hot, cold = shown[4, 60], shown[60, 4]
    assert hot[0] > 120
    assert hot[0] > hot[2] + 50
    assert cold[2] > cold[0] + 50
    report.heat_overlay(picture(), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="heat must have shape"):
        report.heat_overlay(picture(), [1.0, 2.0])


def test_table_rows_must_fit():
    with pytest.raises(ValueError, match="2 cells"):
        report.table(["a", "b"], [["x"]])


def test_heat_map_shades_and_writes_what_is_there():
    nan = float("nan")
    values = [[0.5, nan], [1.0, 2.0]]
    options = {"title": "<T>", "rows": ["a", "<b>"], "columns": ["x", "y"], "show": lambda v: f"{v:.1f}"}
    markup = report.heat_map(values, **options, peak=2.0)
    parse(markup)
    assert re.findall(r'fill-opacity="([\d.]+)"><title>([^<]*)<', markup) == [
        ("0.125", "a, x: 0.5"), ("0.250", "&lt;b&gt;, x: 1.0"), ("0.500", "&lt;b&gt;, y: 2.0"),
    ]  # fmt: skip
    assert markup.count("pointer-events:none") == 3
    # no room for figures in thirty columns, nor for thirty names
    wide = report.heat_map([[0.5] * 30], **options | {"rows": ["r"], "columns": range(30)}, peak=0.0)
    assert wide.count("<rect") == wide.count('fill-opacity="0.000"') == 30
    assert "pointer-events" not in wide
    assert wide.count('text-anchor="middle"') == 10 + 1


def test_bands_follow_their_line_and_widen_the_axis():
    series = {"s": ([0, 1, 2], [1.0, 2.0, 3.0])}
    plain = report.line_chart(series, title="t", x_ticks=[0, 2])
    assert "<polygon" not in plain
    assert re.findall(r'text-anchor="middle">(\d)<', plain) == ["0", "2"]
    banded = report.line_chart(series, title="t", bands={"s": ([0.0, 1.0, float("nan")], [1.0, 5.0, 9.0])})
    points = re.search(r'<polygon points="([^"]+)"', banded)[1].split()
    # two points have both ends: forth along the top, back along the bottom, of an axis from 0 to 5
    assert [float(p.split(",")[1]) for p in points] == [150.8, 10.0, 150.8, 186.0]
    assert "from 0 to 5" in banded


def test_markdown_and_csv(tmp_path):
    assert report.markdown_table(["a", "b"], [[1, "x"]]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]
    report.write_csv(tmp_path / "t.csv", [{"a": 1 / 3, "b": "x,y"}, {"a": 2, "b": ""}])
    assert (tmp_path / "t.csv").read_text() == 'a,b\n0.333333,"x,y"\n2,\n'
