"""The evaluation of ``benchmarks.conceptors.experiment`` as text, Markdown and an HTML page. Accuracies in per cent."""

from __future__ import annotations

from statistics import mean
from typing import Any

from clipsteer import report

_TITLES = {
    "held_out": "Naming Twemoji drawings among all labels, every drawing steered alike",
    "within_category": "The same within the category, which is given; every drawing steered by its own category",
}
_COMPOSED = "Steering Twemoji drawings towards a category in a trained style"


def _share(value: dict[str, float]) -> str:
    # no-break spaces keep a figure in one piece
    return f"{100 * value['mean']:.1f}\u00a0±\u00a0{100 * value['sd']:.1f}"


def _chosen(chosen: list[dict[str, Any]]) -> str:
    """Block, aperture and β of each seed."""
    return "; ".join(
        f"{c['block']}" + ("" if c["aperture"] is None else f", {c['aperture']:g}") + f", {c['beta']:g}" for c in chosen
    )


def _steered(result: dict[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    found = result[name]
    clean = found["unsteered"]
    rows = [["unsteered", _share(clean["validation"]), _share(clean["test"]), "", "", _share(clean["unseen"]), ""]]
    order = sorted(found["methods"].items(), key=lambda item: -item[1]["validation"]["mean"])
    for method, m in order:
        moved = f"{sum(c['gained'] for c in m['chosen'])} / {sum(c['lost'] for c in m['chosen'])}"
        gain = ("+" if m["gain"]["mean"] >= 0 else "") + _share(m["gain"])
        shares = [_share(m["validation"]), _share(m["test"]), gain, moved, _share(m["unseen"])]
        rows.append([method, *shares, _chosen(m["chosen"])])
    headers = ["method", "validation", "test", "gain on test", "gained / lost", "unseen concepts", "block, aperture, β"]
    return headers, rows


def _composed(result: dict[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    found = result["composition"]
    parts = ("target", "category", "style", "variance")
    rows = [["unsteered", *(_share(found["unsteered"][p]) for p in parts), ""]]
    for method, m in sorted(found[kind].items(), key=lambda item: -item[1]["target"]["mean"]):
        rows.append([method, *(_share(m[p]) for p in parts), _chosen(m["chosen"])])
    return ["method", "target", "its category", "its style", "variance left", "block, aperture, β"], rows


def _closeness(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = ("AND_similarity", "AND_distance", "OR_similarity", "OR_distance")
    rows = [[f"{r['aperture']:g}", *(f"{r[n]:.3f}" for n in names)] for r in result["composition"]["closeness"]]
    return ["relative aperture", *(n.replace("_", ", ") for n in names)], rows


def _evidence(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    runs = result["evidence"]
    rows = []
    for block in range(len(runs[0])):
        cells = []
        for what in ("style", "category"):
            cells += [
                f"{100 * mean(run[block][what][key] for run in runs):.1f}" for key in ("accuracy", "nearest_mean")
            ]
            quota = [q for run in runs for q in run[block][what]["quota"].values()]
            cells.append(f"{min(quota):.2f}–{max(quota):.2f}")
        rows.append([str(block), *cells])
    columns = ("{} by conceptor", "{} by nearest mean", "quotas")
    return ["block", *(c.format(w) for w in ("style", "category") for c in columns)], rows


def _tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    return [
        *((title, *_steered(result, name)) for name, title in _TITLES.items()),
        (_COMPOSED, *_composed(result, "methods")),
        (f"{_COMPOSED}, at least half of the variance left", *_composed(result, "gentle")),
        ("How near AND and OR come to the conceptor fitted to the common drawings", *_closeness(result)),
        ("Telling styles and categories apart by conceptors, at each block", *_evidence(result)),
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """Markdown tables."""
    out = []
    for title, headers, rows in _tables(result):
        out += [f"### {title}", *report.markdown_table(headers, rows), ""]
    return out[:-1]


def page(result: dict[str, Any]) -> report.Page:
    """Tables, and validation accuracy against the aperture at each method's best block."""
    made = report.Page(
        "Conceptors on EmojiStyles", f"{result.get('model', '')}, {result['seeds']} splits of the concepts"
    )
    made.lead(
        "Choices are made on validation concepts and reported on test concepts; ± is the deviation over splits. "
        "“Gained / lost”: test drawings named rightly only with, and only without steering, over all splits."
    )
    for title, headers, rows in _tables(result):
        made.section(title, report.table(headers, rows))
    for name, title in _TITLES.items():
        curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for method, block, x, value in result[name]["validation_grid"]:
            curves.setdefault(method, {}).setdefault(block, []).append((x, value))
        drawn = []
        base = 100 * result[name]["unsteered"]["validation"]["mean"]
        for method, blocks in curves.items():
            if "conceptor" not in method:
                continue
            best = max(blocks, key=lambda b: max(v for _, v in blocks[b]))
            lines = []
            for b in dict.fromkeys((best, min(blocks), max(blocks))):
                shares = [100 * v for _, v in sorted(blocks[b])]
                lines.append(report.Line(f"block {b}", range(len(shares)), shares))
            steps = range(len(blocks[best]))
            lines.append(report.Line("unsteered", steps, [base for _ in steps]))
            axes = {"x": "step of the aperture grid", "y": report.Axis("per cent", low=0)}
            drawn.append(report.Chart(method, *lines, **axes))
        grid = ", ".join(f"{a:g}" for a in result["apertures"])
        made.section(f"{title}: validation accuracy against aperture", f"β = 1; relative apertures {grid}.",
                     report.grid(*drawn))  # fmt: skip
    return made
