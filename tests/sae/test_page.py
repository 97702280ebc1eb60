"""The page of an SAE's evaluation says what the figures say."""

from __future__ import annotations

import re

from clipsteer.sae.page import evaluation_page

FIGURES = {
    "hook_point": "visual.transformer.resblocks.4", "images": 64, "tokens": 1088, "ev": 0.8943, "fvu": 0.1057,
    "l0": 15.5, "dead": 0.187, "l0_map": [[16.0, 15.0], [15.5, 15.5]],
    "top1_clean": 0.5, "top1_sae": 0.375, "top1_zero": 0.125, "ce_clean": 1.5, "ce_sae": 2.5, "ce_zero": 9.25,
}  # fmt: skip
METRICS = {
    "definition": "clipsteer",
    "fvu": {"value": 0.1, "low": 0.05, "high": 0.25, "scored": 1088, "unit": "tokens", "details": {}},
    "probing": {"value": None, "low": None, "high": None, "scored": 0, "unit": "images",
                "details": {"why": "no class has two images"}},
}  # fmt: skip


def page(**more):
    return evaluation_page("What <it> keeps", "model on images", {**FIGURES, **more}).html()


def test_every_figure_is_there_and_what_was_not_measured_is_not():
    markup = page()
    for said in ("0.8943", "0.1057", "15.5", "18.7 %", "1088 tokens of 64 images", "What &lt;it&gt; keeps"):
        assert said in markup
    described = re.findall(r"<desc>([^<]*)</desc>", markup)
    assert described == [
        "as it is: 50.0; through the SAE: 37.5; zeros instead: 12.5",
        "as it is: 1.5; through the SAE: 2.5; zeros instead: 9.25",
        "2 × 2",
    ]
    for heading in ("worth", "steer", "words"):
        assert heading not in "".join(re.findall(r"<h2[^>]*>([^<]*)", markup))
    # a map of one number says nothing
    assert "2 × 2" not in page(l0_map=[[16.0, 16.0], [16.0, 16.0]])


def test_metrics_steering_and_names():
    best = [{"feature": 7, "score": 0.25, "power": 0.5, "concept": "cat"}]
    names = [{"feature": 3, "peak": 12.5, "frequency": 0.01, "names": [["dog", 0.5], ["cow", 0.25]]}]
    found = {"strength": 50.0, "features": 20, "share": 0.05, "best": best}
    markup = page(metrics=METRICS, steerability=found, names=names)
    assert "0.0500 to 0.2500" in markup
    assert "no class has two images" in markup
    assert "5.0 % of the first 20 features" in markup
    assert "7 → cat: 0.25" in markup
    assert "dog 0.50, cow 0.25" in markup
    # one bar has an interval
    assert markup.count('fill:var(--fg);stroke:var(--line)"') == 1
