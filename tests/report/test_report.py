from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipsteer import report
from clipsteer.report import Axis, Bars, Cells, Chart, Dots, Line, Trend
from clipsteer.report.axes import round_values

NAN = float("nan")
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'so' {{ 7 * 6 }} {% raw %} ]]> var(--s0)"

VOID = {"meta", "img"}


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
        report.grid(Chart("T", Line("s", [0, 1, 2], [3, 1, 2]), x="step", y="loss")),
        report.cards(report.card("Card", Chart("", Bars([("up", 0.5), ("down", -0.25, "−25")])))),
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
            assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs.get("role") == "img" or attrs.get("aria-hidden") == "true"
    assert tags.count("desc") == 2
    assert not re.search(r"url\(|@import|https?://", markup)
    assert "prefers-color-scheme: dark" in markup
    assert tags.count("h1") == 1
    assert "plain <script>alert(1)</script>" in "".join(checker.text)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_images_decode_to_what_went_in():
    markup = report.image(picture((10, 200, 40), (16, 9)), "green")
    data = re.search(r"base64,([A-Za-z0-9+/=]+)", markup)[1]
    back = Image.open(io.BytesIO(base64.b64decode(data)))
    assert back.size == (16, 9)
    assert np.abs(np.asarray(back.convert("RGB")).astype(int) - (10, 200, 40)).max() < 12


def every_part(text: str) -> list:
    """All that a page is made of, with one text wherever text can stand."""
    chart = Chart(text, Line(text, [0, 1], [1, 2]), x=text, y=text, note=text)
    return [
        report.text(text, css=text),
        report.code(text),
        report.stats([(text, text, text)]),
        report.table([text, text], [[text, text]], text),
        report.table([text], [[text]], words=True),
        report.image(picture(), text),
        report.figures([(picture(), text, text)], size=text),
        report.card(text, text),
        report.cards(text),
        report.grid(chart, Chart(text, Bars([(text, -1.0, text)])), Chart(text, Line(text, [], []))),
        Chart(text, Cells([[1.0]], [text], [text], peak=1.0), x=text),
        text,
    ]


def test_hostile_text_stays_text(tmp_path):
    page = report.Page(HOSTILE, HOSTILE, footer=HOSTILE, language=HOSTILE)
    page.lead(HOSTILE)
    page.section(HOSTILE, *every_part(HOSTILE))
    markup = page.html()
    checker = parse(markup)
    harmless = report.Page("x", "x", footer="x", language="x")
    harmless.lead("x")
    harmless.section("x", *every_part("x"))
    # the same elements with the same attributes, whatever the text
    expected = [(tag, sorted(attrs)) for tag, attrs in parse(harmless.html()).tags if tag != "tspan"]
    assert [(tag, sorted(attrs)) for tag, attrs in checker.tags if tag != "tspan"] == expected
    assert "<script" not in markup
    # nor is the text a template: what it says is there as it is, at least in title, heading and cells
    assert "".join(checker.text).count(HOSTILE) > 20
    for chart in (Chart(HOSTILE, Line(HOSTILE, [0, 1], [1, 2]), x=HOSTILE, y=HOSTILE, note=HOSTILE),
                  Chart(HOSTILE, Bars([(HOSTILE, 1.0, HOSTILE)])), Chart(HOSTILE)):  # fmt: skip
        path = chart.write(tmp_path / "deep" / "chart.svg")[0]
        root = ET.fromstring(path.read_text(encoding="utf-8"))
        assert root.find("{*}title").text == HOSTILE
        assert not root.findall(".//{*}script")


def test_nothing_heavy_is_imported_before_a_part_is_made():
    code = (
        "import sys, clipsteer.report as report; heavy = {'jinja2', 'PIL', 'resvg_py'};"
        "before = heavy & set(sys.modules); report.text('x');"
        "print(sorted(before), 'jinja2' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "True"]


def lines(chart: Chart) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]*)"', str(chart))
    return [[tuple(map(float, point.split(","))) for point in path.split()] for path in found]


def test_a_line_goes_through_its_points_and_passes_over_what_has_no_place():
    first, second = lines(Chart("t", Line("a", [0, 5, 10], [0.0, 1.0, 0.5]), Line("b", [0, 10], [NAN, 1.0])))
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x0 < x1 < x2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y2 > y1
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert second == [(x2, y1)]
    gaps = Chart("t", Line("a", [0, 1, 2, None, 4, 5], [0.0, None, NAN, 3.0, math.inf, 5.0]))
    assert lines(gaps) == lines(Chart("t", Line("a", [0, 5], [0.0, 5.0])))
    assert "a: 5<" in str(gaps)
    assert "nan" not in str(gaps)


@pytest.mark.parametrize("chart", [
    Chart("t"),
    Chart("t", Line("a", [], [])),
    Chart("t", Line("a", [1], [None])),
    Chart("t", Line("a", [1, 2], [0.0, -1.0]), y=Axis(scale="log")),
    Chart("t", Line("a", [1, 2], [0.0, 1.0]), y=Axis(scale="logit")),
    Chart("t", Dots([], [])),
    Chart("t", Trend("f", abs)),
    Chart("t", Bars([])),
    Chart("t", Cells([], [], [], 1.0)),
])  # fmt: skip
def test_a_chart_of_nothing_says_so(chart):
    assert "no data" in parse(str(chart)).text
    assert "no data" in "".join(ET.fromstring(chart.svg()).itertext())


@pytest.mark.parametrize("scale", ["linear", "log", "logit"])
def test_constant_series_and_single_points(scale):
    axis = Axis(scale=scale)
    flat = Chart("t", Line("flat", [0.3, 0.3], [0.2, 0.2]), x=axis, y=axis)
    parse(str(flat))
    (((x, y), again),) = lines(flat)
    assert (x, y) == again
    assert 46 <= x <= 390
    assert 10 <= y <= 186
    alone = str(Chart("t", Line("one", [0.5], [0.5]), x=axis, y=axis))
    assert alone.count('r="2.5"') == 1


def test_up_to_sixteen_lines_differ():
    chart = str(Chart("many", *(Line(str(i), [0, 1], [0, i]) for i in range(16))))
    drawn = re.findall(r'<polyline points="[^"]*" style="([^"]*)" stroke-dasharray="([^"]*)"', chart)
    assert len(set(drawn)) == 16
    assert len({colour for colour, _ in drawn}) == 8


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_and_lines_stand_out_in_light_and_in_dark():
    style = (Path(report.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style.split("@media screen")[:2])
    light = {
        name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for name, value in light.items()
    }
    assert light.keys() == dark.keys()
    assert {f"s{i}" for i in range(8)} < light.keys()
    for colours in (light, dark):
        for name in ("fg", "soft", *(f"s{i}" for i in range(8))):
            for ground in ("bg", "card"):
                low, high = sorted([luminance(colours[name]), luminance(colours[ground])])
                # words are of the first three; what is drawn needs 3
                assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("fg", "soft", "s0") else 3), (name, ground)


def test_several_lines_are_named_where_they_end():
    def named(count, name="line {}"):
        lines = [Line(name.format(i), [0, 1], [0, 1 + i / 50]) for i in range(count)]
        spans = re.findall(r'text-anchor="start"[^>]*><tspan x="([\d.]+)" y="([\d.]+)" [^>]*>([^<]*)<',
                           str(Chart("t", *lines, x="x")))  # fmt: skip
        return [(float(x), float(y), text) for x, y, text in spans]

    # under each other, the last value first, though their ends are nearer
    words = named(6)
    assert sorted(text for *_, text in words) == [f"line {i}" for i in range(6)]
    words.sort(key=lambda word: word[1])
    assert [text for *_, text in words] == [f"line {i}" for i in reversed(range(6))]
    assert all(b[1] - a[1] >= 11.99 for a, b in pairwise(words))
    assert all(10 <= y <= 186 for _, y, _ in words)
    assert named(1) == named(9) == []
    (_, _, text), _ = named(2, "a name that is much too long {}")
    assert text.startswith("a name")
    assert text.endswith("…")


def test_points_say_on_a_page_what_they_are():
    chart = Chart("t", Line("<a>", [0, 5, 10], [0.25, NAN, 1.0]), x="step")
    assert re.findall(r"<circle[^>]*><title>([^<]*)</title>", str(chart)) == ["&lt;a&gt;, 0: 0.25", "&lt;a&gt;, 10: 1"]
    assert "class=" not in chart.svg()
    long = str(Chart("t", Line("a", range(1000), range(1000))))
    assert 50 < long.count("<circle") <= 62
    assert "a, 999: 999" in long


def test_a_page_lists_its_sections_and_links_to_each():
    page = report.Page("t")
    page.lead("above")
    for heading in ("One & all", "One  all", "…", "…", report.Html("<em>x</em>")):
        page.section(heading, "part")
    checker = parse(page.html())
    anchors = [attrs["id"] for tag, attrs in checker.tags if tag == "h2"]
    assert len(set(anchors)) == 5
    assert anchors[0] == "one-all"
    links = [attrs["href"] for tag, attrs in checker.tags if tag == "a"]
    assert links[:5] == links[5:] == [f"#{anchor}" for anchor in anchors]
    # two sections need no contents
    assert "<nav" not in full_page().html()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0, 1e-6), (12.1, 12.4), (-1e6, 1e7), (0.7, 0.9)])
def test_round_values_are_inside_and_few(low, high):
    ticks = round_values(low, high)
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 6
    assert all(low - slack <= t <= high + slack for t in ticks)


@pytest.mark.parametrize(("scale", "low", "high", "expected"), [
    ("linear", 0, 1, "0 0.2 0.4 0.6 0.8 1"),
    ("log", 0.01, 100, "0.01 0.1 1 10 100"),
    ("log", 0.8, 30, "0.5 1 2 5 10 20 50"),
    ("log", 3.1, 3.9, "3 3.2 3.4 3.6 3.8 4"),
    ("linear", 0.21, 0.93, "0.2 0.4 0.6 0.8 1"),
    ("linear", 0.0, 1e-7, None),
    ("log", 5e-324, 1.7e308, None),
    ("logit", 0.2, 0.8, "20 30 40 50 60 70 80"),
    ("logit", 0.31, 0.44, "30 35 40 45"),
    ("logit", 0.005, 0.995, None),
    ("logit", 1e-6, 1e-3, "0.0001 0.001 0.01 0.1"),
    ("logit", 1 - 1e-3, 1 - 1e-6, "99.9 99.99 99.999 99.9999"),
    ("logit", 1e-12, 1 - 1e-12, None),
    ("logit", 0.5001, 0.5002, None),
    ("logit", 1 - 2e-16, 1 - 1e-16, None),
    ("logit", 5e-324, 5e-324, None),
])  # fmt: skip
def test_ticks_of_every_scale(scale, low, high, expected):
    ruler = Axis(scale=scale).between(40.0, 390.0, [low, high])
    ticks = ruler.ticks()
    if expected is not None:
        assert [label for _, label in ticks] == expected.split()
    assert ticks
    assert all(40 <= where <= 390 for where, _ in ticks)
    # labels do not touch: figures are at most 7 wide
    for (left, a), (right, b) in pairwise(ticks):
        assert right - left >= 3.5 * (len(a) + len(b))
    chart = Chart("t", Line("a", [low, high], [low, high]), x=Axis(scale=scale), y=Axis(scale=scale))
    parse(str(chart))
    ET.fromstring(chart.svg())


def test_scales_place_points_by_decades_and_by_log_odds():
    def shares(scale, values):
        ((first, *middle, last),) = lines(Chart("t", Line("a", range(len(values)), values), y=Axis(scale=scale)))
        return [(y - first[1]) / (last[1] - first[1]) for _, y in middle]

    assert shares("log", [1, 10, 1000]) == pytest.approx([1 / 3], abs=0.003)
    assert shares("logit", [0.1, 0.5, 0.9]) == pytest.approx([0.5], abs=0.003)
    odds = [math.log(p / (1 - p)) for p in (0.01, 0.3, 0.999)]
    assert shares("logit", [0.01, 0.3, 0.999]) == pytest.approx([(odds[1] - odds[0]) / (odds[2] - odds[0])], abs=0.003)
    # 0 and 1 have no place unless they are shares of a number of things
    assert (report.logit(0.0, 9), report.logit(1.0, 9)) == pytest.approx((math.log(0.5 / 9.5), math.log(9.5 / 0.5)))
    assert lines(Chart("t", Line("a", [0, 1, 2], [0.0, 0.5, 1.0]), y=Axis(scale="logit"))) == [[(46.0, 186.0)]]


def test_ends_of_axes():
    fixed = Chart("t", Line("a", [0, 1], [-1.0, 3.0]), y=Axis(low=0, high=2), x=Axis(ticks=[0, 0.5, 1, 7]))
    assert [y for _, y in lines(fixed)[0]] == [186, 10]
    assert re.findall(r'middle"><tspan[^>]*>([^<]*)<', str(fixed)) == ["0", "0.5", "1"]
    with pytest.raises(ValueError, match="0 is no end of a log axis"):
        Axis(scale="log", low=0)
    with pytest.raises(ValueError, match="scale must be one of linear, log, logit, got 'square'"):
        Axis(scale="square")


def test_a_trend_stays_inside_and_widens_nothing():
    dots = Dots([0.1, 0.9], [0.1, 0.9])
    chart = Chart("t", Trend("steep", lambda x: 4 * x - 1.5), dots, x=Axis(), y=Axis())
    (path,) = lines(chart)
    assert 20 < len(path) < 60
    assert all(10 <= y <= 186 for _, y in path)
    alone = str(Chart("t", dots))
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', str(chart)) == re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)"', alone
    )


def bars(*items, **options) -> list[tuple[str, float, float]]:
    """(colour, start, end) of each bar, as shares of its track."""
    chart = str(Chart("", Bars(items, **options)))
    found = re.findall(r'<rect x="([\d.]+)" y="[^"]+" width="([\d.]+)" [^>]*fill:var\(--(\w+)\)', chart)
    boxes = [(name, float(x), float(x) + float(width)) for x, width, name in found]
    (_, low, high), *_ = boxes
    share = lambda x: round((x - low) / (high - low), 2)
    return [(name, share(start), share(end)) for name, start, end in boxes[1::2]]


def test_bars_keep_sign_and_proportion():
    assert bars(("a", 1.0), ("b", -0.5)) == [("s0", 0.5, 1.0), ("s1", 0.25, 0.5)]
    assert bars(("a", 2.0), ("b", 1.0)) == [("s0", 0.0, 1.0), ("s0", 0.0, 0.5)]
    assert bars(("a", 2.0), ("b", NAN), limit=4.0) == [("s0", 0.0, 0.5), ("s0", 0.0, 0.0)]
    # intervals, of which one is wider than any bar
    within = str(Chart("", Bars([("a", 1.0), ("b", 0.5)], intervals=[(0.5, 2.0), (NAN, NAN)])))
    assert re.findall(r'<rect x="([\d.]+)" y="[^"]+" width="([\d.]+)" height="2.0"[^>]*var\(--fg\)', within)
    assert bars(("a", 1.0), ("b", 0.5), intervals=[(NAN, NAN), (0.0, 2.0)])[0] == ("s0", 0.0, 0.5)
    chart = str(Chart("", Bars([("up", 0.5), ("down <b>", -0.25, "−25")])))
    assert "<desc>up: 0.5; down &lt;b&gt;: −25</desc>" in chart
    # a long name is told whole, in lines
    long = "woman in steamy room: medium-dark skin tone"
    spans = re.findall(r"<tspan[^>]*>([^<]*)</tspan>", str(Chart("", Bars([(long, 1.0)]))))
    assert "".join(spans[:-1]).replace(" ", "") == long.replace(" ", "")
    assert max(map(len, spans)) <= 18


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


def test_cells_are_shaded_and_say_what_is_there():
    options = {"rows": ["a", "<b>"], "columns": ["x", "y"], "show": lambda v: f"{v:.1f}"}
    markup = str(Chart("<T>", Cells([[0.5, NAN], [1.0, 2.0]], peak=2.0, **options), x="across", y="down"))
    parse(markup)
    assert re.findall(r'fill-opacity="([\d.]+)"><title>([^<]*)<', markup) == [
        ("0.125", "a, x: 0.5"), ("0.25", "&lt;b&gt;, x: 1.0"), ("0.5", "&lt;b&gt;, y: 2.0"),
    ]  # fmt: skip
    assert markup.count("pointer-events:none") == 3
    assert "<desc>2 × 2</desc>" in markup
    # no room for figures in thirty columns, nor for thirty names
    options |= {"rows": ["r"], "columns": range(30)}
    wide = str(Chart("", Cells([[0.5] * 30], peak=0.0, **options)))
    assert wide.count("<rect") == wide.count('fill-opacity="0.0"') == 30
    assert "pointer-events" not in wide
    assert wide.count('text-anchor="middle"><tspan') == 15


def test_bands_follow_their_line_and_widen_the_axis():
    xs, ys = [0, 1, 2], [1.0, 2.0, 3.0]
    assert "<polygon" not in str(Chart("t", Line("s", xs, ys)))
    banded = str(Chart("t", Line("s", xs, ys, band=([0.0, 1.0, NAN], [1.0, 5.0, 9.0]))))
    points = re.search(r'<polygon points="([^"]+)"', banded)[1].split()
    # two points have both ends: forth along the top, back along the bottom, of an axis from 0 to 5
    assert [float(p.split(",")[1]) for p in points] == [150.8, 10.0, 150.8, 186.0]
    assert "from 0 to 5" in banded
    # below all lines, so that none of them pales
    both = str(Chart("t", *(Line(name, xs, ys, band=(ys, [4.0] * 3)) for name in "ab")))
    assert both.rindex("<polygon") < both.index("<polyline")


def test_page_and_file_show_one_chart(tmp_path):
    chart = Chart(
        "A <title> as long as two lines of the file, which is narrower than the page and must clip no word",
        Line("first", [1, 10, 100], [0.5, 0.9, 0.99], symbols=["ring", "diamond", "square"], label="the first"),
        Line("second", [1, 100], [0.2, 0.3]),
        Trend("a trend", lambda x: 0.4),
        x=Axis("size", scale="log"),
        y=Axis("share, %", scale="logit"),
        note="○ start",
    )  # fmt: skip
    page = str(chart)
    path = chart.write(tmp_path / "new" / "chart.svg")[0]
    text = path.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{*}title").text == chart.title
    assert root.find("{*}desc").text.startswith("share, % against size, from 20 to 99")
    for pattern in (r'points="([^"]+)"', r'r="4.5"', r'stroke-dasharray="([^"]*)"', r"rotate\(45\)"):
        assert re.findall(pattern, text) == re.findall(pattern, page)
    said = " ".join(span.text for span in root.iter("{http://www.w3.org/2000/svg}tspan"))
    for word in ("the first", "second: 30", "a trend", "○ start", "size", "share, %", "99.9"[:2]):
        assert word in page
        assert word in said
    # a program that knows no names of colours can draw it, and all of it is in its box
    assert "var(" not in text
    assert "var(--s0)" in page
    left, top, width, height = map(float, root.get("viewBox").split())
    for element in root.iter():
        for name in ("y", "y1", "y2", "cy"):
            y = float(element.get(name, 0))
            assert top <= y <= top + height or element.get("dy"), ET.tostring(element)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# in a page: how wide it is, and which texts of its drawings leave their frame
MEASURE = """<script>
addEventListener("load", () => {
  const clipped = [];
  for (const drawing of document.querySelectorAll("svg[role=img]")) {
    const frame = drawing.getBoundingClientRect();
    for (const text of drawing.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
          || box.bottom > frame.bottom + 1) clipped.push(text.textContent);
    }
  }
  const page = document.documentElement;
  parent.postMessage({inner: innerWidth, scroll: page.scrollWidth, clipped,
                      drawings: document.querySelectorAll("svg[role=img]").length}, "*");
})</script>"""
FRAME = """<!doctype html><body><iframe src="page.html" width="WIDTH" height="800" style="border:0"></iframe>
<script>addEventListener("message", event => {
  const found = document.createElement("pre");
  found.id = "found"; found.textContent = JSON.stringify(event.data); document.body.append(found);
})</script>"""


@pytest.mark.skipif(browser() is None, reason="no chromium and no google-chrome on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_clipped_and_no_page_scrolls_sideways(tmp_path, width):
    page = report.Page("A page " + "x" * 60, "with-an-unbreakable-subtitle-" * 5)
    wide = [["the name of a row"] + [f"{i * 12345.678:.3f}" for i in range(25)]]
    rows = [f"row {i}" for i in range(5)]
    names = ["woman in steamy room: medium-dark skin tone", "火鍋火鍋火鍋火鍋火鍋火鍋火鍋", "x" * 40]
    page.section(
        "Wide",
        report.table([f"column {i}" for i in range(26)], wide, "A caption"),
        report.code("y" * 300),
        report.grid(
            Chart("curves:" + "x" * 70, Line("s" * 70, [0, 1e4], [1e-9, 12345.0]), x="an axis", y="another " * 5),
            Chart("Log", Line("s", [1, 99999], [1e-7, 1e9]), x=Axis(scale="log"), y=Axis("y", scale="log")),
            Chart("Odds", Line("s", [1e-9, 0.999], [1e-4, 0.5]), x=Axis(scale="logit"), y=Axis(scale="logit")),
            Chart("Cells", Cells([[float(i)] * 12 for i in range(5)], rows, range(12), 5.0), x="x", y="y"),
        ),
        report.cards(report.card("Bars", Chart("", Bars([(name, -0.1, "−100.0") for name in names])))),
        report.figures([(picture(), "a caption " * 3)] * 9),
    )  # fmt: skip
    (tmp_path / "page.html").write_text(page.html() + MEASURE, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "virtual-time-budget=5000", "window-size=1400,900"]
    found = subprocess.run(
        [browser(), *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    measured = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', found.stdout)[1]))
    assert measured["inner"] == width
    assert measured["scroll"] <= width
    assert measured["drawings"] == 5
    assert measured["clipped"] == []


def test_markdown_and_csv(tmp_path):
    assert report.markdown_table(["a", "b"], [[1, "x"]]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]
    report.write_csv(tmp_path / "t.csv", [{"a": 1 / 3, "b": "x,y"}, {"a": 2, "b": ""}])
    assert (tmp_path / "t.csv").read_text() == 'a,b\n0.333333,"x,y"\n2,\n'


def test_the_page_of_a_run_has_its_curves_and_settings(tmp_path):
    records = [
        {"step": s, "loss": 1 / s, "fvu": 0.5 / s, "fvu_24": 0.9 / s, "dead": 0.0, "val/a": s, "val/b": 2.0,
         "lr": 10.0**-s}
        for s in range(1, 6)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {"lr": 1e-3, "sizes": (1, 2), "nothing": None}
    path = report.write_run_page(tmp_path, "A <run>", settings=settings, following="clipsteer x")
    markup = path.read_text(encoding="utf-8")
    checker = parse(markup)
    assert path == tmp_path / "report.html"
    charts = report.run_charts(records)
    # what never changes has no curve, how it was learnt comes last
    assert [chart.title for chart in charts] == ["loss", "fvu", "val", "lr"]
    assert [len(chart.layers) for chart in charts] == [1, 2, 2, 1]
    assert charts[3].frame.y.scale == "log"
    said = "".join(checker.text)
    for word in ("A <run>", "clipsteer x", "fvu_24: 0.18", "0.001", "1, 2"):
        assert word in said
    assert "nothing" not in said
    (tmp_path / "log.jsonl").unlink()
    assert "Nothing was logged twice" in report.write_run_page(tmp_path, "t").read_text(encoding="utf-8")
