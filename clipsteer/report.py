"""One self-contained HTML page: tables, pictures, curves and bars, with no script and nothing fetched.

Every function returns ``Html``; any other string is escaped, so text from data sets can be passed as it is.
Curves are inline SVG drawn in the page's own colours, which follow the reader's light or dark setting.

    page = Page("Run 7", "ViT-B-32")
    page.section("Loss", line_chart({"train": (steps, losses)}, x_label="step", y_label="loss"))
    page.write("report.html")
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsteer.io.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#d5dae0;--card:#f5f7f9;
--s0:#0b62c4;--s1:#b94700;--s2:#0f7b3f;--s3:#7a3fc2}
@media(prefers-color-scheme:dark){:root{--bg:#12161b;--fg:#e4e8ec;--soft:#9aa5b1;--line:#333c46;--card:#1b2129;
--s0:#6cb2ff;--s1:#ff9f5a;--s2:#5cd08c;--s3:#c39bff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2rem) 4rem}
h1{font-size:clamp(1.5rem,5vw,2.1rem);line-height:1.2;margin:.2em 0}
h2{font-size:1.35rem;margin:2.2em 0 .5em;padding-top:.8em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.4em 0 .4em}
p{max-width:72ch;margin:.5em 0}.soft,figcaption,.note{color:var(--soft)}
.note{font-size:.9rem}
.scroll{overflow-x:auto;margin:.8em 0 .3em}.scroll+.note{margin:0 0 1em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:.35em .9em .35em 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:middle}
th:first-child,td:first-child,.words th,.words td{text-align:left}tbody th{min-width:7.5rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}tbody th{font-weight:500}
.stats{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem;margin:1em 0}
.stats div{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.stats dt{color:var(--soft);font-size:.85rem}.stats dd{margin:0;font-size:1.35rem;font-weight:600}
.stats dd+dd{font-size:.8rem;font-weight:400;color:var(--soft)}
.charts,.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem 1.4rem;
margin:1em 0}.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
.card{background:var(--card);border-radius:.6rem;padding:.8rem 1rem 1rem;min-width:0}
.card h3{margin:.1em 0 .3em;overflow-wrap:anywhere}
.grid{display:flex;flex-wrap:wrap;gap:.5rem;margin:.6em 0}
.grid figure{margin:0;width:var(--size)}.grid figcaption{font-size:.76rem;line-height:1.25;overflow-wrap:anywhere}
img{display:block;max-width:100%;height:auto;border-radius:.3rem}
.grid img{width:100%}
.chart{margin:0}.chart svg{display:block;width:100%;height:auto}
.chart figcaption{font-size:.9rem;color:var(--fg);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;list-style:none;margin:0;padding:0;font-size:.8rem;color:var(--soft)}
.legend svg{display:inline-block;width:1.6rem;height:.7rem;margin-right:.35rem}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg .rule{stroke:var(--line);stroke-width:1}
.bars{list-style:none;margin:.4em 0;padding:0;font-size:.85rem}
.bars li{display:grid;grid-template-columns:minmax(5rem,9rem) 1fr 3.6rem;gap:.6rem;align-items:center;padding:.12em 0}
.bars .name{overflow-wrap:anywhere;line-height:1.2}.bars .value{text-align:right;font-variant-numeric:tabular-nums}
.track{position:relative;height:.8rem;background:var(--line);border-radius:.2rem;overflow:hidden}
.track i{position:absolute;top:0;bottom:0;background:var(--s0)}.track i.down{background:var(--s1)}
pre{background:var(--card);padding:.7rem 1rem;border-radius:.5rem;overflow-x:auto;font-size:.88rem}
code{font-family:ui-monospace,SFMono-Regular,Consolas,monospace}
a{color:var(--s0)}footer{margin-top:3em;font-size:.85rem;color:var(--soft)}
"""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


class Html(str):
    """A string that is markup already."""


def escape(value: Any) -> Html:
    """``value`` as markup: ``Html`` unchanged, anything else as escaped text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def _join(parts: Iterable[Any]) -> Html:
    return Html("".join(escape(p) for p in parts))


def text(*parts: Any, css: str = "") -> Html:
    """A paragraph; ``css="soft"`` and ``css="note"`` are quieter."""
    return Html(f'<p class="{escape(css)}">{_join(parts)}</p>' if css else f"<p>{_join(parts)}</p>")


def code(source: str) -> Html:
    """A block of source text."""
    return Html(f"<pre><code>{escape(source)}</code></pre>")


def stats(items: Sequence[tuple[str, Any] | tuple[str, Any, Any]]) -> Html:
    """Key figures: (label, value) or (label, value, note)."""
    cells = []
    for label, value, *note in items:
        extra = f"<dd>{escape(note[0])}</dd>" if note else ""
        cells.append(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd>{extra}</div>")
    return Html(f'<dl class="stats">{"".join(cells)}</dl>')


def table(headers: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = "", *, words: bool = False) -> Html:
    """A table whose first column heads the rows; it scrolls by itself on a narrow screen.

    Cells are set as figures, on the right, or with ``words`` as text, on the left.
    """
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headers)
    body = []
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"table: every row must have {len(headers)} cells, got {len(row)}: {row!r}")
        first, *rest = row
        cells = "".join(f"<td>{escape(c)}</td>" for c in rest)
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    # below the scrolling box, so that a long caption is not cut where the table is
    kind = ' class="words"' if words else ""
    under = text(caption, css="note") if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{under}"
    )


def markdown_table(headers: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (headers, ["---"] * len(headers), *rows)]


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys, with a header line."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(path, lambda file: file.write(lines.getvalue().encode()))


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def image(picture: Image, alt: str, *, quality: int = 80) -> Html:
    """A PIL image inside the page: WebP where Pillow has it, PNG otherwise."""
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, **({"quality": quality} if kind == "webp" else {}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    w, h = picture.size
    return Html(f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{w}" height="{h}">')


def figures(items: Iterable[tuple[Image, str]] | Iterable[tuple[Image, str, str]], *, size: str = "5rem") -> Html:
    """A grid of pictures: (picture, caption) or (picture, caption, alt); the caption is the default alt."""
    cells = []
    for picture, caption, *alt in items:
        under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        cells.append(f"<figure>{image(picture, alt[0] if alt else caption)}{under}</figure>")
    return Html(f'<div class="grid" style="--size:{escape(size)}">{"".join(cells)}</div>')


def heat_overlay(picture: Image, heat: Any, *, size: int = 128, peak: float | None = None) -> Image:
    """``picture``, paler, with an orange glow where ``heat`` (h, w), at least 0, is high.

    Args:
        picture: any size; resized to ``size`` × ``size`` pixels.
        heat: array or tensor over the patch grid; ``peak`` (default its maximum) counts as full.
    """
    import numpy as np
    from PIL import Image as PILImage

    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"heat_overlay: heat must have shape (h, w), got {values.shape}")
    top = float(values.max()) if peak is None else float(peak)
    values = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    mask = PILImage.fromarray((values * 165).astype(np.uint8)).resize((size, size), PILImage.Resampling.BICUBIC)
    colour = picture.convert("RGB").resize((size, size), PILImage.Resampling.LANCZOS)
    pale = PILImage.blend(colour, colour.convert("L").convert("RGB"), 0.6)
    return PILImage.composite(PILImage.new("RGB", (size, size), (255, 110, 0)), pale, mask)


def bars(items: Sequence[tuple[Any, float] | tuple[Any, float, str]], *, limit: float | None = None) -> Html:
    """Horizontal bars: (name, value) or (name, value, shown text). With a negative value the zero is in the middle."""
    values = [float(item[1]) for item in items]
    top = limit or max((abs(v) for v in values if math.isfinite(v)), default=0.0) or 1.0
    signed = any(v < 0 for v in values)
    rows = []
    for (name, _, *shown), v in zip(items, values):
        share = min(abs(v) / top, 1.0) * (50 if signed else 100) if math.isfinite(v) else 0.0
        left = (50 - share if v < 0 else 50) if signed else 0
        bar = f'<i class="{"down" if v < 0 else "up"}" style="left:{left:.1f}%;width:{share:.1f}%"></i>'
        label = shown[0] if shown else f"{v:.3g}"
        rows.append(
            f'<li><span class="name">{escape(name)}</span><span class="track" aria-hidden="true">{bar}</span>'
            f'<span class="value">{escape(label)}</span></li>'
        )
    return Html(f'<ul class="bars">{"".join(rows)}</ul>')


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values inside [low, high], at least one."""
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x_label: str = "", y_label: str = "",
    y_from: float | None = None, y_to: float | None = None, x_ticks: Sequence[float] | None = None,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Html:  # fmt: skip
    """Curves over a common axis: name -> (xs, ys). Points that are not finite are left out.

    The lines differ in colour and in dash; ends of the axes can be fixed with ``y_from`` and ``y_to``. ``bands`` shades
    the room between two values at each x, name -> (lows, highs).
    """
    points = {
        name: [(float(x), float(y)) for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)]
        for name, (xs, ys) in series.items()
    }
    shaded = {
        name: [(float(x), float(a), float(b)) for x, a, b in zip(series[name][0], *ends) if math.isfinite(x + a + b)]
        for name, ends in (bands or {}).items()
    }
    everything = [p for line in points.values() for p in line]
    if not everything:
        caption = f"<figcaption>{escape(title)}</figcaption>"
        return Html(f'<figure class="chart">{caption}<p class="note">no data</p></figure>')
    x0, x1 = min(p[0] for p in everything), max(p[0] for p in everything)
    heights = [p[1] for p in everything] + [y for band in shaded.values() for p in band for y in p[1:]]
    y0 = min(heights) if y_from is None else y_from
    y1 = max(heights) if y_to is None else y_to
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + (abs(y0) or 1))
    w, h, left, right, top, bottom = 400, 220, 46, 10, 10, 34
    px = lambda x: left + (x - x0) / (x1 - x0) * (w - left - right)
    py = lambda y: h - bottom - (min(max(y, y0), y1) - y0) / (y1 - y0) * (h - top - bottom)
    out = []
    for y in _ticks(y0, y1):
        out.append(f'<line class="rule" x1="{left}" x2="{w - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text x="{left - 5}" y="{py(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(x0, x1) if x_ticks is None else [x for x in x_ticks if x0 <= x <= x1]:
        out.append(f'<text x="{px(x):.1f}" y="{h - bottom + 15}" text-anchor="middle">{_number(x)}</text>')
    if x_label:
        out.append(f'<text x="{(left + w - right) / 2}" y="{h - 3}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    for i, name in enumerate(points):
        if len(band := shaded.get(name, [])) > 1:
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in edge)
            out.append(f'<polygon points="{path}" style="fill:var(--s{i % 4})" fill-opacity="0.13"/>')
    for i, (name, line) in enumerate(points.items()):
        dashes = _DASHES[(i + i // 4) % 4]  # every pair with a colour once, before one comes again
        style = f'style="stroke:var(--s{i % 4})" stroke-dasharray="{dashes}" fill="none" stroke-width="2"'
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        out.append(f'<polyline points="{path}" {style} stroke-linejoin="round"/>')
        if len(line) == 1:
            x, y = line[0]
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" style="fill:var(--s{i % 4})"/>')
        last = f"{escape(name)}: {_number(line[-1][1])}" if line else f"{escape(name)}: no data"
        swatch = f'<svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" {style}/></svg>'
        legend.append(f"<li>{swatch}{last}</li>")
    spoken = f"{title}: {y_label or 'value'} against {x_label or 'x'}, from {_number(y0)} to {_number(y1)}"
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{escape(spoken)}">{"".join(out)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def heat_map(
    values: Sequence[Sequence[float]], *, title: str, x_label: str = "", y_label: str = "",
    columns: Sequence[Any], rows: Sequence[Any], peak: float, show: Callable[[float], str] = _number,
) -> Html:  # fmt: skip
    """A matrix as shaded cells, the darker the nearer to ``peak``, with its figures where they fit; NaN stays empty."""
    w, left, right, top, bottom = 400, 46, 10, 20, 32
    wide = (w - left - right) / len(columns)
    high = min(34.0, wide)
    h = top + high * len(rows) + bottom
    out = []
    for r, (name, line) in enumerate(zip(rows, values)):
        y = top + high * r
        out.append(f'<text x="{left - 5}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for c, v in enumerate(line):
            if not math.isfinite(v):
                continue
            x, share = left + wide * c, min(max(v / peak, 0.0), 1.0) if peak > 0 else 0.0
            # half the colour at most, so that the figure on it can be read
            out.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2:.1f}" rx="2" '
                f'style="fill:var(--s0);stroke:var(--line)" fill-opacity="{0.5 * share:.3f}"><title>{escape(rows[r])}, '
                f"{escape(columns[c])}: {escape(show(v))}</title></rect>"
            )
            if wide >= 7 * len(show(v)):
                out.append(
                    f'<text x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}" text-anchor="middle" '
                    f'style="fill:var(--fg);pointer-events:none">{escape(show(v))}</text>'
                )
    every = math.ceil(len(columns) / 12)
    for c in range(0, len(columns), every):
        x = left + wide * (c + 0.5)
        out.append(f'<text x="{x:.1f}" y="{h - bottom + 13:.1f}" text-anchor="middle">{escape(columns[c])}</text>')
    out.append(f'<text x="{(left + w - right) / 2}" y="{h - 4:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    out.append(f'<text x="{left}" y="{top - 7}">{escape(y_label)}</text>')
    spoken = f"{title}: {len(rows)} × {len(columns)}"
    return Html(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {w} {h:.1f}" role="img" '
        f'aria-label="{escape(spoken)}">{"".join(out)}</svg></figure>'
    )


def charts(*parts: Any) -> Html:
    """Charts side by side where there is room."""
    return Html(f'<div class="charts">{_join(parts)}</div>')


def card(heading: Any, *parts: Any) -> Html:
    """A boxed block with a heading; see ``cards``."""
    return Html(f'<article class="card"><h3>{escape(heading)}</h3>{_join(parts)}</article>')


def cards(*parts: Any) -> Html:
    """Cards side by side where there is room."""
    return Html(f'<div class="cards">{_join(parts)}</div>')


class Page:
    """A page that is built section by section and written once."""

    def __init__(self, title: str, subtitle: Any = "", *, footer: Any = "", language: str = "en") -> None:
        self.title, self.subtitle, self.footer, self.language = title, subtitle, footer, language
        self._sections: list[Html] = []

    def section(self, heading: Any, *parts: Any) -> None:
        """Add a section; parts that are not ``Html`` become escaped paragraphs."""
        inner = _join(p if isinstance(p, Html) else text(p) for p in parts)
        self._sections.append(Html(f"<section><h2>{escape(heading)}</h2>{inner}</section>"))

    def lead(self, *parts: Any) -> None:
        """Add blocks without a heading, under the title."""
        self._sections.append(_join(p if isinstance(p, Html) else text(p) for p in parts))

    def html(self) -> str:
        subtitle = f'<p class="soft">{escape(self.subtitle)}</p>' if self.subtitle else ""
        footer = f"<footer>{escape(self.footer)}</footer>" if self.footer else ""
        return (
            f'<!doctype html>\n<html lang="{escape(self.language)}"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(self.title)}</title>'
            f"<style>{_STYLE}</style></head>\n<body><main><h1>{escape(self.title)}</h1>{subtitle}\n"
            + "\n".join(self._sections)
            + f"{footer}</main></body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = self.html().encode("utf-8")
        write_atomically(target, lambda file: file.write(data))
        return target
