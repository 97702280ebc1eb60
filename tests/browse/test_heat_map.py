"""The heat map of a grid in a real browser: what is red can be told without an eye for colours, and figures can be
read."""

from __future__ import annotations

import json
import re

import pytest

from clipsteer.cli.bench import grid_page

OPS = ("topk_encode", "mahalanobis_covariance_loss_low_rank", "generalised_rand_index_sparse")
FACTS = {"chip": "Abacus", "torch": "2.14.1", "date": "2026-11-30", "threads": 1}


def records():
    for n, op in enumerate(OPS):
        for m, rows in enumerate((1, 8, 32, 256, 4096)):
            for kind in ("forward", "forward+backward"):
                ratio = (0.05, 0.97, 1.0, 4.5, 211.0)[(n + m) % 5]
                yield {"op": op, "shape": f"B{rows}", "dtype": "bfloat16", "rows": rows, "threads": 1, "pass": kind,
                       "contender": "clipsteer", "baseline": "torch.compile", "seconds": 0.01, "speedup": ratio,
                       "speedup_low": 0.9 * ratio, "speedup_high": 1.05 * ratio}  # fmt: skip


def luminance(colour):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def numbers(colour):
    return tuple(float(v) for v in re.findall(r"[\d.]+", colour)[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_red_cells_are_framed_and_their_figures_stand_out(browser, axe, tmp_path, scheme):
    path = grid_page(FACTS, list(records())).write(tmp_path / "grid.html")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri())
    found = page.evaluate("""() => {
      const colour = (name) => { const e = document.createElement("i");
        e.style.color = `var(--${name})`; document.body.append(e); return getComputedStyle(e).color; };
      const ground = getComputedStyle(document.body).backgroundColor;
      const cells = [...document.querySelectorAll("rect")].map((e) => { const s = getComputedStyle(e);
        return {name: e.textContent, fill: s.fill, opacity: +s.fillOpacity, edge: s.stroke,
                box: e.getBoundingClientRect().toJSON()}; });
      const words = [...document.querySelectorAll("svg tspan")].map((e) => ({text: e.textContent,
        box: e.getBoundingClientRect().toJSON(), ink: getComputedStyle(e).fill}));
      return {cells, words, ground, fg: colour("fg"), line: colour("line")};
    }""")
    assert len(found["cells"]) == 2 * 3 * 5
    for cell in found["cells"]:
        ratio = float(cell["name"].rpartition(" ")[2])
        below = ratio < 1
        # the frame tells it, and stands out from the ground
        assert (cell["edge"] == found["fg"]) == below
        assert cell["edge"] == (found["fg"] if below else found["line"])
        assert contrast(numbers(found["fg"]), numbers(found["ground"])) > 7
        red, green, _ = numbers(cell["fill"])
        assert (red > green) == below
        inside = [
            word for word in found["words"]
            if word["text"] == cell["name"].rpartition(" ")[2]
            and cell["box"]["x"] <= word["box"]["x"] and word["box"]["right"] <= cell["box"]["right"]
            and cell["box"]["y"] <= word["box"]["y"] and word["box"]["bottom"] <= cell["box"]["bottom"]
        ]  # fmt: skip
        assert len(inside) == 1, cell["name"]
        # no name of a row reaches into the next
        names = [word for word in found["words"] if word["box"]["right"] < cell["box"]["x"]
                 and abs(word["box"]["x"] - cell["box"]["x"]) < 400
                 and word["box"]["bottom"] > cell["box"]["y"] and word["box"]["y"] < cell["box"]["bottom"]]  # fmt: skip
        said = " ".join(word["text"] for word in names if not re.fullmatch(r"[\d.]+", word["text"]))
        assert said == cell["name"].partition(",")[0]
        share = cell["opacity"]
        blend = [share * a + (1 - share) * b for a, b in zip(numbers(cell["fill"]), numbers(found["ground"]))]
        assert contrast(blend, numbers(inside[0]["ink"])) >= 4.5
    page.evaluate(axe)
    audit = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert [(v["id"], json.dumps(v["nodes"])[:200]) for v in audit["violations"]] == []
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
    assert wrong == []
