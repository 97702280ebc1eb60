"""Pages and charts for people: parts of a page, one chart object, intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipsteer import _lazy

if TYPE_CHECKING:
    from clipsteer.report.axes import Axis as Axis
    from clipsteer.report.axes import logit as logit
    from clipsteer.report.axes import number as number
    from clipsteer.report.axes import sigmoid as sigmoid
    from clipsteer.report.charts import Chart as Chart
    from clipsteer.report.layers import Bars as Bars
    from clipsteer.report.layers import Cells as Cells
    from clipsteer.report.layers import Dots as Dots
    from clipsteer.report.layers import Layer as Layer
    from clipsteer.report.layers import Line as Line
    from clipsteer.report.layers import Trend as Trend
    from clipsteer.report.page import Html as Html
    from clipsteer.report.page import Page as Page
    from clipsteer.report.page import card as card
    from clipsteer.report.page import cards as cards
    from clipsteer.report.page import code as code
    from clipsteer.report.page import figures as figures
    from clipsteer.report.page import grid as grid
    from clipsteer.report.page import heat_overlay as heat_overlay
    from clipsteer.report.page import image as image
    from clipsteer.report.page import markdown_table as markdown_table
    from clipsteer.report.page import percent as percent
    from clipsteer.report.page import stats as stats
    from clipsteer.report.page import table as table
    from clipsteer.report.page import text as text
    from clipsteer.report.page import write_csv as write_csv
    from clipsteer.report.runs import run_charts as run_charts
    from clipsteer.report.runs import write_run_page as write_run_page

# names from before the wings
if TYPE_CHECKING:
    from markupsafe import escape as escape

__getattr__, __dir__, __all__ = _lazy.attach(__name__, __file__)
