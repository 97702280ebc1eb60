from __future__ import annotations

import math
import random
import re
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from clipsteer import report
from clipsteer.clip.classifier import ImageClassifier
from clipsteer.ensembles import page as robustness_page
from clipsteer.ensembles import robustness
from clipsteer.ensembles.robustness import (
    Baseline,
    EvalSet,
    averages,
    clopper_pearson,
    curve,
    fit_baseline,
    logit,
    summary,
)


def binomial_tail(k: int, n: int, p: Fraction) -> Fraction:
    """P(X >= k), exactly."""
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))


@given(n=st.integers(1, 60), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_clopper_pearson_inverts_the_binomial(n, share, level):
    """At the lower end P(X >= k) is (1-level)/2, at the upper P(X <= k): the definition, in exact arithmetic."""
    k = round(share * n)
    low, high = clopper_pearson(k, n, level)
    tail = (1 - level) / 2
    assert 0 <= low <= k / n <= high <= 1
    assert (low == 0) == (k == 0)
    assert (high == 1) == (k == n)
    if k:
        assert float(binomial_tail(k, n, Fraction(low))) == pytest.approx(tail, rel=1e-9)
    if k < n:
        assert float(1 - binomial_tail(k + 1, n, Fraction(high))) == pytest.approx(tail, rel=1e-9)


def test_clopper_pearson_against_scipy():
    beta = pytest.importorskip("scipy.stats").beta
    generator = random.Random(0)
    for n in (1, 2, 7, 218, 1000, 50_000):
        for k in {0, n, n // 2, *(generator.randint(0, n) for _ in range(20))}:
            low, high = clopper_pearson(k, n)
            assert low == pytest.approx(0.0 if k == 0 else beta.ppf(0.025, k, n - k + 1), rel=1e-9, abs=1e-12)
            assert high == pytest.approx(1.0 if k == n else beta.ppf(0.975, k + 1, n - k), rel=1e-9)


@pytest.mark.parametrize("args", [(-1, 5), (6, 5), (0, 0), (1, 2, 0.0), (1, 2, 1.0)])
def test_clopper_pearson_refuses(args):
    with pytest.raises(ValueError, match="clopper_pearson"):
        clopper_pearson(*args)


@given(slope=st.floats(0.2, 2), intercept=st.floats(-1, 1), n=st.integers(50, 5000))
def test_the_baseline_finds_a_trend_that_is_there(slope, intercept, n):
    points = []
    for a in (0.1, 0.3, 0.5, 0.8):
        y = 1 / (1 + math.exp(-(slope * logit(a, n) + intercept)))
        points.append((a, n, (y * (n + 1) - 0.5) / n, n))  # so that smoothing gives y back
    fit = fit_baseline(points)
    assert fit.slope == pytest.approx(slope, abs=1e-9)
    assert fit.intercept == pytest.approx(intercept, abs=1e-9)
    assert fit(0.3, n) == pytest.approx((points[1][2] * n + 0.5) / (n + 1))
    assert 0 < fit(0.0, n) < fit(1.0, n) < 1


def test_a_baseline_needs_two_models():
    with pytest.raises(ValueError, match="two models"):
        fit_baseline([(0.5, 10, 0.4, 10), (0.5, 10, 0.3, 10)])


class Tower(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.conv = nn.Linear(3 * 4 * 4, 8)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(8, 48, generator=g))
            self.conv.bias.copy_(torch.randn(8, generator=g))

    def forward(self, x):
        return torch.tanh(self.conv(x.flatten(1)))


def classifier(seed: int, classes: int = 4) -> ImageClassifier:
    return ImageClassifier(Tower(seed), torch.randn(classes, 8, generator=torch.Generator().manual_seed(seed + 50)))


def sets(classes: int = 4) -> list[EvalSet]:
    out = []
    for i, (name, role) in enumerate([("here", "reference"), ("there", "shifted"), ("beyond", "shifted")]):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(30 + i, 3, 4, 4, generator=g), torch.randint(classes - (i == 2), (30 + i,), generator=g)
        out.append(EvalSet(name, role, lambda x=x: x.split(7), y))
    return out


def test_the_curve_against_a_plain_loop():
    zero, tuned, where = classifier(0), classifier(1), sets()
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    alphas = [0.25, 0.5]
    rows = curve(zero.state_dict(), tuned, where, alphas)
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    assert [(r["method"], r["alpha"], r["set"]) for r in rows] == [
        (m, a, s.name) for m in ("weight", "output") for a in (0.0, 0.25, 0.5, 1.0) for s in where
    ]
    for row in rows:
        s, a = next(s for s in where if s.name == row["set"]), row["alpha"]
        x = torch.cat(list(s.batches()))
        with torch.no_grad():
            if row["method"] == "weight":
                theta = {k: (1 - a) * v + a * before[k] for k, v in zero.state_dict().items()}
                logits = torch.func.functional_call(zero, theta, (x,))
            else:
                logits = (1 - a) * zero(x) + a * tuned(x)
        present = sorted(set(s.targets.tolist()))
        guess = torch.tensor(present)[logits[:, present].argmax(1)]
        right = guess == s.targets
        assert row["correct"] == int(right.sum())
        assert row["n"] == len(x)
        assert row["accuracy"] == row["correct"] / row["n"]
        recall = [float(right[s.targets == c].float().mean()) for c in present]
        assert row["balanced"] == pytest.approx(sum(recall) / len(recall))
        assert (row["low"], row["high"]) == clopper_pearson(row["correct"], row["n"])
    with pytest.raises(ValueError, match="reference and shifted"):
        curve(zero.state_dict(), tuned, where[1:])
    with pytest.raises(ValueError, match="do not match"):
        curve(classifier(0, 5).state_dict(), tuned, where)


def rows() -> list[dict]:
    out = []
    for method, lift in (("weight", 0.1), ("output", 0.05)):
        for alpha in (0.0, 0.5, 1.0):
            for name, role, base in (
                ("a", "reference", 0.5 + 0.3 * alpha),
                ("b", "shifted", 0.4),
                ("c", "shifted", 0.2),
            ):
                value = base + lift * (alpha == 0.5)
                out.append(
                    {
                        "method": method,
                        "alpha": alpha,
                        "set": name,
                        "role": role,
                        "correct": round(value * 100),
                        "n": 100,
                        "accuracy": value,
                        "low": value - 0.1,
                        "high": value + 0.1,
                        "balanced": value / 2,
                    }
                )
    return out  # fmt: skip


def test_averages_and_summary():
    first = averages(rows())[0]
    assert first == {
        "method": "weight", "alpha": 0.0, "reference": 0.5, "shifted": pytest.approx(0.3), "reference_n": 100,
        "shifted_n": 200,
    }  # fmt: skip
    baseline = Baseline(1.0, -0.5, 9)
    found = summary(rows(), baseline)
    assert found["weight"]["oracle"]["alpha"] == 0.5
    assert found["weight"]["default"]["shifted"] == pytest.approx(0.4)
    expected = 0.3 - 1 / (1 + math.exp(-(math.log(80.5 / 20.5) - 0.5)))
    assert found["weight"]["finetuned"]["effective_robustness"] == pytest.approx(expected)
    assert summary(rows(), None, "balanced")["output"]["default"]["shifted"] == pytest.approx(0.175)
    assert "effective_robustness" not in summary(rows())["weight"]["default"]


def test_page_chart_and_csv(tmp_path):
    baseline, models = Baseline(0.9, -0.6, 3), [(0.2, 100, 0.15, 200), (0.3, 100, 0.2, 200), (0.0, 100, 0.0, 200)]
    page = robustness_page.write_page(tmp_path / "c.html", rows(), subtitle="<x>", baseline=baseline, models=models)
    text = page.read_text()
    assert "&lt;x&gt;" in text
    assert "oracle α = 0.5" in text
    assert "a bound, not a result" in text
    drawn, _ = robustness_page.curve_charts(rows(), baseline, models)
    chart = str(drawn)
    points = [list(map(float, re.findall(r"[\d.]+", p))) for p in re.findall(r'points="([^"]+)"', chart)]
    assert len(points) == 3  # the trend and two curves
    assert all(46 <= x <= 390 and 10 <= y <= 266 for line in points for x, y in zip(line[::2], line[1::2]))
    assert len(re.findall(r'<circle(?![^>]*class="told")', chart)) == len(models) + 2
    drawn.write(tmp_path / "c.svg")
    import xml.etree.ElementTree as ET

    root = ET.fromstring((tmp_path / "c.svg").read_text())
    assert root.tag.endswith("svg")
    assert "var(" not in (tmp_path / "c.svg").read_text()
    line = [row for row in averages(rows()) if row["method"] == "weight"]
    many = robustness_page.logit_chart({str(i): line for i in range(16)}, title="", x="", y="")
    styles = re.findall(r'<polyline points="[^"]*" (style="[^"]*" stroke-dasharray="[^"]*")', str(many))
    assert len(set(styles)) == 16
    report.write_csv(tmp_path / "c.csv", rows())
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert len(lines) == 19
    assert lines[0].startswith("method,alpha,set,role,correct,n")


def test_the_chart_as_png(tmp_path, monkeypatch, caplog):
    chart, _ = robustness_page.curve_charts(rows())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "resvg_py", None)
        assert chart.write(tmp_path / "c.svg") == [tmp_path / "c.svg"]
    assert "resvg-py" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["c.svg"]
    pytest.importorskip("resvg_py")
    assert chart.write(tmp_path / "c.svg") == [tmp_path / "c.svg", tmp_path / "c.png"]
    picture = Image.open(tmp_path / "c.png").convert("RGB")
    assert picture.width == 1600
    found = {colour: n for n, colour in picture.getcolors(1 << 24)}
    assert found[255, 255, 255] > 0.8 * picture.width * picture.height
    # the two curves in their colours
    assert min(found[0x0B, 0x62, 0xC4], found[0xB9, 0x47, 0x00]) > 1000


def test_alphas_are_the_papers_sweep():
    assert robustness.ALPHAS[0] == 0
    assert robustness.ALPHAS[-1] == 1
    assert len(robustness.ALPHAS) == 21
    assert F.l1_loss(torch.tensor(robustness.ALPHAS), torch.linspace(0, 1, 21)) < 1e-7
