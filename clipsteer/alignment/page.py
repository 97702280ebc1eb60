"""The comparison for people: the matrix of layers, matches side by side, and what is unique."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsteer.alignment.compare import Compared, Layer
from clipsteer.alignment.measure import Match, neighbours_agree_most
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Cells
from clipsteer.report.page import Html, Page, card, cards, figures, grid, stats, table, text
from clipsteer.sae.metrics.estimate import Estimate

_SHOWN = 12  # concepts of a list
_SIDE = 96  # pixels


def short_names(layers: Sequence[Layer]) -> list[str]:
    """What tells the layers of one model apart: the end of their names."""
    parts = [layer.name.split(".") for layer in layers]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def heat_map(compared: Compared, rows: str, columns: str, *, above_chance: bool = False) -> Chart:
    """GRI of every layer of one model with every layer of another, or how far it is above
    chance."""
    values = []
    for line in compared.matrix(rows, columns):
        values.append([e.details["above_chance"] if above_chance else e.value for e in line])
    # the differences are small beside 1: colours begin at the smallest
    low = min((value for line in values for value in line if value < 1), default=0.0)
    size = (1 - low) or 1.0
    shaded = [[(value - low) / size for value in line] for line in values]
    cells = Cells(
        shaded,
        short_names(compared.of(rows)),
        short_names(compared.of(columns)),
        peak=1.0,
        show=lambda share: f"{low + share * size:.3f}".removeprefix("0"),
    )
    title = "Generalised Rand index" + ", above chance" * above_chance
    where = f"layers of {rows}"
    if rows != columns:
        where += f" (rows) and {columns}"
    return Chart(f"{title}: {where}", cells)


def spread_of(found: Estimate) -> str:
    """A value with its interval."""
    if not math.isfinite(found.low):
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} – {found.high:.3f})"


class _Pictures:
    """Thumbnails of a concept's top images, each read once."""

    def __init__(self, compared: Compared, dataset: Any) -> None:
        self.compared = compared
        self.dataset = dataset
        self._read: dict[int, Any] = {}

    def __call__(self, layer: Layer, concept: int) -> Html:
        count = self.compared.config.pictures
        shown = []
        for number in self.compared.top_images(layer, concept, count):
            if number not in self._read:
                picture = self.dataset[number][0].copy()
                picture.thumbnail((_SIDE, _SIDE))
                self._read[number] = picture
            shown.append((self._read[number], "", f"image {number}"))
        return figures(shown, size="3.5rem")

    def match(self, a: Layer, b: Layer, match: Match) -> Html:
        """Both concepts of a match, one above the other."""
        name_a = self.compared.proximity[a].names[match.a]
        name_b = self.compared.proximity[b].names[match.b]
        return card(
            f"{name_a} · {name_b}",
            text(f"relative distance {spread_of(match.relative)}", css="soft"),
            text(str(a), css="note"),
            self(a, match.a),
            text(str(b), css="note"),
            self(b, match.b),
        )

    def alone(self, layer: Layer, concept: int, match: Match) -> Html:
        """A concept that the other layer has not."""
        return card(
            self.compared.proximity[layer].names[concept],
            text(f"nearest in the other layer: {spread_of(match.relative)}", css="soft"),
            self(layer, concept),
        )


def write_page(path: str | Path, compared: Compared, dataset: Any) -> Path:
    """Write the page of a comparison, with pictures of the data set that it was made on."""
    names = compared.models
    title = " and ".join(f"{label}: {name}" for label, name in names.items())
    page = Page("Concepts of two models" if "B" in names else "Concepts of layers", title)
    page.lead(_figures(compared))
    pairs = [("A", "B"), ("A", "A"), ("B", "B")] if "B" in names else [("A", "A")]
    charts = []
    for rows, columns in pairs:
        charts += [heat_map(compared, rows, columns, above_chance=above) for above in (False, True)]
    page.section("Layers", grid(*charts), _layers(compared))
    pictures = _Pictures(compared, dataset)
    for a, b in compared.matchings:
        _matching(page, compared, pictures, a, b)
    return page.write(path)


def _figures(compared: Compared) -> Html:
    found: list[tuple[Any, ...]] = [
        ("images", f"{int(compared.images.max()) + 1:,}"),
        ("rows of a layer", f"{len(compared.images):,}"),
        ("concepts", compared.config.score),
    ]
    for model in compared.models:
        own = [[e.value for e in line] for line in compared.matrix(model)]
        if len(own) > 2:
            share = neighbours_agree_most(own)
            found.append((f"{model}: a neighbour agrees most", f"{100 * share:.0f} % of layers"))
    return stats(found)


def _layers(compared: Compared) -> Html:
    rows = []
    for (a, b), found in compared.agreements.items():
        above = found.details["above_chance"]
        chance = found.details["chance"]
        rows.append([f"{a} – {b}", spread_of(found), f"{chance:.3f}", f"{above:.3f}"])
    rows.sort(key=lambda row: float(row[3]), reverse=True)
    caption = (
        "The pairs of layers that agree most. Chance: the same rows, paired at random. Above it: "
        "(index - chance) / (1 - chance). Intervals: 95 %, jackknife over images."
    )
    headers = ["layers", "generalised Rand index", "chance", "above it"]
    return table(headers, rows[: 2 * _SHOWN], caption)


def _matching(page: Page, compared: Compared, pictures: _Pictures, a: Layer, b: Layer) -> None:
    found = compared.matchings[a, b]
    bound = compared.config.universal
    shared = found.universal(bound)
    alone = [(a, m.a, m) for m in found.unique_a(bound)[:_SHOWN]]
    alone += [(b, m.b, m) for m in found.unique_b(bound)[:_SHOWN]]
    counts = (
        f"{len(found.matches)} concepts matched, {len(shared)} of them universal (relative "
        f"distance below {bound:g}, interval and all); unique: {len(found.unique_a(bound))} of "
        f"{a}, {len(found.unique_b(bound))} of {b}."
    )
    parts: list[Any] = [text(counts)]
    if found.matches:
        best = [pictures.match(a, b, match) for match in found.matches[:_SHOWN]]
        parts += [text("The nearest matches"), cards(*best)]
    for layer in (a, b):
        own = [pictures.alone(layer, k, m) for where, k, m in alone if where == layer]
        if own:
            parts += [text(f"Unique to {layer}"), cards(*own)]
    page.section(f"{a} and {b}", *parts)
