"""The demo's curves of training with a reference model: drawn from committed results, not measured
by the demo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipsteer import assets
from clipsteer.io.files import read_json
from clipsteer.report.axes import Axis
from clipsteer.report.charts import Chart
from clipsteer.report.layers import Line
from clipsteer.report.page import Html, code, grid, text

# means over seeds that benchmarks/reference_model wrote
PLACE = assets.EMOJI / "reference_model.json"
SHOWN = ("R@1, held-out style, seen concepts", "R@1, trained styles, new concepts")


def chart(means: Mapping[str, Any], title: str) -> Chart:
    """One metric in % against the number of samples seen, a line a method."""
    metric = means["metrics"][title]
    lines = [
        Line(name, means["samples"], [100 * v for v in values]) for name, values in metric.items()
    ]
    return Chart(title, *lines, x="samples seen", y=Axis("%", low=0))


def section() -> list[Html]:
    """The section's parts."""
    means = read_json(PLACE)
    seeds = len(means["seeds"])
    return [
        text(
            "A frozen reference model can say which pairs are worth learning: DRRho-CLIP (Wei et "
            "al. 2025) pushes a model only where it is further from right than the reference, so "
            "that captions that fit many images weigh less. The curves show a model a fifth of "
            "EmojiCLIP's size, trained from scratch on drawings with noisy captions. Here the "
            "reference's weights do not help; learning its features (distillation) does."
        ),
        text(
            "These curves were not measured for this page: they are committed results, means over "
            f"{seeds} seeds of {means['date']}. How they were made, what can be told apart and "
            "what not: benchmarks/results/reference_model.md in the repository."
        ),
        grid(*(chart(means, title) for title in SHOWN)),
        text("The same for your own pairs:"),
        code(
            "clipsteer train --data pairs.csv --model ViT-B-32 --reference ViT-B-16 \\\n"
            "    --reference-pretrained laion2b_s34b_b88k --out runs/b32"
        ),
    ]
