"""One self-contained HTML page: tables, pictures and charts, with no script and nothing fetched.

page.html.j2 holds the markup of every part, style.css the looks, in the reader's light or dark
setting. All that is passed is escaped, but for parts made here, so that text from data sets can be
passed as it is.

    page = Page("Run 7", "ViT-B-32")
    page.section("Loss", Chart("Loss", Line("train", steps, losses), x="step", y="loss"))
    page.write("report.html")
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import itertools
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from clipsteer.io.files import write_atomically
from clipsteer.io.images import as_rgb
from clipsteer.io.names import spoken

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).parent
LINE = 12.0  # from one line of a drawing's words to the next, in letters of 11


class Html(str):
    """A string that is markup already."""

    def __html__(self) -> str:
        return self


@functools.cache
def _macros() -> Any:
    # jinja2 comes with the first part that is made, not with the package
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["lines_of"] = lines_of
    return environment.get_template("page.html.j2").module


def render(macro: str, **values: Any) -> Html:
    """What a macro of the template makes of these values, escaped unless they have ``__html__``."""
    return Html(getattr(_macros(), macro)(**values))


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, in a folder that is made where there is none."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return path


def width_of(words: str) -> float:
    """About as wide as words are in a drawing; letters of CJK scripts and emoji are square."""
    return sum(11.0 if unicodedata.east_asian_width(c) in "WF" else 7.0 for c in words)


def lines_of(words: Any, room: float) -> list[str]:
    """The words of a drawing in lines that are no wider than their room."""
    words = str(words)
    letter = width_of(words) / max(len(words), 1)
    return textwrap.wrap(words, max(int(room / max(letter, 1.0)), 1))


def shortened(words: Any, room: float) -> str:
    """The words of a drawing, cut where their room ends."""
    words = str(words)
    while width_of(words) > room:
        words = words.rstrip("…")[:-1].rstrip() + "…"
    return words


def text(*parts: Any, css: str = "") -> Html:
    """A paragraph; ``css="soft"`` and ``css="note"`` are quieter."""
    return render("text", parts=parts, css=css)


def code(source: str) -> Html:
    """A block of source text."""
    return render("code", source=source)


def stats(items: Sequence[tuple[Any, ...]]) -> Html:
    """Key figures: (label, value) or (label, value, note)."""
    return render("stats", items=items)


def table(
    headers: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    caption: Any = "",
    *,
    words: bool = False,
) -> Html:
    """A table whose first column heads the rows; it scrolls by itself on a narrow screen.

    Cells are set as figures, on the right, or with ``words`` as text, on the left.
    """
    rows = list(rows)
    for row in rows:
        if len(row) != len(headers):
            got = f"{len(row)}: {row!r}"
            raise ValueError(f"table: every row must have {len(headers)} cells, got {got}")
    return render("table", headers=headers, rows=rows, caption=caption, words=words)


def markdown_table(headers: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = (headers, ["---"] * len(headers), *rows)
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys, with a header line."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    # bytes of names that are not UTF-8 are those of the names again
    write_whole(Path(path), lines.getvalue().encode("utf-8", "surrogateescape"))


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * value:.{digits}f}"


def image(picture: Image, alt: str, *, quality: int = 80) -> Html:
    """A PIL image inside the page: WebP where Pillow has it, PNG otherwise."""
    from PIL import features

    buffer = io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        as_rgb(picture).save(buffer, kind, quality=quality)
    else:
        kind = "png"
        as_rgb(picture).save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return render("image", source=f"data:image/{kind};base64,{data}", alt=alt, size=picture.size)


def figures(items: Iterable[tuple[Any, ...]], *, size: str = "5rem") -> Html:
    """A grid of pictures: (picture, caption), or (picture, caption, alt) where alt is another."""
    cells = []
    for picture, caption, *alt in items:
        cells.append((image(picture, alt[0] if alt else caption), caption))
    return render("figures", cells=cells, size=size)


class _Span(NamedTuple):
    """Along one side of a picture: pixels [begin, end), under cells [first, last) of a grid."""

    begin: int
    end: int
    first: float
    last: float


def _span(low: float, high: float, cells: int, pixels: int) -> _Span:
    """What can be seen of cells that reach from ``low`` to ``high``, in shares of the picture."""
    first = max(low, 0.0)
    last = min(high, 1.0)
    if not first < last:
        raise ValueError(
            f"heat_overlay: seen must be left, top, right and bottom of a part of the picture, got "
            f"{low} to {high}"
        )
    begin = min(round(first * pixels), pixels - 1)
    end = max(round(last * pixels), begin + 1)
    share = cells / (high - low)
    return _Span(begin, end, (first - low) * share, min((last - low) * share, cells))


def heat_overlay(
    picture: Image,
    heat: Any,  # (h, w)
    *,
    size: int = 128,
    peak: float | None = None,
    seen: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Image:
    """``picture``, paler, with an orange glow where ``heat``, at least 0, is high.

    Args:
        picture: any size; resized to ``size`` × ``size`` pixels.
        heat: array or tensor over the patch grid; ``peak`` (default its maximum) counts as full.
        seen: left, top, right and bottom of what the grid covers, in shares of the picture, as
            ``clipsteer.clip.seen_box`` gives it. The rest is grey; what lies outside the picture is
            not shown.
    """
    import numpy as np
    from PIL import Image as PILImage

    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"heat_overlay: heat must have shape (h, w), got {values.shape}")
    x = _span(seen[0], seen[2], values.shape[1], size)
    y = _span(seen[1], seen[3], values.shape[0], size)
    full = float(values.max()) if peak is None else float(peak)
    values = np.clip(values / full, 0, 1) if full > 0 else np.zeros_like(values)
    glow = PILImage.fromarray((values * 165).astype(np.uint8))
    part = (x.first, y.first, x.last, y.last)
    glow = glow.resize((x.end - x.begin, y.end - y.begin), PILImage.Resampling.BICUBIC, part)
    mask = PILImage.new("L", (size, size))
    mask.paste(glow, (x.begin, y.begin))
    colour = as_rgb(picture).resize((size, size), PILImage.Resampling.LANCZOS)
    grey = colour.convert("L").convert("RGB")
    shown = PILImage.blend(grey, PILImage.new("RGB", (size, size), (128, 128, 128)), 0.6)
    pale = PILImage.blend(colour, grey, 0.6)
    shown.paste(pale.crop((x.begin, y.begin, x.end, y.end)), (x.begin, y.begin))
    return PILImage.composite(PILImage.new("RGB", (size, size), (255, 110, 0)), shown, mask)


def grid(*charts: Any) -> Html:
    """Charts side by side where there is room."""
    return render("box", css="charts", parts=charts)


def card(heading: Any, *parts: Any) -> Html:
    """A boxed block with a heading; see ``cards``."""
    return render("card", heading=heading, parts=parts)


def cards(*parts: Any) -> Html:
    """Cards side by side where there is room."""
    return render("box", css="cards", parts=parts)


class Page:
    """A page that is built section by section and written once."""

    def __init__(
        self,
        title: str,
        subtitle: Any = "",
        *,
        footer: Any = "",
        language: str = "en",
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.footer = footer
        self.language = language
        self._sections: list[tuple[Any, str, Sequence[Any]]] = []

    def section(self, heading: Any, *parts: Any) -> None:
        """Add a section; parts that are no markup become escaped paragraphs."""
        words = re.sub(r"[^a-z0-9]+", "-", str(heading).lower()).strip("-") or "section"
        taken = {anchor for _, anchor, _ in self._sections}
        numbered = (f"{words}-{i}" for i in itertools.count(2))
        anchor = next(name for name in itertools.chain([words], numbered) if name not in taken)
        self._sections.append((heading, anchor, parts))

    def lead(self, *parts: Any) -> None:
        """Add blocks without a heading, under the title."""
        self._sections.append((None, "", parts))

    def html(self) -> str:
        """The whole page."""
        return render(
            "page",
            title=self.title,
            subtitle=self.subtitle,
            footer=self.footer,
            language=self.language,
            sections=self._sections,
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page whole or not at all."""
        return write_whole(Path(path), spoken(self.html()).encode())
