"""Pages and charts for people: parts of a page, one chart object, intervals."""

from clipsteer.report.axes import Axis, logit, number, sigmoid
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Bars, Cells, Dots, Layer, Line, Trend
from clipsteer.report.page import (
    Html,
    Page,
    card,
    cards,
    code,
    figures,
    grid,
    heat_overlay,
    image,
    markdown_table,
    percent,
    stats,
    table,
    text,
    write_csv,
)

__all__ = [
    "Axis",
    "Bars",
    "Cells",
    "Chart",
    "Dots",
    "Html",
    "Layer",
    "Line",
    "Page",
    "Trend",
    "card",
    "cards",
    "code",
    "figures",
    "grid",
    "heat_overlay",
    "image",
    "logit",
    "markdown_table",
    "number",
    "percent",
    "sigmoid",
    "stats",
    "table",
    "text",
    "write_csv",
]
